#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/target.cuh"
#include "tile/warp.cuh"

namespace cce {

constexpr int kReduceNllThreads = 1024;

struct ReduceNllArguments {
  const float* nll;  // [n]
  Targets targets;   // [n]
  int64_t ignore_index;
  int64_t n;
  bool mean;
  float* loss;   // one
  float* count;  // one
};

// One block: the sum of the losses of the tokens that count, or their mean, and how many there are. In double
// precision and always in the same order.
static __global__ void __launch_bounds__(kReduceNllThreads) reduce_nll_kernel(ReduceNllArguments a) {
  constexpr int kWarps = kReduceNllThreads / kWarpLanes;
  static_assert(kWarps == kWarpLanes, "one warp ends the sums of all");
  __shared__ double sums[kWarps];
  __shared__ int counts[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  double sum = 0.0;
  int count = 0;
#pragma unroll 4
  for (int64_t token = threadIdx.x; token < a.n; token += kReduceNllThreads) {
    const float nll = a.nll[token];
    if (a.targets[token] == a.ignore_index) continue;
    sum += nll;
    ++count;
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane == 0) {
    sums[warp] = sum;
    counts[warp] = count;
  }
  __syncthreads();
  if (warp != 0) return;
  sum = warp_sum(sums[lane]);
  count = warp_sum(counts[lane]);
  if (lane != 0) return;
  // Without tokens that count the mean is 0 / 0, NaN.
  *a.loss = static_cast<float>(a.mean ? sum / count : sum);
  *a.count = static_cast<float>(count);
}

}  // namespace cce
