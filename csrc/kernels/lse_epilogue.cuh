#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/logits_sm80.cuh"
#include "kernels/lse.cuh"

namespace cce {

// Reduces each block of logits to its vocab tiles' maxima and sums: a row of the tile map each, and a running
// log-sum-exp for each unit. Always in the same order.
template <typename Element>
class LseEpilogue {
 public:
  using Arguments = LseArguments<Element>;

  // state: a running log-sum-exp for each row and vocab tile of a block, since the threads' registers are
  // taken.
  static_assert(kLogitsStateBytes == kLogitsThreads * sizeof(MaxSum), "one each");

  __device__ __forceinline__ LseEpilogue(const Arguments& a, unsigned char* state)
      : a_(a), running_(reinterpret_cast<MaxSum*>(state)) {}

  __device__ __forceinline__ void begin(const LogitsUnit&) { running_[threadIdx.x] = MaxSum::none(); }

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, const LogitsUnit& unit, int column_block,
                                        unsigned char* scratch) {
    // Loaded early, and for each block anew: a register more all along would be one too many.
    const int row = unit.row_block * kLogitsRows + own_row();
    const bool maps = a_.tile_map != nullptr && row < a_.n;
    const float label = maps ? a_.label_logits[row] : 0.0f;
    const int first_column = column_block * kLogitsColumns + warp_n() * (kLogitsColumns / kLogitsWarpsN);
    finish_logits(sums, first_column + Sums::first_column(lane()), a_.bias, a_.bias_stride, a_.softcap, a_.v);
    auto* exchange = reinterpret_cast<float2*>(scratch);
    __syncthreads();
    reduce_rows(sums, exchange);
    __syncthreads();
    // A thread takes one row of one vocab tile, which two warps have a half of each.
    static_assert(kLogitsColumns == 2 * kTileColumns && kLogitsWarpsN == 4, "two warps a vocab tile");
    static_assert(kLogitsThreads == 2 * kLogitsRows, "a thread for each row and vocab tile");
    MaxSum tile = received(exchange, 2 * own_tile());
    tile.add(received(exchange, 2 * own_tile() + 1));
    running_[threadIdx.x].add(tile);
    const int64_t index = static_cast<int64_t>(column_block) * (kLogitsColumns / kTileColumns) + own_tile();
    if (maps && index * kTileColumns < a_.v) {
      // Where there is no label logit, the map is relative to 0.
      a_.tile_map[index * a_.n + row] = __float2bfloat16_rd(tile.max - (label == label ? label : 0.0f));
    }
  }

  __device__ __forceinline__ void finish(const LogitsUnit& unit) {
    __syncthreads();
    const int row = unit.row_block * kLogitsRows + own_row();
    if (own_tile() == 0 && row < a_.n) {
      MaxSum total = running_[threadIdx.x];
      total.add(running_[threadIdx.x + kLogitsRows]);
      a_.partial_lse[static_cast<int64_t>(unit.split) * a_.n + row] = total.lse();
    }
    __syncthreads();
  }

 private:
  // Leaves the maximum and the sum of each row of the warp's columns: exchange[warp column][row].
  template <typename Sums>
  __device__ __forceinline__ void reduce_rows(const Sums& sums, float2* exchange) {
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      float max = MaxSum::kLowest;
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += 2) max = fmaxf(max, fmaxf(sums.at(r, c), sums.at(r, c + 1)));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
      const float offset = -max * kLog2E;
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int c = 0; c < Sums::kColumns; ++c) {
        sum[c % 2] += ptx::exp2_approx(fmaf(sums.at(r, c), kLog2E, offset));
      }
      float total = sum[0] + sum[1];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (lane() % 4 == 0) {
        const int row =
            warp_m() * (kLogitsRows / kLogitsWarpsM) + Sums::row_offset(r) + Sums::first_row(lane());
        exchange[warp_n() * kLogitsRows + row] = make_float2(max, total);
      }
    }
  }

  __device__ __forceinline__ static MaxSum received(const float2* exchange, int warp_column) {
    const float2 value = exchange[warp_column * kLogitsRows + own_row()];
    return {value.x, value.y};
  }

  // Where the thread and its warp are, computed where it is wanted: the product takes all registers.
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
  __device__ __forceinline__ static int warp_m() {
    return static_cast<int>(threadIdx.x) / kWarpLanes / kLogitsWarpsN;
  }
  __device__ __forceinline__ static int warp_n() {
    return static_cast<int>(threadIdx.x) / kWarpLanes % kLogitsWarpsN;
  }
  // The row and the vocab tile, of a block's two, that the thread reduces.
  __device__ __forceinline__ static int own_row() { return static_cast<int>(threadIdx.x) % kLogitsRows; }
  __device__ __forceinline__ static int own_tile() { return static_cast<int>(threadIdx.x) / kLogitsRows; }

  const Arguments& a_;
  MaxSum* const running_;  // shared
};

}  // namespace cce
