#pragma once

#include <cstdint>

#include "kernels/logits_sm80.cuh"
#include "kernels/scores.cuh"
#include "ptx/sync.cuh"

namespace cce {

// As LseEpilogue, with a scale of each token's logits and the statistics of its softmax. A unit's running
// statistics lie where its partial ones are wanted: shared memory has room for the log-sum-exp alone.
template <typename Element>
class ScoreEpilogue {
 public:
  using Arguments = ScoreArguments<Element>;

  static_assert(kLogitsStateBytes == kLogitsRows * sizeof(MaxSum), "one each");

  __device__ __forceinline__ ScoreEpilogue(const Arguments& a, unsigned char* state)
      : a_(a), running_(reinterpret_cast<MaxSum*>(state)) {}

  __device__ __forceinline__ void begin(const LogitsUnit&) {
    if (has_row()) running_[ptx::thread_number()] = MaxSum::none();
  }

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, const LogitsUnit& unit, int column_block,
                                        unsigned char* scratch) {
    const int first_column = column_block * kLogitsColumns + warp_n() * (kLogitsColumns / kLogitsWarpsN) +
                             Sums::first_column(lane());
    cap_logits(sums, first_column, a_.lse.bias, a_.lse.bias_stride, a_.lse.softcap, a_.lse.v);
    auto* exchange = reinterpret_cast<ScoreSums*>(scratch);
    __syncthreads();
    reduce_rows(sums, unit, first_column, exchange);
    __syncthreads();
    // A thread takes one row, of which each of four warps has a part.
    static_assert(kLogitsColumns == kTileColumns, "a block is a vocab tile");
    const int row = own_row(unit), rows = a_.lse.live.count->rows;
    if (!has_row() || row >= rows) return;
    ScoreSums tile = exchange[ptx::thread_number()];
#pragma unroll
    for (int other = 1; other < kLogitsWarpsN; ++other)
      tile.add(exchange[other * kLogitsRows + ptx::thread_number()]);
    const int64_t index = static_cast<int64_t>(unit.split) * rows + row;
    ScoreSums total = column_block == unit.first_column_block ? ScoreSums::none() : load(index);
    total.add(tile);
    keep(total, index);
    if (a_.lse.tile_map != nullptr) {
      const int token = a_.lse.live.tokens[row];
      a_.lse.tile_map[static_cast<int64_t>(column_block) * a_.lse.n + token] =
          tile.tile().code(a_.lse.label_logits[token]);
    }
  }

  __device__ __forceinline__ void finish(const LogitsUnit& unit) {
    const int row = own_row(unit), rows = a_.lse.live.count->rows;
    if (has_row() && row < rows) {
      const int64_t index = static_cast<int64_t>(unit.split) * rows + row;
      const ScoreSums total = load(index);
      a_.lse.partial_lse[index] = total.lse();
      total.store(a_.partial, index);
    }
    __syncthreads();
  }

 private:
  // The running statistics of the thread's row, and those alone that are asked for.
  __device__ __forceinline__ ScoreSums load(int64_t index) const {
    const PartialScores& from = a_.partial;
    const MaxSum running = running_[ptx::thread_number()];
    return {running.max,
            running.sum,
            from.log_squares == nullptr ? 0.0f : from.log_squares[index],
            from.entropy == nullptr ? 0.0f : from.entropy[index],
            from.total == nullptr ? 0.0f : from.total[index],
            from.argmax == nullptr ? 0 : from.argmax[index]};
  }
  __device__ __forceinline__ void keep(const ScoreSums& total, int64_t index) const {
    const PartialScores& to = a_.partial;
    running_[ptx::thread_number()] = {total.max, total.sum};
    if (to.log_squares != nullptr) to.log_squares[index] = total.squares;
    if (to.entropy != nullptr) to.entropy[index] = total.weighed;
    if (to.total != nullptr) to.total[index] = total.total;
    if (to.argmax != nullptr) to.argmax[index] = total.argmax;
  }

  // Leaves the sums of each row of the warp's columns: exchange[warp column][row].
  template <typename Sums>
  __device__ __forceinline__ void reduce_rows(Sums& sums, const LogitsUnit& unit, int first_column,
                                              ScoreSums* exchange) {
    const int row0 = warp_m() * (kLogitsRows / kLogitsWarpsM) + Sums::first_row(lane());
    const auto scale_of = [&](int r) {
      const int row = unit.row_block * kLogitsRows + row0 + Sums::row_offset(r);
      return a_.scale != nullptr && row < a_.lse.live.count->rows ? a_.scale[a_.lse.live.tokens[row]] : 1.0f;
    };
    float max[Sums::kRows], total[Sums::kRows];
    scale_logits(sums, first_column, a_.lse.v, scale_of, max, total);
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 1));
      max[r] = fmaxf(max[r], __shfl_xor_sync(0xffffffffu, max[r], 2));
      ScoreSums part = score_row(sums, r, max[r]);
      part.total = total[r];
      if (a_.partial.argmax != nullptr) part.argmax = first_column + first_column_of(sums, r, max[r]);
#pragma unroll
      for (int distance = 1; distance <= 2; distance *= 2) {
        part.sum += __shfl_xor_sync(0xffffffffu, part.sum, distance);
        part.squares += __shfl_xor_sync(0xffffffffu, part.squares, distance);
        part.weighed += __shfl_xor_sync(0xffffffffu, part.weighed, distance);
        part.total += __shfl_xor_sync(0xffffffffu, part.total, distance);
        part.argmax = min(part.argmax, __shfl_xor_sync(0xffffffffu, part.argmax, distance));
      }
      if (lane() % 4 == 0) exchange[warp_n() * kLogitsRows + row0 + Sums::row_offset(r)] = part;
    }
  }

  // Where the thread and its warp are, computed where it is wanted: the product takes all registers.
  __device__ __forceinline__ static int lane() { return ptx::thread_number() % kWarpLanes; }
  __device__ __forceinline__ static int warp_m() { return ptx::thread_number() / kWarpLanes / kLogitsWarpsN; }
  __device__ __forceinline__ static int warp_n() { return ptx::thread_number() / kWarpLanes % kLogitsWarpsN; }
  // Whether the thread finishes a row of the block, and which.
  __device__ __forceinline__ static bool has_row() { return ptx::thread_number() < kLogitsRows; }
  __device__ __forceinline__ static int own_row(const LogitsUnit& unit) {
    return unit.row_block * kLogitsRows + ptx::thread_number();
  }

  const Arguments& a_;
  MaxSum* const running_;  // shared
};

}  // namespace cce
