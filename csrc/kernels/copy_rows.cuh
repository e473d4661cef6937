#pragma once

#include <cstdint>

#include "kernels/logits_sm80_config.h"
#include "tile/ring.cuh"
#include "tile/rows.h"

// How rows of a matrix become a tile of a stage. All threads of a block take part.
namespace cce {

// A tile [kRows][64 k] of rows that are indexed by m or n, of `depth` elements.
template <int kRows, typename Element>
__device__ __forceinline__ void copy_rows_of_mn(uint32_t tile, const Rows<Element>& from, int row0, int k0,
                                                int depth) {
  using Lane = CopyLane<kLogitsThreads>;
  constexpr int kPass = Lane::kRowsPerPass;
  const int row = row0 + Lane::row(), k = k0 + Lane::column();
#pragma unroll
  for (int p = 0; p < kRows / kPass; ++p) {
    ptx::cp_async_16(Lane::destination(tile, p), from.data + (row + p * kPass) * from.stride + k,
                     row + p * kPass < from.count && k < depth);
  }
}

// kBlocks tiles [64 k][64 columns], side by side in the columns, of rows that are indexed by k.
template <int kBlocks, typename Element>
__device__ __forceinline__ void copy_rows_of_k(uint32_t tile, const Rows<Element>& from, int k0, int column0,
                                               int columns) {
  using Lane = CopyLane<kLogitsThreads>;
  constexpr int kPass = Lane::kRowsPerPass;
  static_assert(2 * kPass == kLogitsDepth, "two passes a block");
  const int k = k0 + Lane::row(), column = column0 + Lane::column();
  const Element* source = from.data + k * from.stride + column;
#pragma unroll
  for (int p = 0; p < 2 * kBlocks; ++p) {
    const int down = p % 2 * kPass;
    const int right = p / 2 * kRowElements;
    ptx::cp_async_16(Lane::destination(tile, p), source + down * from.stride + right,
                     k + down < from.count && column + right < columns);
  }
}

}  // namespace cce
