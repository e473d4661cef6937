#pragma once

#include "ptx/math.cuh"
#include "tile/softcap.cuh"

namespace cce {

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

}  // namespace cce
