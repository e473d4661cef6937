#pragma once

#include <cuda.h>

#include <cstdint>

// What only Hopper has: made for sm_90a.
namespace cce::ptx {

// ---- Clusters ----

// Blocks of a cluster run at the same time on neighbouring multiprocessors and reach each other's shared
// memory (PTX 7.8, sm_90).

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

// ---- Barriers in shared memory ----

// Barriers in shared memory that count arrivals of threads and bytes of copies. A barrier begins in phase 0;
// a phase ends when all arrivals and all expected bytes are there, and the next begins. Addresses are those
// of the shared state space. PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".

// "mbarrier.init" (PTX 7.0, sm_80).
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine and to the cluster's other blocks; a barrier of the
// block or cluster must follow. "membar/fence" (PTX 8.0, sm_90).
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// "mbarrier.arrive" (PTX 7.0, sm_80).
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same at a barrier of any block of the cluster: an address of cluster_address(). It orders what wgmma
// and the copy engine did, which is complete when it is waited for; writes of threads it orders within the
// block only. With .release.cluster it would order those too, by a fence of the whole GPU at every arrival.
// "mbarrier.arrive" with .shared::cluster (PTX 8.0, sm_90).
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for so many bytes more. "mbarrier.arrive.expect_tx" (PTX 8.0, sm_90).
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended. On a new barrier the phase of parity 1 counts as ended.
// "mbarrier.try_wait" (PTX 7.8, sm_90).
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// Arrives, when all copies of cp_async_16() that this thread has started before have arrived; counted among
// the barrier's arrivals. "cp.async.mbarrier.arrive.noinc" (PTX 7.0, sm_80).
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- The copy engine ----

// Copies of boxes of a matrix to shared memory by the copy engine; the matrix is described by a tensor map in
// the kernel's parameters. Elements outside the matrix arrive as zeros, and count as bytes all the same.

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

// ---- Warpgroups ----

// Changes the registers of each thread of the executing warpgroup: fewer, which frees the rest, or more,
// which waits until others have freed them. All its warps take part; multiples of 8 from 24 to 256. PTX ISA,
// "Miscellaneous Instructions: setmaxnreg" (PTX 8.0, sm_90a).
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what the instruction takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what the instruction takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Between the ways to memory ----

// What threads wrote, and the copy engine or wgmma reads next (or the other way round), in shared or global
// memory: by the thread that wrote before it says so, and by the one that reads after it was told. PTX ISA,
// "membar/fence: fence.proxy.async" (PTX 8.0, sm_90).
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

}  // namespace cce::ptx
