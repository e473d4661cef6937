#pragma once

#include "ptx/math.cuh"

namespace cce {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// tanh x from one exponential: within 2e-7 everywhere, and exact at both infinities. Unlike tanh.approx,
// whose relative 2^-11 would be 0.015 of a logit at a cap of 30.
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.0f - 2.0f * ptx::reciprocal_approx(ptx::exp2_approx(2.0f * kLog2E * x) + 1.0f);
}

// The softcap, s tanh(z / s). Often there is none, which then costs nothing.
struct Softcap {
  float cap;      // 0: none
  float inverse;  // 1 / cap

  __device__ __forceinline__ bool present() const { return cap != 0.0f; }
  __device__ __forceinline__ float apply(float z) const { return cap * tanh_accurate(z * inverse); }
  // The derivative of apply at a capped logit, and 0 at -inf, which stands for no logit at all.
  __device__ __forceinline__ float slope(float capped) const {
    const float t = capped * inverse;
    return 1.0f - fminf(t * t, 1.0f);
  }
};

}  // namespace cce
