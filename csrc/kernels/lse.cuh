#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "ptx/math.cuh"
#include "tile/softcap.cuh"
#include "tile/target.cuh"

// The log-sum-exp of the logits: what the epilogues that reduce them share, and the kernel that joins what
// they leave.
namespace cce {

// What the forward's epilogues read and write, whichever kernel they belong to.
template <typename Element>
struct LseArguments {
  const Element* bias;  // [V] or null
  int64_t bias_stride;
  Softcap softcap;
  const float* label_logits;  // [N]
  __nv_bfloat16* tile_map;    // [V / 128, N] or null
  float* partial_lse;         // [splits, N]
  int n, v;
};

// log sum exp as a maximum and a sum relative to it.
struct MaxSum {
  float max;
  float sum;

  __device__ __forceinline__ void add(const MaxSum& other) {
    const float higher = fmaxf(max, other.max);
    sum = sum * ptx::exp2_approx((max - higher) * kLog2E) +
          other.sum * ptx::exp2_approx((other.max - higher) * kLog2E);
    max = higher;
  }
  __device__ __forceinline__ float lse() const { return max + ptx::log2_approx(sum) * kLn2; }
  // Finite, also times log2 e, so that columns of -inf (past the vocabulary, or masked by the bias) do not
  // make -inf - -inf.
  static constexpr float kLowest = -0x1p126f;
  __device__ __forceinline__ static MaxSum none() { return {kLowest, 0.0f}; }
};

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
