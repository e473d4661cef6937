#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// Products of a warpgroup, four warps at a multiple of four: D += A B^T, 64 rows by 256 columns by 16 of k,
// the operands in shared memory, the sums in registers. They run asynchronously: fence, products, commit,
// wait. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" (PTX 8.0, sm_90a).

// Describes an operand of contiguous k, in rows of 128 bytes as a copy with a swizzle of 128 bytes leaves
// them: `shared` is a multiple of 1024, or 32 bytes per 16 of k behind one. Section "Matrix Descriptor
// Format": bits 0-13 address / 16; 16-29 the leading stride, not used with this swizzle; 32-45 the bytes from
// eight rows to the next eight, 1024, / 16; 49-51 0, since the swizzle's pattern begins at a multiple of
// 1024; 62-63 the swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t shared) {
  constexpr uint64_t kFixed = (uint64_t{1} << 16) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 62);
  return kFixed | ((shared & 0x3ffff) >> 4);
}

// What a descriptor of wgmma_operand() grows by for the next 16 of k.
constexpr uint64_t kWgmmaNextK = 32 / 16;

// Before the first product, and before a product whose sums were touched by other instructions.
// Section "wgmma.fence".
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products. Section "wgmma.commit_group".
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the latest groups are under way. Section "wgmma.wait_group".
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the sums across: it does not know that products finish later than
// their instruction.
__device__ __forceinline__ void wgmma_hold(float (&d)[32][4]) {
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
  }
}

// d = A B^T, and d += A B^T where `add`. Row 16 w + l / 4 of lane l of the warpgroup's warp w is d[j][0, 1],
// the row 8 below d[j][2, 3]; their columns are 8 j + 2 (l % 4) and the next. Section "wgmma.mma_async"; the
// immediates: neither operand is negated or transposed.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[32][4], uint64_t a, uint64_t b, bool add);

// clang-format off
#define CCE_SUMS(j) \
  "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), \
  "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define CCE_WGMMA(TYPE) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, add, 1, 1, 0, 0;\n}" \
      : CCE_SUMS(0), CCE_SUMS(2), CCE_SUMS(4), CCE_SUMS(6), CCE_SUMS(8), CCE_SUMS(10), CCE_SUMS(12), \
        CCE_SUMS(14), CCE_SUMS(16), CCE_SUMS(18), CCE_SUMS(20), CCE_SUMS(22), CCE_SUMS(24), CCE_SUMS(26), \
        CCE_SUMS(28), CCE_SUMS(30) \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <>
__device__ __forceinline__ void wgmma_m64n256k16<__nv_bfloat16>(float (&d)[32][4], uint64_t a, uint64_t b,
                                                                bool add) {
  CCE_WGMMA("bf16");
}

template <>
__device__ __forceinline__ void wgmma_m64n256k16<__half>(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  CCE_WGMMA("f16");
}

#undef CCE_WGMMA
#undef CCE_SUMS
// clang-format on

}  // namespace cce::ptx
