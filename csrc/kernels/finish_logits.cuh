#pragma once

#include <cmath>
#include <cstdint>

#include "tile/element.cuh"
#include "tile/softcap.cuh"

namespace cce {

// Bias and softcap, applied to a lane's sums. first_column: the lane's own. Past the last column are zeros.
template <typename Element, typename Sums>
__device__ __forceinline__ void cap_logits(Sums& sums, int first_column, const Element* bias,
                                           int64_t bias_stride, const Softcap& softcap, int columns) {
  if (bias != nullptr) {
    const Element* pair = bias + first_column * bias_stride;
#pragma unroll
    for (int c = 0; c < Sums::kColumns; c += 2) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = first_column + Sums::column_offset(c + side);
        const float b = column < columns ? widen<float>(pair[side * bias_stride]) : 0.0f;
#pragma unroll
        for (int r = 0; r < Sums::kRows; ++r) sums.at(r, c + side) += b;
      }
      // From pair to pair, since an offset for each would be a product of 64 bits.
      pair += (Sums::column_offset(2) - Sums::column_offset(0)) * bias_stride;
    }
  }
  if (softcap.present()) {
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Sums::kColumns; ++c) sums.at(r, c) = softcap.apply(sums.at(r, c));
    }
  }
}

// Past the last column, what stands for no logit at all.
template <typename Sums>
__device__ __forceinline__ void end_logits(Sums& sums, int first_column, int columns, float nothing) {
  if (first_column + Sums::kWarpColumns > columns) {
#pragma unroll
    for (int c = 0; c < Sums::kColumns; ++c) {
      if (first_column + Sums::column_offset(c) < columns) continue;
#pragma unroll
      for (int r = 0; r < Sums::kRows; ++r) sums.at(r, c) = nothing;
    }
  }
}

template <typename Element, typename Sums>
__device__ __forceinline__ void finish_logits(Sums& sums, int first_column, const Element* bias,
                                              int64_t bias_stride, const Softcap& softcap, int columns) {
  cap_logits(sums, first_column, bias, bias_stride, softcap, columns);
  end_logits(sums, first_column, columns, -INFINITY);
}

}  // namespace cce
