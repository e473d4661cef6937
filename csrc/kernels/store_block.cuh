#pragma once

#include <cstdint>

#include "tile/gradient_row.cuh"

namespace cce {

// Rows of a finished block in Element, 16 bytes a lane.
template <typename Product, typename Element>
__device__ __forceinline__ void store_block(const Product& product, Element* out, int64_t row0, int64_t rows,
                                            int column0, int columns, float factor, int lane) {
  constexpr int kMTiles = Product::kRows, kNTiles = Product::kColumns;
  static_assert(kNTiles % 4 == 0, "a quad transposes four tiles at a time");
#pragma unroll
  for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + 16 * i + 8 * half + lane / 4;
#pragma unroll
      for (int j = 0; j < kNTiles; j += 4) {
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          packed[k] = pack(product.sums[i][j + k][2 * half] * factor,
                           product.sums[i][j + k][2 * half + 1] * factor, Element());
        }
        transpose_quad(packed, lane);
        const int column = column0 + 8 * (j + lane % 4);
        if (row < rows && column < columns) {
          *reinterpret_cast<uint4*>(out + row * columns + column) =
              make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
      }
    }
  }
}

}  // namespace cce
