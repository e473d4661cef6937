#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/tile_map.cuh"
#include "kernels/visits_config.h"
#include "tile/gradient_row.cuh"
#include "tile/sampling.h"

namespace cce {

struct VisitMaskArguments {
  const GradientRow* rows;        // [n]
  const float* nll;               // [n]
  const __nv_bfloat16* tile_map;  // [tiles, n]
  const int64_t* seed;            // one
  float log_rate;                 // log(1/eps - 1)
  int n, tiles;
  uint32_t* mask;    // [tiles, mask_words(n)]
  uint32_t* counts;  // [tiles], 0 before
};

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const uint32_t before = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

// A warp takes a cell of 128 tokens by 32 tiles: see tile/sampling.h. The grid is a line of blocks, tokens
// before tiles: its other dimensions end at 65535.
static __global__ void __launch_bounds__(kMaskThreads)
    visit_mask_kernel(const __grid_constant__ VisitMaskArguments a) {
  constexpr int kWords = kChainTokens / kMaskBits;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const unsigned token_blocks = static_cast<unsigned>(a.n + kMaskTokens - 1) / kMaskTokens;
  const int block = static_cast<int>(blockIdx.x % token_blocks) * (kMaskThreads / kWarpLanes) +
                    static_cast<int>(threadIdx.x) / kWarpLanes;
  const int first = block * kChainTokens;
  if (first >= a.n) return;
  const int64_t seed = *a.seed;
  const int begin = static_cast<int>(blockIdx.x / token_blocks) * kChainTiles;
  const int end = min(begin + kChainTiles, a.tiles);
  // A lane's tokens are 32 apart, so that a ballot is a word.
  bool live[kWords];
  float nll[kWords];
  int label_tile[kWords];
  uint32_t chain[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int token = first + k * kMaskBits + lane;
    const bool inside = token < a.n;
    const GradientRow row = inside ? a.rows[token] : GradientRow{0.0f, 0.0f, 0.0f, -1};
    live[k] = row.live();
    nll[k] = inside ? a.nll[token] : 0.0f;
    label_tile[k] = row.label < 0 ? -1 : row.label / kTileColumns;
    chain[k] = token_chain(row_key(seed, static_cast<uint32_t>(token)), begin);
  }
  static_assert(kChainTiles == kWarpLanes, "a lane for each tile's chain");
  const uint32_t tile_chains = tile_chain(seed, begin + lane, block);
  const int words = mask_words(a.n);
  for (int tile = begin; tile < end; ++tile) {
    const __nv_bfloat16* map = a.tile_map + static_cast<int64_t>(tile) * a.n + first + lane;
    uint32_t step[kWords];
    bool visit[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      float q = tile == label_tile[k] ? 1.0f : 0.0f;
      if (live[k] && q == 0.0f) q = probability_of_visit(map[k * kMaskBits], nll[k], a.log_rate);
      visit[k] = live[k] && q == 1.0f;
      step[k] = live[k] ? visit_step(q) : 0;
    }
    if (chain_of_token(block, tile)) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        chain[k] += step[k];
        visit[k] |= chain_wraps(chain[k], step[k]);
      }
    } else {
      uint32_t before = __shfl_sync(0xffffffffu, tile_chains, tile - begin);
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        const uint32_t sum = before + warp_inclusive_sum(step[k], lane);
        visit[k] |= chain_wraps(sum, step[k]);
        before = __shfl_sync(0xffffffffu, sum, kWarpLanes - 1);
      }
    }
    uint32_t word[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = __ballot_sync(0xffffffffu, visit[k]);
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
