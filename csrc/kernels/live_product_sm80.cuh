#pragma once

#include <cstdint>

#include "kernels/copy_rows.cuh"
#include "kernels/gradient.cuh"
#include "kernels/visit_plan.h"
#include "kernels/visits_config.h"
#include "tile/gradient_row.cuh"
#include "tile/ring.cuh"
#include "tile/warp_product.cuh"

// dC of the exact backward is a plain product, dz^T E, and cuBLAS's; so is the control variate's sum of E by
// residual masses. Only where a token that does not count (ignored, or without a gradient) has a row of e
// that is not finite, 0 times that row is NaN in every row of the product. Then the kernel here computes it
// again from the rows that count; otherwise its blocks end at once. A copy of e without these rows would do
// as well, but would take memory in every call. Of few tokens the sampled backward takes the kernel without
// cuBLAS before it.
namespace cce {

constexpr int kStrayRowsThreads = 256;

template <typename Element>
struct StrayRowsArguments {
  Rows<Element> e;
  const GradientRow* rows;  // [n]
  int d;
  VisitControl* control;
};

// Notes whether a row of e that does not count is not finite. A warp a row.
template <typename Element>
__global__ void __launch_bounds__(kStrayRowsThreads)
    stray_rows_kernel(const __grid_constant__ StrayRowsArguments<Element> a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kStrayRowsThreads / kWarpLanes) +
                        static_cast<int>(threadIdx.x) / kWarpLanes;
  if (token >= a.e.count || a.rows[token].live()) return;
  bool finite = true;
  for (int k = lane; k < a.d; k += kWarpLanes) {
    finite &= static_cast<bool>(isfinite(widen<float>(a.e.data[token * a.e.stride + k])));
  }
  if (!finite) a.control->stray_rows = 1;
}

template <typename Element>
struct LiveProductArguments {
  const Element* weights;  // Major::kMN: [n, stride] of `columns` columns each; kK: [columns, stride]; scaled
  int64_t stride;
  Rows<Element> e;
  const GradientRow* rows;      // [n]
  const VisitControl* control;  // or null: the product is wanted whatever the rows hold
  int d, columns, stages;
  float factor;      // of the product
  bool keeps_scale;  // else it is divided by the weights' scale, which control knows
  Element* out;      // [columns, d] contiguous
};

constexpr int kLiveProductRows = 128;

// Blocks compute parts of the product of the weights' transpose (kMN) or the weights (kK) with E: 128 rows by
// 128 of D each.
template <typename Element, Major kMajorOfWeights>
__global__ void __launch_bounds__(kVisitThreads, 1)
    live_product_kernel(const __grid_constant__ LiveProductArguments<Element> a) {
  if (a.control != nullptr && a.control->stray_rows == 0) return;
  // Setup
  extern __shared__ __align__(128) unsigned char shared[];
  using Lane = CopyLane<kVisitThreads>;
  constexpr int kPass = Lane::kRowsPerPass;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes,
            warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int first_m = warp / kVisitWarpsN * (kLiveProductRows / kVisitWarpsM);
  const int first_n = warp % kVisitWarpsN * (kVisitSlice / kVisitWarpsN);
  const int slices = (a.d + kVisitSlice - 1) / kVisitSlice;
  const int parts = (a.columns + kLiveProductRows - 1) / kLiveProductRows * slices;
  for (int part_of_product = static_cast<int>(blockIdx.x); part_of_product < parts;
       part_of_product += static_cast<int>(gridDim.x)) {
    const int column0 = part_of_product / slices * kLiveProductRows;
    const int d0 = part_of_product % slices * kVisitSlice;

    // Load
    int sent = 0;
    const auto send = [&](uint32_t stage) {
      const int k0 = sent++ * kLogitsDepth;
      if constexpr (kMajorOfWeights == Major::kK) {
        copy_rows_of_mn<kLiveProductRows>(stage, Rows<Element>{a.weights, a.stride, a.columns}, column0, k0,
                                          a.e.count);
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int token = k0 + p % 2 * kPass + Lane::row(), column = Lane::column() + p / 2 * kRowElements;
        const bool live = token < a.e.count && a.rows[token].live();
        const int64_t row = live ? token : 0;
        if constexpr (kMajorOfWeights == Major::kMN) {
          ptx::cp_async_16(Lane::destination(stage, p), a.weights + row * a.stride + column0 + column, live);
        }
        ptx::cp_async_16(Lane::destination(stage + kVisitTileBytes, p),
                         a.e.data + row * a.e.stride + d0 + column, live && d0 + column < a.d);
      }
    };
    StageStream<kVisitStageBytes, decltype(send)> stream(shared_address(shared), a.stages, send);

    // Compute
    WarpProduct<Element, 4, 4, kMajorOfWeights, Major::kMN> product(lane, first_m, first_n);
    product.clear();
    for (int k0 = 0; k0 < a.e.count; k0 += kLogitsDepth) {
      stream.next();
      stream.fill();
#pragma unroll
      for (int part = 0; part < kLogitsDepth / 16; ++part) {
        typename decltype(product)::Fragments f;
        product.load(f, stream.stage(), stream.stage() + kVisitTileBytes, part);
        product.multiply(f);
      }
    }

    // Finish
    stream.close();
    const float unscaled = a.keeps_scale ? 1.0f : GradientScale<Element>(a.control->largest).inverse;
    store_block(product.sums, a.out, column0 + first_m, a.columns, d0 + first_n, a.d, a.factor * unscaled,
                lane);
    // Before the next part's copies: stages may still be read.
    __syncthreads();
  }
}

}  // namespace cce
