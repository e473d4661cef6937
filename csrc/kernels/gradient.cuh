#pragma once

#include <cmath>
#include <cstdint>

#include "tile/constants.h"
#include "tile/gradient_row.cuh"
#include "tile/softcap.cuh"
#include "tile/token_score.cuh"

namespace cce {

// What the epilogues that write dz read and write, whichever kernel they belong to. dz of a chunk of the
// vocabulary, whose columns count from its first.
template <typename Element>
struct GradientArguments {
  const Element* bias;  // of the chunk, or null
  int64_t bias_stride;
  Softcap softcap;
  const GradientRow* rows;   // [n]
  const TokenScore* scores;  // [n], or null: there are none
  const uint32_t* largest;
  // The least |p - onehot| for which a filter keeps a block, or 0: all are; log2 of it and of 1 - it.
  float threshold, log2_threshold, log2_rest;
  Element* dz;  // [n, stride], scaled
  int64_t stride;
  int n;
  int first_column, columns;  // of the chunk
};

// A block of the filter: all rows of a block of the product by kFilterColumns.
constexpr int kFilterBlockRows = 128;

template <typename Element>
__device__ __forceinline__ GradientRow load_gradient_row(const GradientArguments<Element>& a, int row) {
  return row < a.n ? a.rows[row] : GradientRow{0.0f, 0.0f, INFINITY, -1};
}

// Of the token's scaled logits.
template <typename Element>
__device__ __forceinline__ LogitScore load_logit_score(const GradientArguments<Element>& a, int row) {
  if (a.scores == nullptr || row >= a.n) return {kLog2E, 0.0f};
  const float2 score = *reinterpret_cast<const float2*>(a.scores + row);
  return {score.x, score.y};
}

// Four pairs of a lane's neighbouring columns, 8 apart, to 16 contiguous bytes a lane: what a quad has of one
// row in 32 columns. pair(k): the k-th in 16 bits; out: the row's place of the first of the 32 columns.
// kStreams: it is not read again soon.
template <bool kStreams = false, typename Element, typename Pair>
__device__ __forceinline__ void store_32_columns(const Pair& pair, bool inside, Element* out, int lane) {
  uint32_t packed[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) packed[k] = pair(k);
  transpose_quad(packed, lane);
  // Lane q of a quad now has the eight columns of pair q.
  if (!inside) return;
  auto* to = reinterpret_cast<uint4*>(out + 8 * (lane % 4));
  const uint4 chunk = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  if constexpr (kStreams) {
    __stcs(to, chunk);
  } else {
    *to = chunk;
  }
}

// Writes the gradient of the logits of a lane's row `r`, in its columns [first, first + kCount). label: its
// column, counted from the lane's first; out: the place of the warp's first column in the row. kind: what dz
// has besides p and the label.
enum class GradientKind { kPlain, kSoftcap, kScored };  // with scores there may be a softcap as well

template <int kCount, GradientKind kKind, typename Element, typename Sums>
__device__ __forceinline__ void write_gradient(const Sums& sums, int r, int first, int row,
                                               const GradientRow& g, int label, bool inside, Element* out,
                                               const GradientArguments<Element>& a) {
  LogitScore score{};
  if constexpr (kKind == GradientKind::kScored) score = load_logit_score(a, row);
  const GradientScale<Element> scale(*a.largest);
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  // A token that does not count is masked: its logits may be NaN, and 0 times that is NaN.
  const uint32_t live = g.live() ? ~0u : 0u;
  static_assert(kCount % 8 == 0, "32 of the warp's columns at a time");
#pragma unroll
  for (int c = first; c < first + kCount; c += 8) {
    const auto pair = [&](int k) {
      float dz[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int column = c + 2 * k + side;
        const float z = sums.at(r, column);
        if constexpr (kKind == GradientKind::kScored) {
          dz[side] = score.weighed(z, g.lse2, g.a);
        } else {
          dz[side] = g.a * g.probability(z);
        }
        if (label == Sums::column_offset(column)) dz[side] -= g.b;
        if (kKind != GradientKind::kPlain && a.softcap.present()) dz[side] *= a.softcap.slope(z);
        dz[side] *= scale.factor;
      }
      return pack(dz[0], dz[1], Element()) & live;
    };
    store_32_columns(pair, inside, out + Sums::column_offset(c), lane);
  }
}

// The same place, in zeros: what the filter drops.
template <int kCount, typename Sums, typename Element>
__device__ __forceinline__ void write_zeros(int first, bool inside, Element* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int c = first; c < first + kCount; c += 8) {
    if (inside) {
      *reinterpret_cast<uint4*>(out + Sums::column_offset(c) + 8 * (lane % 4)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// The paper's filter: whether some |p - onehot| of the same logits is not below the threshold, in a live
// token. Logarithms do, without an exponential: at the label they are mirrored, so that they are as high as p
// is low.
template <int kCount, typename Element, typename Sums>
__device__ __forceinline__ bool passes_filter(const Sums& sums, int r, int first, int row,
                                              const GradientRow& g, int label,
                                              const GradientArguments<Element>& a) {
  const float scale2 = load_logit_score(a, row).scale2;
  const float mirror = a.log2_threshold + a.log2_rest;
  float highest = -INFINITY;
#pragma unroll
  for (int c = first; c < first + kCount; ++c) {
    const float x = fmaf(sums.at(r, c), scale2, -g.lse2);
    highest = fmaxf(highest, label == Sums::column_offset(c) ? mirror - x : x);
  }
  // What is not finite is kept; a maximum would lose it.
  return g.live() && (!(highest < a.log2_threshold) || !isfinite(g.lse2));
}

// A warp's part of a finished block in Element. row0, column0: where it begins in out [rows, columns].
template <typename Sums, typename Element>
__device__ __forceinline__ void store_block(const Sums& sums, Element* out, int64_t row0, int64_t rows,
                                            int column0, int columns, float factor, int lane) {
  static_assert(Sums::kColumns % 8 == 0, "32 of the warp's columns at a time");
#pragma unroll
  for (int r = 0; r < Sums::kRows; ++r) {
    const int64_t row = row0 + Sums::row_offset(r) + Sums::first_row(lane);
#pragma unroll
    for (int c = 0; c < Sums::kColumns; c += 8) {
      const auto pair = [&](int k) {
        return pack(sums.at(r, c + 2 * k) * factor, sums.at(r, c + 2 * k + 1) * factor, Element());
      };
      const int column = column0 + Sums::column_offset(c);
      const bool inside = row < rows && column + 8 * (lane % 4) < columns;
      store_32_columns<true>(pair, inside, out + row * columns + column, lane);
    }
  }
}

}  // namespace cce
