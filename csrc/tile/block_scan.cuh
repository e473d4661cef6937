#pragma once

#include "tile/constants.h"
#include "tile/warp.cuh"

namespace cce {

// The sum of `value` over a block's earlier threads; `total` becomes the sum over all. `shared` holds a value
// for each warp and may be used again after the call.
template <int kThreads, typename T>
__device__ __forceinline__ T block_exclusive_sum(T value, T* shared, T& total) {
  constexpr int kWarps = kThreads / kWarpLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const T inclusive = warp_inclusive_sum(value, lane);
  __syncthreads();
  if (lane == kWarpLanes - 1) shared[warp] = inclusive;
  __syncthreads();
  T earlier = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) earlier = total;
    total += shared[w];
  }
  return earlier + inclusive - value;
}

}  // namespace cce
