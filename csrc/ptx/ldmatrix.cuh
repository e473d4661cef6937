#pragma once

#include <cstdint>

namespace cce::ptx {

// Four 8x8 matrices of 16-bit elements from shared memory. Lane 8m + r gives the address of row r of matrix
// m; lane l receives, of each matrix, elements 2(l % 4) and 2(l % 4) + 1 of row l / 4. PTX ISA, "Warp Level
// Matrix Instructions: ldmatrix" (PTX 6.5, sm_75).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// The same, each matrix transposed on its way.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

}  // namespace cce::ptx
