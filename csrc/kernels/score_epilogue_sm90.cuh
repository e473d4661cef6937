#pragma once

#include <cstdint>

#include "kernels/lse_epilogue_sm90.cuh"
#include "kernels/scores.cuh"

namespace cce {

// As LseEpilogueSm90, with a scale of each token's logits and the statistics of its softmax.
template <typename Element>
class ScoreEpilogueSm90 {
 public:
  using Arguments = ScoreArguments<Element>;

  __device__ __forceinline__ explicit ScoreEpilogueSm90(const Arguments& a)
      : a_(a), lane_(static_cast<int>(threadIdx.x) % kWarpLanes) {}

  __device__ __forceinline__ void begin(int row_block) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    const int row0 = row_block * LogitsSm90::kRows + 16 * warp + lane_ / 4;
    const int rows = a_.lse.live.count->rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + 8 * r;
      scale_[r] = a_.scale != nullptr && row < rows ? a_.scale[a_.lse.live.tokens[row]] : 1.0f;
    }
    row_ = row0 + 8 * own_row();
    writes_ = lane_ % 4 < 2 && row_ < rows;
    token_ = writes_ ? a_.lse.live.tokens[row_] : 0;
    label_logit_ = writes_ && a_.lse.tile_map != nullptr ? a_.lse.label_logits[token_] : 0.0f;
    running_ = ScoreSums::none();
  }

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, int column_block) {
    static_assert(LogitsSm90::kColumns == kTileColumns && Sums::kRows == 2, "a block is a vocab tile");
    const int first_column = column_block * LogitsSm90::kColumns + Sums::first_column(lane_);
    cap_logits(sums, first_column, a_.lse.bias, a_.lse.bias_stride, a_.lse.softcap, a_.lse.v);
    float max[2], total[2], sum[2], squares[2], weighed[2];
    scale_logits(sums, first_column, a_.lse.v, [&](int r) { return scale_[r]; }, max, total);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 1));
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 2));
      const ScoreSums row = score_row(sums, r, max[r]);
      sum[r] = row.sum;
      squares[r] = row.squares;
      weighed[r] = row.weighed;
    }
    const bool second = own_row() != 0;
    ScoreSums tile = {second ? max[1] : max[0],         quad_sum_of_own(sum, second),
                      quad_sum_of_own(squares, second), quad_sum_of_own(weighed, second),
                      quad_sum_of_own(total, second),   0};
    if (a_.partial.argmax != nullptr) tile.argmax = first_of_largest(sums, max, first_column);
    running_.add(tile);
    if (writes_ && a_.lse.tile_map != nullptr) {
      a_.lse.tile_map[static_cast<int64_t>(column_block) * a_.lse.n + token_] =
          tile.tile().code(label_logit_);
    }
  }

  __device__ __forceinline__ void finish(int split) {
    if (!writes_) return;
    const int64_t index = static_cast<int64_t>(split) * a_.lse.live.count->rows + row_;
    a_.lse.partial_lse[index] = running_.lse();
    running_.store(a_.partial, index);
  }

 private:
  __device__ __forceinline__ int own_row() const { return lane_ % 2; }

  // The first column that has the largest logit of the lane's own row, unless an earlier block has as large a
  // one. Most blocks are below it for all rows of the warp.
  template <typename Sums>
  __device__ __forceinline__ int first_of_largest(const Sums& sums, const float (&max)[2],
                                                  int first_column) const {
    const bool higher = (own_row() ? max[1] : max[0]) > running_.max;
    if (!__any_sync(0xffffffffu, higher)) return 0;
    int first[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      first[r] = first_column + first_column_of(sums, r, max[r]);
      first[r] = min(first[r], __shfl_xor_sync(0xffffffffu, first[r], 1));
      first[r] = min(first[r], __shfl_xor_sync(0xffffffffu, first[r], 2));
    }
    return own_row() ? first[1] : first[0];
  }

  const Arguments& a_;
  const int lane_;
  float scale_[2] = {1.0f, 1.0f};
  int row_ = 0;  // the lane's own, of those that count
  int token_ = 0;
  bool writes_ = false;
  float label_logit_ = 0.0f;
  ScoreSums running_ = ScoreSums::none();
};

}  // namespace cce
