#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/gradient_arguments.cuh"
#include "tile/constants.h"

// What the epilogues that write dz share: the gradient of a row of logits, and the paper's filter.
namespace cce {

// A block of the filter: all rows of a block of the product by one vocab tile.
constexpr int kFilterBlockRows = 128;

template <typename Element>
__device__ __forceinline__ GradientRow gradient_row(const GradientArguments<Element>& a, int row) {
  return row < a.n ? a.rows[row] : GradientRow{0.0f, 0.0f, INFINITY, -1};
}

// Writes the gradient of the logits of one of a warp's rows, in tiles [first, first + kTiles), 16 bytes a
// lane. label: its column, counted from the lane's first; out: the place of tile 0 in the row.
template <int kTiles, bool kSoftcap, typename Element, typename Product>
__device__ __forceinline__ void write_gradient(const Product& product, int i, int half, int first,
                                               const GradientRow& g, int label, bool inside, Element* out,
                                               const GradientArguments<Element>& a) {
  const GradientScale<Element> scale(*a.largest);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  // A token that does not count is masked: its logits may be NaN, and 0 times that is NaN.
  const uint32_t live = g.live() ? ~0u : 0u;
  static_assert(kTiles % 4 == 0, "a quad transposes four tiles at a time");
#pragma unroll
  for (int j = first; j < first + kTiles; j += 4) {
    uint32_t packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float dz[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float z = product.sums[i][j + k][2 * half + side];
        dz[side] = g.a * g.probability(z);
        if (label == 8 * (j + k) + side) dz[side] -= g.b;
        if constexpr (kSoftcap) dz[side] *= a.softcap.slope(z);
        dz[side] *= scale.factor;
      }
      packed[k] = pack(dz[0], dz[1], Element()) & live;
    }
    transpose_quad(packed, lane);
    // Lane q of a quad now has the eight columns of tile j + q.
    if (inside) {
      *reinterpret_cast<uint4*>(out + 8 * (j + lane % 4)) =
          make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

// The same place, in zeros: what the filter drops.
template <int kTiles, typename Element>
__device__ __forceinline__ void write_zeros(int first, bool inside, Element* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int j = first; j < first + kTiles; j += 4) {
    if (inside) *reinterpret_cast<uint4*>(out + 8 * (j + lane % 4)) = make_uint4(0, 0, 0, 0);
  }
}

// The paper's filter: whether some |p - onehot| of the same logits is not below the threshold, in a live
// token. Logarithms do, without an exponential: at the label they are mirrored, so that they are as high as p
// is low.
template <int kTiles, typename Element, typename Product>
__device__ __forceinline__ bool passes_filter(const Product& product, int i, int half, int first,
                                              const GradientRow& g, int label,
                                              const GradientArguments<Element>& a) {
  const float mirror = a.log2_threshold + a.log2_rest;
  float highest = -INFINITY;
#pragma unroll
  for (int j = first; j < first + kTiles; ++j) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float x = g.log2_probability(product.sums[i][j][2 * half + side]);
      highest = fmaxf(highest, label == 8 * j + side ? mirror - x : x);
    }
  }
  // What is not finite is kept; a maximum would lose it.
  return g.live() && (!(highest < a.log2_threshold) || !isfinite(g.lse2));
}

}  // namespace cce
