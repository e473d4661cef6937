#pragma once

#include <cstdint>

namespace cce::ptx {

// Waits until kThreads of the block's threads, whole warps, are at barrier kBarrier (0 is that of
// __syncthreads) and returns whether the condition held for any of them. PTX ISA, "bar{.cta}, barrier{.cta}"
// (sm_20).
template <int kBarrier, int kThreads>
__device__ __forceinline__ bool any_at_barrier(bool condition) {
  static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0, "what the instruction takes");
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred mine, any;\n"
      "setp.ne.u32 mine, %1, 0;\n"
      "bar.red.or.pred any, %2, %3, mine;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(condition)), "n"(kBarrier), "n"(kThreads)
      : "memory");
  return any != 0;
}

}  // namespace cce::ptx
