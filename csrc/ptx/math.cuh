#pragma once

namespace cce::ptx {

// 2^x and log2 x on the special function unit, within 2 units in the last place or so over the range used
// here; 2^-inf is 0, log2 0 is -inf. PTX ISA, "Floating Point Instructions: ex2, lg2, rcp".
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cce::ptx
