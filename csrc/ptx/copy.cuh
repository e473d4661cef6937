#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cce::ptx {

// ---- Global to shared memory, without registers ----

// Copies 16 bytes from global to shared memory without holding them in registers, past L1; where `inside` is
// false, nothing is read and the 16 bytes become zero. Both addresses are multiples of 16.
// These are copies of the generic proxy: ldmatrix reads what they brought after a wait and a barrier, without
// a proxy fence. PTX ISA, "Data Movement and Conversion Instructions: cp.async" (PTX 7.0, sm_80; ignored
// source bytes are zero-filled; L2::128B: what follows in the row is wanted next).
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool inside) {
  const int source_bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(source_bytes)
               : "memory");
}

// Closes this thread's group of copies; an empty group is complete at once.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Global memory to registers ----

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

// ---- Additions to global memory ----

// Adds to consecutive floats of global memory, in no order; `address` is a multiple of the bytes added to.
// PTX ISA, "Parallel Synchronization and Communication Instructions: red" (vectors: PTX 8.1, sm_90).
__device__ __forceinline__ void reduce_add_2(float* address, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y) : "memory");
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address + 1), "f"(y) : "memory");
#endif
}

__device__ __forceinline__ void reduce_add_4(float* address, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y),
               "f"(z), "f"(w)
               : "memory");
#else
  reduce_add_2(address, x, y);
  reduce_add_2(address + 2, z, w);
#endif
}

}  // namespace cce::ptx
