#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx/math.cuh"
#include "tile/softcap.cuh"

namespace cce {

// What the gradient of a token's logits needs: dz = (a p - b [v = label]) slope, p = 2^(z log2 e - lse2).
struct alignas(16) GradientRow {
  float a, b;
  float lse2;  // log-sum-exp in units of log 2; inf for an ignored token, whose p is then 0
  int label;   // -1: none

  __device__ __forceinline__ bool live() const { return a != 0.0f || b != 0.0f; }
  __device__ __forceinline__ float probability(float z) const {
    return ptx::exp2_approx(fmaf(z, kLog2E, -lse2));
  }
};

// dz is multiplied by a power of two before it is rounded to 16 bits and divided by it again in fp32: in fp16
// a mean over many tokens would otherwise lose all small entries. bf16 has fp32's range and needs none.
template <typename Element>
struct GradientScale {
  float factor, inverse;

  // The bits of the largest |a| or |b| of all tokens.
  __device__ __forceinline__ explicit GradientScale(uint32_t largest);
};

template <>
__device__ __forceinline__ GradientScale<__nv_bfloat16>::GradientScale(uint32_t)
    : factor(1.0f), inverse(1.0f) {}

template <>
__device__ __forceinline__ GradientScale<__half>::GradientScale(uint32_t largest) {
  // |dz| is at most twice the largest weight or a little more: 2^12 of fp16's 2^16 leave room, and entries
  // 2^-36 of the largest are still kept.
  constexpr int kTop = 12 + 127;
  const int exponent = static_cast<int>(largest >> 23);
  const bool usable = exponent > 0 && exponent < 255;
  // The inverse must be a normal number as well.
  const int shift = usable ? max(-126, min(126, kTop - exponent)) : 0;
  factor = __uint_as_float(static_cast<uint32_t>(127 + shift) << 23);
  inverse = __uint_as_float(static_cast<uint32_t>(127 - shift) << 23);
}

// Two elements in one register, the first in the lower half.
__device__ __forceinline__ uint32_t pack(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(float first, float second, __half) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Of a 4x4 of registers, one row a lane of a quad, the transpose: lane q's register r becomes lane r's q.
// What mma leaves as pairs of columns becomes 16 contiguous bytes a lane.
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? r[i] : r[i + distance], distance);
      if (upper) {
        r[i] = received;
      } else {
        r[i + distance] = received;
      }
    }
  }
}

}  // namespace cce
