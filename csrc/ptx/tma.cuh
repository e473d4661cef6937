#pragma once

#include <cuda.h>

#include <cstdint>

// Copies of boxes of a matrix to shared memory by the copy engine; the matrix is described by a tensor map in
// the kernel's parameters. Elements outside the matrix arrive as zeros, and count as bytes all the same.
namespace cce::ptx {

// Fetches a tensor map into the cache. PTX ISA, "Data Movement and Conversion Instructions: prefetch" with
// .tensormap (PTX 8.0, sm_90).
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What L2 does with the lines that a copy reads. PTX ISA, "createpolicy" (PTX 7.4, sm_80).
__device__ __forceinline__ uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t policy_evict_last() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t policy_evict_normal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Starts the copy of the box whose first element is in `column` of `row`; its bytes arrive at the barrier. To
// be called by one thread. PTX ISA, "cp.async.bulk.tensor" (PTX 8.0, sm_90).
__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                         int column, int row, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
      : "memory");
}

// The same into every block of the cluster whose bit is set in `blocks`, at the same address in each, and its
// bytes arrive at each one's barrier. ".multicast::cluster" (PTX 8.0, sm_90; made for sm_90a).
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                                                   int column, int row, uint16_t blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks), "l"(policy)
      : "memory");
}

}  // namespace cce::ptx
