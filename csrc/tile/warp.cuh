#pragma once

#include "tile/constants.h"

namespace cce {

// The sum over a warp's lanes, in every lane, always in the same order.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

}  // namespace cce
