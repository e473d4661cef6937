#pragma once

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/visits_arguments.cuh"
#include "kernels/visits_sm90_config.h"
#include "ptx/math.cuh"

namespace cce {

// What a tile's own sum of p has more than the scan's, by the visit's weight, for a warp's rows of an item
// from first_m on.
template <typename Element, typename Sums>
__device__ __forceinline__ void correct_scan(const VisitsArguments<Element>& a,
                                             const VisitSlot<Element>& slot, Sums& logits, int first_m,
                                             int lane) {
  finish_logits(logits, slot.item.strip * kTileColumns + Sums::first_column(lane), a.bias, a.bias_stride,
                a.softcap, a.c.count);
#pragma unroll
  for (int r = 0; r < Sums::kRows; ++r) {
    const int m = first_m + Sums::row_offset(r);
    const VisitRow row = slot.row[m];
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < Sums::kColumns; ++c) {
      sum += ptx::exp2_approx(fmaf(logits.at(r, c), kLog2E, -row.lse2));
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    // In fp64 the order of the sums shows in no fp32 result.
    if (lane % 4 == 0 && slot.token[m] >= 0) {
      atomicAdd(a.corrections + slot.token[m], static_cast<double>(row.weight) * (sum - row.b));
    }
  }
}

}  // namespace cce
