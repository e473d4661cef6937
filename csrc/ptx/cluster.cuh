#pragma once

#include <cstdint>

// Blocks that run at the same time on neighbouring multiprocessors and reach each other's shared memory
// (PTX 7.8, sm_90).
namespace cce::ptx {

// The block's number within its cluster. PTX ISA, "Special Registers: %cluster_ctarank".
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster, wherever in the code each is; what they wrote before is seen after.
// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster".
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Where the block of this rank has what lies at a shared address of the own block.
// PTX ISA, "Data Movement and Conversion Instructions: mapa".
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

}  // namespace cce::ptx
