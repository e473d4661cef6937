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

// The same for every dtype: fp32 and fp64 are their own sums.
template <typename Element, typename Accumulator>
__device__ __forceinline__ Element rounded(Accumulator x) {
  if constexpr (sizeof(Element) == sizeof(Accumulator)) {
    return x;
  } else {
    return narrow<Element>(x);
  }
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

  // What neighbours read as well: it may stay in L1.
  __device__ __forceinline__ static Vector load_kept(const Element* address) {
    Vector vector;
    if constexpr (kCount == 1) {
      vector.values[0] = __ldg(address);
    } else {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(address));
      memcpy(&vector, &bits, sizeof(bits));
    }
    return vector;
  }

  // What the kernel itself writes.
  __device__ __forceinline__ static Vector load_written(const Element* address) {
    Vector vector;
    if constexpr (kCount == 1) {
      vector.values[0] = *address;
    } else {
      const uint4 bits = *reinterpret_cast<const uint4*>(address);
      memcpy(&vector, &bits, sizeof(bits));
    }
    return vector;
  }

  __device__ __forceinline__ void store(Element* address) const {
    if constexpr (kCount == 1) {
      *address = values[0];
    } else {
      uint4 bits;
      memcpy(&bits, this, sizeof(bits));
      *reinterpret_cast<uint4*>(address) = bits;
    }
  }

  __device__ __forceinline__ static Vector zero() {
    Vector vector;
    memset(&vector, 0, sizeof(vector));
    return vector;
  }
};

}  // namespace cce
