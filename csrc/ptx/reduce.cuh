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
