#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

// Products of warpgroups: made for sm_90a.
namespace cce::ptx {

// Products of a warpgroup, four warps at a multiple of four: D += A B^T, 64 rows by up to 256 columns by 16
// of k, or 32 of 8 bits, the operands in shared memory or A in registers, the sums in registers. They run
// asynchronously: fence, products, commit, wait. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"
// (PTX 8.0, sm_90a).

// Describes an operand of contiguous k, in rows of 128 bytes as a copy with a swizzle of 128 bytes leaves
// them: `shared` is a multiple of 1024, or 32 bytes per product behind one. Section "Matrix Descriptor
// Format": bits 0-13 address / 16; 16-29 the leading stride, not used with this swizzle; 32-45 the bytes from
// eight rows to the next eight, 1024, / 16; 49-51 0, since the swizzle's pattern begins at a multiple of
// 1024; 62-63 the swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t shared) {
  constexpr uint64_t kFixed = (uint64_t{1} << 16) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 62);
  return kFixed | ((shared & 0x3ffff) >> 4);
}

// What a descriptor of wgmma_operand() grows by for the next product: 16 of k, or 32 of 8 bits.
constexpr uint64_t kWgmmaNextK = 32 / 16;

// The same of an operand whose m or n is contiguous: blocks of [k][64 m or n] in rows of 128 bytes,
// `next_block` bytes from 64 to the next 64. Bits 16-29 are that stride, 32-45 the bytes from eight of k to
// the next eight. For the next 16 of k it grows by kWgmmaNextRows.
__device__ __forceinline__ uint64_t wgmma_operand_mn(uint32_t shared, uint32_t next_block) {
  constexpr uint64_t kFixed = (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 62);
  return kFixed | (uint64_t{next_block / 16} << 16) | ((shared & 0x3ffff) >> 4);
}
constexpr uint64_t kWgmmaNextRows = 16 * 128 / 16;

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
template <int kTiles>
__device__ __forceinline__ void wgmma_hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
  }
}

// d = A B^T, and d += A B^T where `add`. Row 16 w + l / 4 of lane l of the warpgroup's warp w is d[j][0, 1],
// the row 8 below d[j][2, 3]; their columns are 8 j + 2 (l % 4) and the next. Section "wgmma.mma_async"; the
// immediates: neither operand is negated or transposed.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n256(float (&d)[32][4], uint64_t a, uint64_t b, bool add);

// clang-format off
#define CCE_SUMS(j) \
  "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), \
  "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define CCE_WGMMA(SHAPE, TYPE, MAJOR) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, add, 1, 1" MAJOR ";\n}" \
      : CCE_SUMS(0), CCE_SUMS(2), CCE_SUMS(4), CCE_SUMS(6), CCE_SUMS(8), CCE_SUMS(10), CCE_SUMS(12), \
        CCE_SUMS(14), CCE_SUMS(16), CCE_SUMS(18), CCE_SUMS(20), CCE_SUMS(22), CCE_SUMS(24), CCE_SUMS(26), \
        CCE_SUMS(28), CCE_SUMS(30) \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <>
__device__ __forceinline__ void wgmma_m64n256<__nv_bfloat16>(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  CCE_WGMMA("m64n256k16", "bf16", ", 0, 0");
}

template <>
__device__ __forceinline__ void wgmma_m64n256<__half>(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  CCE_WGMMA("m64n256k16", "f16", ", 0, 0");
}

// 32 of k: operands of 8 bits are never transposed.
template <>
__device__ __forceinline__ void wgmma_m64n256<__nv_fp8_e4m3>(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  CCE_WGMMA("m64n256k32", "e4m3", "");
}

// d = A B, and d += A B where `add`: A's 64 rows with m contiguous, B's 128 columns with n contiguous. Both are
// transposed, as the last two immediates say.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n128k16_mn(float (&d)[16][4], uint64_t a, uint64_t b, bool add);

#define CCE_WGMMA_MN(TYPE) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
      "}, %64, %65, add, 1, 1, 1, 1;\n}" \
      : CCE_SUMS(0), CCE_SUMS(2), CCE_SUMS(4), CCE_SUMS(6), CCE_SUMS(8), CCE_SUMS(10), CCE_SUMS(12), \
        CCE_SUMS(14) \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))

template <>
__device__ __forceinline__ void wgmma_m64n128k16_mn<__nv_bfloat16>(float (&d)[16][4], uint64_t a, uint64_t b,
                                                                   bool add) {
  CCE_WGMMA_MN("bf16");
}

template <>
__device__ __forceinline__ void wgmma_m64n128k16_mn<__half>(float (&d)[16][4], uint64_t a, uint64_t b,
                                                            bool add) {
  CCE_WGMMA_MN("f16");
}

// d = A B, and d += A B where `add`: A in registers, as the sums of a product lie when neighbouring columns
// are packed (row 16 w + l / 4 of 16 columns in a[0], a[2], the row 8 below in a[1], a[3]), B's 64 columns with
// n contiguous.
template <typename Element>
__device__ __forceinline__ void wgmma_m64n64k16_rows(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                                     bool add);

#define CCE_WGMMA_ROWS(TYPE) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}" \
      : CCE_SUMS(0), CCE_SUMS(2), CCE_SUMS(4), CCE_SUMS(6) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

template <>
__device__ __forceinline__ void wgmma_m64n64k16_rows<__nv_bfloat16>(float (&d)[8][4], const uint32_t (&a)[4],
                                                                    uint64_t b, bool add) {
  CCE_WGMMA_ROWS("bf16");
}

template <>
__device__ __forceinline__ void wgmma_m64n64k16_rows<__half>(float (&d)[8][4], const uint32_t (&a)[4],
                                                             uint64_t b, bool add) {
  CCE_WGMMA_ROWS("f16");
}

#undef CCE_WGMMA_ROWS
#undef CCE_WGMMA_MN
#undef CCE_WGMMA
#undef CCE_SUMS
// clang-format on

}  // namespace cce::ptx
