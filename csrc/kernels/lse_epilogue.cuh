#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/finish_logits.cuh"
#include "kernels/logit_codes.cuh"
#include "kernels/logits_sm80.cuh"
#include "kernels/lse.cuh"
#include "ptx/sync.cuh"

namespace cce {

// Reduces each block of logits, a vocab tile wide, to each row's sums: a row of the tile map, and a running
// log-sum-exp for each unit. Always in the same order. kKeeps: the logits are left in the codes of
// logit_codes.cuh.
template <typename Element, bool kKeeps = false>
class LseEpilogue {
 public:
  using Arguments = std::conditional_t<kKeeps, CodesArguments<Element>, LseArguments<Element>>;

  // state: a running log-sum-exp for each row of a block, since the threads' registers are taken.
  static_assert(kLogitsStateBytes == kLogitsRows * sizeof(MaxSum), "one each");

  __device__ __forceinline__ LseEpilogue(const Arguments& a, unsigned char* state)
      : arguments_(a), a_(lse_of(a)), running_(reinterpret_cast<MaxSum*>(state)) {}

  __device__ __forceinline__ void begin(const LogitsUnit&) {
    if (has_row()) running_[ptx::thread_number()] = MaxSum::none();
  }

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, const LogitsUnit& unit, int column_block,
                                        unsigned char* scratch) {
    const int first_column = column_block * kLogitsColumns + warp_n() * (kLogitsColumns / kLogitsWarpsN);
    finish_logits(sums, first_column + Sums::first_column(lane()), a_.bias, a_.bias_stride, a_.softcap, a_.v);
    auto* exchange = reinterpret_cast<TileSums*>(scratch);
    __syncthreads();
    reduce_rows(sums, exchange);
    __syncthreads();
    // A thread takes one row, of which each of four warps has a part.
    static_assert(kLogitsColumns == kTileColumns, "a block is a vocab tile");
    if (has_row()) {
      TileSums& tile = exchange[ptx::thread_number()];
#pragma unroll
      for (int other = 1; other < kLogitsWarpsN; ++other)
        tile.add(exchange[other * kLogitsRows + ptx::thread_number()]);
      running_[ptx::thread_number()].add(tile.max_sum());
      const int row = own_row(unit);
      if (a_.tile_map != nullptr && row < a_.live.count->rows) {
        const int token = a_.live.tokens[row];
        a_.tile_map[static_cast<int64_t>(column_block) * a_.n + token] = tile.code(a_.label_logits[token]);
      }
    }
    if constexpr (kKeeps) {
      __syncthreads();
      keep(sums, unit, column_block, exchange);
    }
  }

  __device__ __forceinline__ void finish(const LogitsUnit& unit) {
    const int row = own_row(unit), rows = a_.live.count->rows;
    if (has_row() && row < rows) {
      a_.partial_lse[static_cast<int64_t>(unit.split) * rows + row] = running_[ptx::thread_number()].lse();
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ static const LseArguments<Element>& lse_of(const Arguments& a) {
    if constexpr (kKeeps) {
      return a.lse;
    } else {
      return a;
    }
  }

  // tiles: the sums of each row of the block, all columns of it.
  template <typename Sums>
  __device__ __forceinline__ void keep(const Sums& sums, const LogitsUnit& unit, int column_block,
                                       const TileSums* tiles) const {
    const LogitCodes& codes = arguments_.codes;
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      const int row_of_block =
          warp_m() * (kLogitsRows / kLogitsWarpsM) + Sums::row_offset(r) + Sums::first_row(lane());
      const int row = unit.row_block * kLogitsRows + row_of_block;
      const bool inside = row < a_.live.count->rows;
      const int64_t at = static_cast<int64_t>(column_block) * a_.n + (inside ? a_.live.tokens[row] : 0);
      const float largest = tiles[row_of_block].max;
      uint16_t* out = codes.codes + at * kTileColumns + warp_n() * (kLogitsColumns / kLogitsWarpsN);
      store_codes(sums, r, largest, inside, out, lane());
      if (inside && warp_n() == 0 && lane() % 4 == 0) codes.largest()[at] = largest;
    }
  }

  // Leaves the sums of each row of the warp's columns: exchange[warp column][row].
  template <typename Sums>
  __device__ __forceinline__ void reduce_rows(const Sums& sums, TileSums* exchange) {
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      float max = MaxSum::kLowest;
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += 2) max = fmaxf(max, fmaxf(sums.at(r, c), sums.at(r, c + 1)));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
      const float offset = -max * kLog2E;
      float sum[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
#pragma unroll
      for (int c = 0; c < Sums::kColumns; ++c) {
        const float x = ptx::exp2_approx(fmaf(sums.at(r, c), kLog2E, offset));
        sum[c % 2] += x;
        squares[c % 2] = fmaf(x, x, squares[c % 2]);
      }
      TileSums part = {max, sum[0] + sum[1], squares[0] + squares[1]};
#pragma unroll
      for (int distance = 1; distance <= 2; distance *= 2) {
        part.sum += __shfl_xor_sync(0xffffffffu, part.sum, distance);
        part.squares += __shfl_xor_sync(0xffffffffu, part.squares, distance);
      }
      if (lane() % 4 == 0) {
        const int row =
            warp_m() * (kLogitsRows / kLogitsWarpsM) + Sums::row_offset(r) + Sums::first_row(lane());
        exchange[warp_n() * kLogitsRows + row] = part;
      }
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

  const Arguments& arguments_;
  const LseArguments<Element>& a_;
  MaxSum* const running_;  // shared
};

}  // namespace cce
