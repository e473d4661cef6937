#pragma once

#include <cstdint>

#include "ptx/mma.cuh"
#include "tile/constants.h"
#include "tile/mma_sums.cuh"
#include "tile/swizzle.h"

namespace cce {

// Which index of an operand is contiguous in memory. A tile with contiguous k is [m or n][64 k]; one with
// contiguous m or n is blocks of [k][64 m or n]. Rows are swizzled.
enum class Major { kK, kMN };

// A warp's part of a block's product: 16 kMTiles rows by 8 kNTiles columns of sums in registers.
template <typename Element, int kMTiles, int kNTiles, Major kMajorA, Major kMajorB>
class WarpProduct {
 public:
  static_assert(kNTiles % 2 == 0, "ldmatrix brings two n tiles at a time");
  static constexpr int kDepth = 64;  // of k in a tile
  using Sums = MmaSums<kMTiles, kNTiles>;

  // Operands for 16 of k: those of the next are loaded while these are multiplied.
  struct Fragments {
    uint32_t a[kMTiles][4];
    uint32_t b[kNTiles / 2][4];
  };

  Sums sums;

  // first_m, first_n: where the warp's part begins in the block's tiles.
  __device__ __forceinline__ WarpProduct(int lane, int first_m, int first_n)
      : row_a_(kMajorA == Major::kK ? offset_of_row(first_m + lane % 16)
                                    : block_offset(first_m) + offset_of_row(lane % 8 + lane / 16 * 8)),
        chunk_a_(swizzled(kMajorA == Major::kK ? lane / 16 : chunk_in_row(first_m) + lane / 8 % 2, lane)),
        row_b_(kMajorB == Major::kK ? offset_of_row(first_n + lane % 8 + lane / 16 * 8)
                                    : block_offset(first_n) + offset_of_row(lane % 16)),
        chunk_b_(swizzled(kMajorB == Major::kK ? lane / 8 % 2 : chunk_in_row(first_n) + lane / 16, lane)) {}

  __device__ __forceinline__ void clear() { sums.clear(); }

  // Loads k in [16 k16, 16 k16 + 16) of the tiles at the shared addresses a and b, of the first m_tiles only.
  __device__ __forceinline__ void load(Fragments& f, uint32_t a, uint32_t b, int k16,
                                       int m_tiles = kMTiles) const {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      if (i >= m_tiles) continue;
      if constexpr (kMajorA == Major::kK) {
        ptx::ldmatrix_x4(f.a[i], a + row_a_ + offset_of_row(16 * i) + (chunk_a_ ^ chunks(2 * k16)));
      } else {
        ptx::ldmatrix_x4_transposed(f.a[i],
                                    a + row_a_ + offset_of_row(16 * k16) + (chunk_a_ ^ chunks(2 * i)));
      }
    }
#pragma unroll
    for (int j = 0; j < kNTiles / 2; ++j) {
      if constexpr (kMajorB == Major::kK) {
        ptx::ldmatrix_x4(f.b[j], b + row_b_ + offset_of_row(16 * j) + (chunk_b_ ^ chunks(2 * k16)));
      } else {
        ptx::ldmatrix_x4_transposed(f.b[j],
                                    b + row_b_ + offset_of_row(16 * k16) + (chunk_b_ ^ chunks(2 * j)));
      }
    }
  }

  __device__ __forceinline__ void multiply(const Fragments& f, int m_tiles = kMTiles) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      if (i >= m_tiles) continue;
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
        ptx::mma_m16n8k16<Element>(sums.tiles[i][j], f.a[i], f.b[j / 2][j % 2 * 2],
                                   f.b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

 private:
  __device__ __forceinline__ static constexpr uint32_t offset_of_row(int row) { return row * kRowBytes; }
  __device__ __forceinline__ static constexpr uint32_t block_offset(int mn) {
    return mn / kRowElements * (kDepth * kRowBytes);
  }
  __device__ __forceinline__ static constexpr uint32_t chunks(int count) { return count * kChunkBytes; }
  __device__ __forceinline__ static constexpr int chunk_in_row(int mn) {
    return mn % kRowElements / kChunkElements;
  }
  // All rows that a lane addresses have the lane's own number modulo 8. A warp's part begins at a multiple of
  // its width, so that its further chunks differ in bits that are 0 here: they are reached by another
  // exclusive or.
  __device__ __forceinline__ static uint32_t swizzled(int chunk, int lane) {
    return chunks(chunk ^ lane % 8);
  }
  static_assert(kMajorA == Major::kK || kRowElements % (16 * kMTiles) == 0, "a part lies in one block");
  static_assert(kMajorB == Major::kK || kRowElements % (8 * kNTiles) == 0, "a part lies in one block");

  uint32_t row_a_, chunk_a_;
  uint32_t row_b_, chunk_b_;
};

}  // namespace cce
