#pragma once

namespace cce::ptx {

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

}  // namespace cce::ptx
