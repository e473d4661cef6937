#pragma once

#include <cstdint>

namespace cce::ptx {

// Nanoseconds of a clock that all multiprocessors share; it may advance in steps of a microsecond. PTX ISA,
// "Special Registers: %globaltimer".
__device__ __forceinline__ uint64_t global_nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// Stops the kernel with an error that the host sees. PTX ISA, "Miscellaneous Instructions: trap".
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

}  // namespace cce::ptx
