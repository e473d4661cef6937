#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/visits_config.h"
#include "tile/gradient_row.cuh"
#include "tile/sampling.h"

namespace cce {

struct VisitMaskArguments {
  const GradientRow* rows;        // [n]
  const float* nll;               // [n]
  const __nv_bfloat16* tile_map;  // [tiles, n]
  const int64_t* seed;            // one, or null: the threshold method
  float log_rate;                 // sampled: log(1/eps - 1)
  float log_eps;                  // threshold
  int n, tiles;
  uint32_t* mask;    // [tiles, mask_words(n)]
  uint32_t* counts;  // [tiles], 0 before
};

// The probability with which a token visits a tile that does not hold its label.
__device__ __forceinline__ float probability_of_visit(__nv_bfloat16 map, float nll, float log_rate) {
  return visit_probability(__bfloat162float(map) - nll, log_rate);
}

__global__ void __launch_bounds__(kMaskThreads)
    visit_mask_kernel(const __grid_constant__ VisitMaskArguments a) {
  constexpr int kWords = kFilterRows / kMaskBits;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int first = static_cast<int>(blockIdx.x) * kMaskTokens + warp * kFilterRows;
  if (first >= a.n) return;
  // A lane's tokens are 32 apart, so that a ballot is a word.
  bool inside[kWords], live[kWords];
  float nll[kWords];
  int label_tile[kWords];
  uint32_t key[kWords];
  const int64_t seed = a.seed == nullptr ? 0 : *a.seed;
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int token = first + k * kMaskBits + lane;
    inside[k] = token < a.n;
    const GradientRow row = inside[k] ? a.rows[token] : GradientRow{0.0f, 0.0f, 0.0f, -1};
    live[k] = row.live();
    nll[k] = inside[k] ? a.nll[token] : 0.0f;
    label_tile[k] = row.label < 0 ? -1 : row.label / kTileColumns;
    key[k] = row_key(seed, static_cast<uint32_t>(token));
  }
  const int words = mask_words(a.n);
  const int end = min((static_cast<int>(blockIdx.y) + 1) * kMaskTiles, a.tiles);
  for (int tile = static_cast<int>(blockIdx.y) * kMaskTiles; tile < end; ++tile) {
    const __nv_bfloat16* map = a.tile_map + static_cast<int64_t>(tile) * a.n + first + lane;
    uint32_t word[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      bool visit = live[k] && tile == label_tile[k];
      if (live[k] && !visit) {
        const __nv_bfloat16 value = map[k * kMaskBits];
        if (a.seed != nullptr) {
          visit = visited(visit_hash(key[k], static_cast<uint32_t>(tile)),
                          probability_of_visit(value, nll[k], a.log_rate));
        } else {
          // No entry exceeds its tile's mass, which the rounded map may understate by 2^-7 of itself. What is
          // not finite is looked at.
          const float coarse = __bfloat162float(value);
          visit = !(coarse + fabsf(coarse) * 0x1p-6f - nll[k] < a.log_eps);
        }
      }
      word[k] = __ballot_sync(0xffffffffu, visit);
    }
    if (a.seed == nullptr) {
      // The filter judges whole blocks of tokens.
      const bool any = (word[0] | word[1] | word[2] | word[3]) != 0;
#pragma unroll
      for (int k = 0; k < kWords; ++k) word[k] = __ballot_sync(0xffffffffu, any && inside[k]);
    }
    static_assert(kWords == 4, "a warp writes four words");
    if (lane == 0) {
      *reinterpret_cast<uint4*>(a.mask + static_cast<int64_t>(tile) * words + first / kMaskBits) =
          make_uint4(word[0], word[1], word[2], word[3]);
      const uint32_t count = __popc(word[0]) + __popc(word[1]) + __popc(word[2]) + __popc(word[3]);
      if (count != 0) atomicAdd(a.counts + tile, count);
    }
  }
}

}  // namespace cce
