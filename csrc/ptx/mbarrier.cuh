#pragma once

#include <cstdint>

// Barriers in shared memory that count arrivals of threads and bytes of copies. A barrier begins in phase 0;
// a phase ends when all arrivals and all expected bytes are there, and the next begins. Addresses are those
// of the shared state space. PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
namespace cce::ptx {

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

}  // namespace cce::ptx
