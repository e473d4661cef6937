#pragma once

#include <cstdint>

namespace cce::ptx {

// The thread's number in its block, read where it is wanted: the compiler would keep threadIdx.x, and all
// that it computes from it, in registers. PTX ISA, "Special Registers: %tid".
__device__ __forceinline__ int thread_number() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- Between the warps of a block ----

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

// The same without a condition: what these threads wrote before is seen by all of them after.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void wait_at_barrier() {
  static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0, "what the instruction takes");
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// ---- Between the blocks of a grid ----

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

// ---- Waits that end ----

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
