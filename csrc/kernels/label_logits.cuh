#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/label_logits_config.h"
#include "tile/element.cuh"
#include "tile/warp.cuh"

namespace cce {

// Strides are in elements. With softcap 0 there is none.
template <typename Element, typename Accumulator, typename Index>
struct LabelLogitsArguments {
  const Element* e;      // [n, d]
  const Element* c;      // [v, d]
  const Element* bias;   // [v], or null
  const Index* targets;  // [n]
  Accumulator* out;      // [n], contiguous
  int64_t n, d, v;
  int64_t e_row_stride, c_row_stride, bias_stride, target_stride;
  int64_t ignore_index;
  Accumulator softcap;
  const Accumulator* scale;  // [n] contiguous, or null
};

// A warp's dot product of two rows of d elements, in every lane. The rows are read in vectors of kCount
// elements, and what is left over element by element.
template <typename Element, typename Accumulator, int kCount>
__device__ __forceinline__ Accumulator row_dot(const Element* x, const Element* y, int64_t d, int lane) {
  using Load = Vector<Element, kCount>;
  constexpr int kInFlight = kLabelLogitsInFlight;
  const int64_t vectors = d / kCount;
  Accumulator partial[kInFlight] = {};
  for (int64_t first = lane; first < vectors; first += kInFlight * kWarpLanes) {
    Load xs[kInFlight], ys[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t vector = first + k * kWarpLanes;
      const bool inside = vector < vectors;
      xs[k] = inside ? Load::load(x + vector * kCount) : Load::zero();
      ys[k] = inside ? Load::load(y + vector * kCount) : Load::zero();
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        partial[k] =
            fma(widen<Accumulator>(xs[k].values[i]), widen<Accumulator>(ys[k].values[i]), partial[k]);
      }
    }
  }
  for (int64_t i = vectors * kCount + lane; i < d; i += kWarpLanes) {
    partial[0] = fma(widen<Accumulator>(x[i]), widen<Accumulator>(y[i]), partial[0]);
  }
  static_assert(kInFlight == 4, "the sum below is of four");
  return warp_sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
}

// out[i] = e[i] . c[targets[i]] + bias[targets[i]], capped and scaled; 0 for an ignored token, NaN for a
// target outside [0, v).
template <typename Element, typename Accumulator, typename Index, int kCount>
__global__ void __launch_bounds__(kLabelLogitsThreads)
    label_logits_kernel(const __grid_constant__ LabelLogitsArguments<Element, Accumulator, Index> a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int64_t tokens_per_grid = static_cast<int64_t>(gridDim.x) * kLabelLogitsTokensPerBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kLabelLogitsTokensPerBlock + warp; i < a.n;
       i += tokens_per_grid) {
    const int64_t target = a.targets[i * a.target_stride];
    Accumulator z;
    if (target == a.ignore_index) {
      z = Accumulator(0);
    } else if (target < 0 || target >= a.v) {
      z = static_cast<Accumulator>(NAN);
    } else {
      z = row_dot<Element, Accumulator, kCount>(a.e + i * a.e_row_stride, a.c + target * a.c_row_stride, a.d,
                                                lane);
      if (a.bias != nullptr) z += widen<Accumulator>(a.bias[target * a.bias_stride]);
      if (a.softcap != Accumulator(0)) z = a.softcap * tanh(z / a.softcap);
      if (a.scale != nullptr) z *= a.scale[i];
    }
    if (lane == 0) a.out[i] = z;
  }
}

}  // namespace cce
