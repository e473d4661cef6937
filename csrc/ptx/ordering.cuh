#pragma once

#include <cstdint>

namespace cce::ptx {

// A counter through which blocks of one grid hand data on: what a thread wrote before the release is seen by
// whoever acquires a value that includes it. PTX ISA, "Memory Consistency Model" and "red", "ld" (sm_70).
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

}  // namespace cce::ptx
