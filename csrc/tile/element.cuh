#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "ptx/copy.cuh"

namespace cce {

// An element of e, c or bias in the type that sums are taken in.
template <typename Accumulator>
__device__ __forceinline__ Accumulator widen(__half x) {
  return static_cast<Accumulator>(__half2float(x));
}
template <typename Accumulator>
__device__ __forceinline__ Accumulator widen(__nv_bfloat16 x) {
  return static_cast<Accumulator>(__bfloat162float(x));
}
template <typename Accumulator>
__device__ __forceinline__ Accumulator widen(float x) {
  return static_cast<Accumulator>(x);
}
template <typename Accumulator>
__device__ __forceinline__ Accumulator widen(double x) {
  return static_cast<Accumulator>(x);
}

// A sum, rounded to an element.
template <typename Element>
__device__ __forceinline__ Element narrow(float x);
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// kCount consecutive elements, loaded by one instruction: 16 bytes of them at a 16-byte boundary, or a single
// one anywhere.
template <typename Element, int kCount>
struct Vector {
  static_assert(kCount == 1 || kCount * sizeof(Element) == 16, "a vector is one element or 16 bytes");

  Element values[kCount];

  __device__ __forceinline__ static Vector load(const Element* address) {
    Vector vector;
    if constexpr (kCount == 1) {
      vector.values[0] = __ldg(address);
    } else {
      const uint4 bits = ptx::load_streaming_16(address);
      memcpy(&vector, &bits, sizeof(bits));
    }
    return vector;
  }

  __device__ __forceinline__ static Vector zero() {
    Vector vector;
    memset(&vector, 0, sizeof(vector));
    return vector;
  }
};

}  // namespace cce
