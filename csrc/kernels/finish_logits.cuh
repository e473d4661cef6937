#pragma once

#include <cmath>
#include <cstdint>

#include "tile/element.cuh"
#include "tile/softcap.cuh"

namespace cce {

// Bias, softcap and the end of the vocabulary, applied to a warp's sums.
template <typename Element, typename Product>
__device__ __forceinline__ void finish_logits(Product& product, int first_column, const Element* bias,
                                              int64_t bias_stride, const Softcap& softcap, int columns) {
  constexpr int kMTiles = Product::kRows, kNTiles = Product::kColumns;
  if (bias != nullptr) {
    const Element* pair = bias + first_column * bias_stride;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j, pair += 8 * bias_stride) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int column = first_column + 8 * j + k;
        const float b = column < columns ? widen<float>(pair[k * bias_stride]) : 0.0f;
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
          product.sums[i][j][k] += b;
          product.sums[i][j][k + 2] += b;
        }
      }
    }
  }
  if (softcap.present()) {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
        for (int r = 0; r < 4; ++r) product.sums[i][j][r] = softcap.apply(product.sums[i][j][r]);
      }
    }
  }
  if (first_column + 8 * kNTiles > columns) {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (first_column + 8 * j + k < columns) continue;
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
          product.sums[i][j][k] = -INFINITY;
          product.sums[i][j][k + 2] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace cce
