#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "tile/softcap.cuh"
#include "tile/target.cuh"
#include "tile/tile_map.h"

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
  uint16_t* tile_map;         // [V / 256, N] or null
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

// The sum of exp(z) and of its squares, relative to the largest z.
struct TileSums {
  float max;
  float sum, squares;

  __device__ __forceinline__ void add(const TileSums& other) {
    const float higher = fmaxf(max, other.max);
    const float own = ptx::exp2_approx((max - higher) * kLog2E);
    const float others = ptx::exp2_approx((other.max - higher) * kLog2E);
    sum = sum * own + other.sum * others;
    squares = squares * (own * own) + other.squares * (others * others);
    max = higher;
  }
  __device__ __forceinline__ MaxSum max_sum() const { return {max, sum}; }
  // The tile map's entry. A label logit that is NaN, where there is none, stands for 0.
  __device__ __forceinline__ uint16_t code(float label_logit) const {
    const float reference = label_logit == label_logit ? label_logit : 0.0f;
    const float offset = (max - reference) * kLog2E;
    return encode_tile(offset + ptx::log2_approx(sum), offset + 0.5f * ptx::log2_approx(squares));
  }
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
