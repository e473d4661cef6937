#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/element.cuh"
#include "tile/gradient_row.cuh"

// The small passes beside the gradient's products.
namespace cce {

constexpr int kColumnSumsThreads = 256;
constexpr int kColumnSumsColumns = 2 * kWarpLanes;
constexpr int kRoundThreads = 256;

template <typename Element>
struct ColumnSumsArguments {
  const Element* dz;  // [n, stride], scaled
  int64_t stride;
  int n, columns;
  const uint32_t* largest;
  Element* out;  // [columns]
};

// dbias of a chunk: the sum of each column of dz, always in the same order.
template <typename Element>
__global__ void __launch_bounds__(kColumnSumsThreads)
    column_sums_kernel(const __grid_constant__ ColumnSumsArguments<Element> a) {
  constexpr int kWarps = kColumnSumsThreads / kWarpLanes;
  __shared__ float2 partial[kWarps][kWarpLanes];
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int column = static_cast<int>(blockIdx.x) * kColumnSumsColumns + 2 * lane;
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8
  for (int row = warp; row < a.n; row += kWarps) {
    const Element* pair = a.dz + row * a.stride + column;
    sum.x += widen<float>(pair[0]);
    sum.y += widen<float>(pair[1]);
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < kWarps; ++other) {
    sum.x += partial[other][lane].x;
    sum.y += partial[other][lane].y;
  }
  const GradientScale<Element> scale(*a.largest);
  if (column < a.columns) a.out[column] = narrow<Element>(sum.x * scale.inverse);
  if (column + 1 < a.columns) a.out[column + 1] = narrow<Element>(sum.y * scale.inverse);
}

template <typename Element>
__device__ __forceinline__ void store_rounded(Element* out, const float4& x, float factor) {
  *reinterpret_cast<uint2*>(out) =
      make_uint2(pack(x.x * factor, x.y * factor, Element()), pack(x.z * factor, x.w * factor, Element()));
}

// What a product of scaled dz is multiplied by, and by what the result that was there: 1 / scale and 0.
template <typename Element>
__global__ void product_factors_kernel(const uint32_t* largest, float* factors) {
  factors[0] = GradientScale<Element>(*largest).inverse;
  factors[1] = 0.0f;
}

// out = in / scale in Element, for `count` (a multiple of 4) elements.
template <typename Element>
__global__ void __launch_bounds__(kRoundThreads)
    round_gradient_kernel(const float* in, Element* out, int64_t count, const uint32_t* largest) {
  const GradientScale<Element> scale(*largest);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRoundThreads * 4;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kRoundThreads + threadIdx.x) * 4; i < count;
       i += step) {
    store_rounded(out + i, *reinterpret_cast<const float4*>(in + i), scale.inverse);
  }
}

}  // namespace cce
