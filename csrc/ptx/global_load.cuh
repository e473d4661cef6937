#pragma once

#include <cuda_runtime.h>

namespace cce::ptx {

// 16 bytes of global memory that no thread writes while the kernel runs; `address` is a multiple of 16.
// For data that is read once and in order: it is not kept in L1, and L2 fetches 128 bytes at a time because
// the bytes that follow are wanted next. PTX ISA, "Data Movement and Conversion Instructions: ld.global.nc"
// (cache hints: PTX 7.4, sm_75).
__device__ __forceinline__ uint4 load_streaming_16(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address)));
  return value;
}

}  // namespace cce::ptx
