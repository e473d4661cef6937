#pragma once

#include <cstdint>

namespace cce::ptx {

// Copies 16 bytes from global to shared memory without holding them in registers, past L1; where `inside` is
// false, nothing is read and the 16 bytes become zero. Both addresses are multiples of 16.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async" (PTX 7.0, sm_80; ignored source bytes are
// zero-filled; L2::128B: what follows in the row is wanted next).
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

}  // namespace cce::ptx
