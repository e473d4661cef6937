#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/logits_sm90_config.h"
#include "kernels/lse.cuh"
#include "tile/exp2.h"

namespace cce {

// As LseEpilogue, from the registers of wgmma: a quad of lanes holds all 256 columns of two rows, so that
// rows are reduced by shuffles alone. Of the quad's four log-sum-exps, two rows of two vocab tiles, each lane
// keeps one, the number of its place in the quad: row + 8 for odd ones, the second vocab tile for 2 and 3.
// What a warp then writes of the tile map are two runs of 16 neighbouring entries.
template <typename Element, int kPolynomialEighths>
class LseEpilogueSm90 {
 public:
  using Arguments = LseArguments<Element>;

  __device__ __forceinline__ explicit LseEpilogueSm90(const Arguments& a)
      : a_(a), lane_(static_cast<int>(threadIdx.x) % kWarpLanes) {}

  __device__ __forceinline__ void begin(int row_block) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    row_ = row_block * LogitsSm90::kRows + 16 * warp + 8 * (lane_ % 2) + lane_ / 4;
    maps_ = a_.tile_map != nullptr && row_ < a_.n;
    // Where there is no label logit, the map is relative to 0.
    const float label = maps_ ? a_.label_logits[row_] : 0.0f;
    reference_ = label == label ? label : 0.0f;
    running_ = MaxSum::none();
  }

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, int column_block) {
    static_assert(LogitsSm90::kColumns == 2 * kTileColumns, "two vocab tiles a block");
    finish_logits(sums, column_block * LogitsSm90::kColumns + Sums::first_column(lane_), a_.bias,
                  a_.bias_stride, a_.softcap, a_.v);
    const MaxSum tile = reduce(sums);
    running_.add(tile);
    const int64_t index = static_cast<int64_t>(column_block) * 2 + own_tile();
    if (maps_ && index * kTileColumns < a_.v) {
      a_.tile_map[index * a_.n + row_] = __float2bfloat16_rd(tile.max - reference_);
    }
  }

  __device__ __forceinline__ void finish(int split) {
    running_.add(
        {__shfl_xor_sync(0xffffffffu, running_.max, 2), __shfl_xor_sync(0xffffffffu, running_.sum, 2)});
    if (own_tile() == 0 && row_ < a_.n) {
      a_.partial_lse[static_cast<int64_t>(split) * a_.n + row_] = running_.lse();
    }
  }

 private:
  __device__ __forceinline__ int own_tile() const { return lane_ % 4 / 2; }

  // The log-sum-exp that is the lane's own.
  template <typename Sums>
  __device__ __forceinline__ MaxSum reduce(const Sums& sums) const {
    constexpr int kHalf = Sums::kColumns / 2;
    float max[4], total[4];
#pragma unroll
    for (int own = 0; own < 4; ++own) {
      const int first = own / 2 * kHalf, r = own % 2;
      max[own] = MaxSum::kLowest;
#pragma unroll
      for (int c = first; c < first + kHalf; c += 2) {
        max[own] = fmaxf(max[own], fmaxf(sums.at(r, c), sums.at(r, c + 1)));
      }
    }
#pragma unroll
    for (int own = 0; own < 4; ++own) {
      max[own] = fmaxf(max[own], __shfl_xor_sync(0xffffffffu, max[own], 1));
      max[own] = fmaxf(max[own], __shfl_xor_sync(0xffffffffu, max[own], 2));
    }
#pragma unroll
    for (int own = 0; own < 4; ++own) {
      const int first = own / 2 * kHalf, r = own % 2;
      const float offset = -max[own] * kLog2E;
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int c = first; c < first + kHalf; ++c) {
        const float x = fmaf(sums.at(r, c), kLog2E, offset);
        // Interleaved, so that both units have work.
        sum[c % 2] += c / 2 * 3 % 8 < kPolynomialEighths ? exp2_polynomial(x) : ptx::exp2_approx(x);
      }
      total[own] = sum[0] + sum[1];
    }
    return {of_own(max), quad_sum_of_own(total)};
  }

  // values[the lane's place in its quad]
  __device__ __forceinline__ float of_own(const float (&values)[4]) const {
    const float first = lane_ % 2 ? values[1] : values[0];
    const float second = lane_ % 2 ? values[3] : values[2];
    return own_tile() ? second : first;
  }

  // The sum of values[the lane's place in its quad] over the quad: what is not the lane's own goes to those
  // it belongs to, halves first.
  __device__ __forceinline__ float quad_sum_of_own(const float (&values)[4]) const {
    const bool second = own_tile() != 0, odd = lane_ % 2 != 0;
    float kept[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float received = __shfl_xor_sync(0xffffffffu, second ? values[k] : values[2 + k], 2);
      kept[k] = (second ? values[2 + k] : values[k]) + received;
    }
    const float received = __shfl_xor_sync(0xffffffffu, odd ? kept[0] : kept[1], 1);
    return (odd ? kept[1] : kept[0]) + received;
  }

  const Arguments& a_;
  const int lane_;
  int row_ = 0;  // the lane's own
  bool maps_ = false;
  float reference_ = 0.0f;
  MaxSum running_ = MaxSum::none();
};

}  // namespace cce
