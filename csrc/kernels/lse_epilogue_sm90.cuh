#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/finish_logits.cuh"
#include "kernels/logit_codes.cuh"
#include "kernels/logits_sm90_config.h"
#include "kernels/lse.cuh"
#include "ptx/math.cuh"

namespace cce {

// Of a quad of lanes that hold two rows, even lanes own the first, odd ones the second. The sum of
// values[own row] over the quad: the other's goes to a lane that it belongs to.
__device__ __forceinline__ float quad_sum_of_own(const float (&values)[2], bool second) {
  const float received = __shfl_xor_sync(0xffffffffu, second ? values[0] : values[1], 1);
  const float sum = (second ? values[1] : values[0]) + received;
  return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
}

// As LseEpilogue, from the registers of wgmma: a quad of lanes holds all 256 columns of two rows, a vocab
// tile, so that rows are reduced by shuffles alone. Even lanes of a quad keep the first row's log-sum-exp,
// odd ones that of the row eight below. What a warp writes of the tile map are 16 neighbouring entries.
//
// Of a scan the product is of 8 bits, and its scales make logits of it. Where logits are kept, they are left
// in the codes of logit_codes.cuh.
enum class LseOf { kLogits, kScan, kKeptLogits };

template <typename Element, LseOf kOf = LseOf::kLogits>
class LseEpilogueSm90 {
 public:
  using Arguments = std::conditional_t<
      kOf == LseOf::kScan, ScanArguments<Element>,
      std::conditional_t<kOf == LseOf::kKeptLogits, CodesArguments<Element>, LseArguments<Element>>>;

  __device__ __forceinline__ explicit LseEpilogueSm90(const Arguments& a)
      : arguments_(a), a_(lse_of(a)), lane_(static_cast<int>(threadIdx.x) % kWarpLanes) {}

  __device__ __forceinline__ void begin(int row_block) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    row_ = row_block * LogitsSm90::kRows + 16 * warp + 8 * own_row() + lane_ / 4;
    writes_ = lane_ % 4 < 2 && row_ < a_.live.count->rows;
    token_ = writes_ ? a_.live.tokens[row_] : 0;
    label_logit_ = writes_ && a_.tile_map != nullptr ? a_.label_logits[token_] : 0.0f;
    running_ = MaxSum::none();
  }

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, int column_block) {
    static_assert(LogitsSm90::kColumns == kTileColumns, "a block is a vocab tile");
    if constexpr (kOf == LseOf::kScan) {
      const float of_tile = arguments_.tile_scale[column_block];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row past the last is nobody's.
        const float scale = arguments_.row_scale[min(row_ + 8 * (r - own_row()), a_.n - 1)] * of_tile;
#pragma unroll
        for (int c = 0; c < Sums::kColumns; ++c) sums.at(r, c) *= scale;
      }
    }
    finish_logits(sums, column_block * LogitsSm90::kColumns + Sums::first_column(lane_), a_.bias,
                  a_.bias_stride, a_.softcap, a_.v);
    float largest[2];
    const TileSums tile = reduce(sums, largest);
    running_.add(tile.max_sum());
    if constexpr (kOf == LseOf::kKeptLogits) keep(sums, largest, column_block);
    if (writes_ && a_.tile_map != nullptr) {
      a_.tile_map[static_cast<int64_t>(column_block) * a_.n + token_] = tile.code(label_logit_);
    }
  }

  __device__ __forceinline__ void finish(int split) {
    if (!writes_) return;
    a_.partial_lse[static_cast<int64_t>(split) * a_.live.count->rows + row_] = running_.lse();
  }

 private:
  __device__ __forceinline__ int own_row() const { return lane_ % 2; }

  __device__ __forceinline__ static const LseArguments<Element>& lse_of(const Arguments& a) {
    if constexpr (kOf == LseOf::kLogits) {
      return a;
    } else {
      return a.lse;
    }
  }

  template <typename Sums>
  __device__ __forceinline__ void keep(const Sums& sums, const float (&largest)[2], int tile) const {
    const LogitCodes& codes = arguments_.codes;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_ + 8 * (r - own_row());
      const bool inside = row < a_.live.count->rows;
      const int64_t at = static_cast<int64_t>(tile) * a_.n + (inside ? a_.live.tokens[row] : 0);
      store_codes(sums, r, largest[r], inside, codes.codes + at * kTileColumns, lane_);
      if (inside && lane_ % 4 == 0) codes.largest()[at] = largest[r];
    }
  }

  // The sums of the lane's own row, and the largest of both.
  template <typename Sums>
  __device__ __forceinline__ TileSums reduce(const Sums& sums, float (&max)[2]) const {
    static_assert(Sums::kRows == 2, "an own row for even and for odd lanes");
    float total[2], squares[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = MaxSum::kLowest;
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += 2) {
        max[r] = fmaxf(max[r], fmaxf(sums.at(r, c), sums.at(r, c + 1)));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 1));
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 2));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = -max[r] * kLog2E;
      float sum[2] = {0.0f, 0.0f}, square[2] = {0.0f, 0.0f};
#pragma unroll
      for (int c = 0; c < Sums::kColumns; ++c) {
        const float x = ptx::exp2_approx(fmaf(sums.at(r, c), kLog2E, offset));
        sum[c % 2] += x;
        square[c % 2] = fmaf(x, x, square[c % 2]);
      }
      total[r] = sum[0] + sum[1];
      squares[r] = square[0] + square[1];
    }
    const bool second = own_row() != 0;
    return {second ? max[1] : max[0], quad_sum_of_own(total, second), quad_sum_of_own(squares, second)};
  }

  const Arguments& arguments_;
  const LseArguments<Element>& a_;
  const int lane_;
  int row_ = 0;  // the lane's own, of those that count
  int token_ = 0;
  bool writes_ = false;
  float label_logit_ = 0.0f;
  MaxSum running_ = MaxSum::none();
};

}  // namespace cce
