#pragma once

#include <cstdint>

#include "kernels/max_sum.cuh"
#include "tile/target.cuh"

namespace cce {

constexpr int kLseFinishThreads = 128;

struct LseFinishArguments {
  const float* partial_lse;   // [splits, n]
  const float* label_logits;  // [n]
  Targets targets;            // [n]
  int64_t ignore_index;
  float* nll;  // [n]
  float* lse;  // [n]
  int n, splits;
};

// Joins the partial log-sum-exps of each token, in their order. An ignored token's loss and lse are 0.
static __global__ void __launch_bounds__(kLseFinishThreads) lse_finish_kernel(LseFinishArguments a) {
  const int row = static_cast<int>(blockIdx.x) * kLseFinishThreads + static_cast<int>(threadIdx.x);
  if (row >= a.n) return;
  MaxSum total = MaxSum::none();
  for (int split = 0; split < a.splits; ++split) {
    total.add({a.partial_lse[static_cast<int64_t>(split) * a.n + row], 1.0f});
  }
  const bool ignored = a.targets[row] == a.ignore_index;
  const float lse = total.lse();
  a.lse[row] = ignored ? 0.0f : lse;
  a.nll[row] = ignored ? 0.0f : lse - a.label_logits[row];
}

}  // namespace cce
