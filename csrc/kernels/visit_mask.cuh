#pragma once

#include <cstdint>

#include "kernels/visits_config.h"
#include "tile/element.cuh"
#include "tile/gradient_row.cuh"
#include "tile/sampling.h"
#include "tile/softcap.cuh"
#include "tile/tile_map.h"
#include "tile/token_score.cuh"
#include "tile/warp.cuh"

namespace cce {

template <typename Element>
struct VisitMaskArguments {
  const GradientRow* rows;   // [n]
  const TokenScore* scores;  // [n], where they are wanted
  const float* nll;          // [n]: the tile map's reference is so far below the log-sum-exp
  const uint16_t* tile_map;  // [tiles, n]
  const int64_t* seed;       // one
  int64_t salt;              // of other draws by the same seed
  const uint32_t* largest;
  VisitRate rate;
  Softcap softcap;
  int n, tiles;
  uint32_t* mask;         // [tiles, mask_words(n)]
  uint32_t* counts;       // [tiles], 0 before
  Element* residual;      // [tiles, residual_stride], scaled; or null: they are not wanted
  int residual_stride;    // n, rounded up; what is past n becomes 0
  float* sums = nullptr;  // [sums_size]: dE's, whole vectors of 16 bytes, which become 0; or null
  int64_t sums_size = 0;
};

// The mean of softcap's slope over a tile, about: that at the logit of a single column with the tile's norm.
// bits: of the capped logit, of which there are scale2 for each unit.
__device__ __forceinline__ float slope_of_tile(const TileShare& share, float lse2, float scale2,
                                               const Softcap& softcap) {
  return softcap.present() ? softcap.slope(__fdividef(lse2 + share.log2_norm, scale2)) : 1.0f;
}

// Finds the visits and the residual masses, a m (1 - w) with w = visited / q: what the control variate gives
// the centroid of a tile, so that its expectation is 0. A block takes a cell of 128 tokens by 32 tiles: see
// tile/sampling.h. The grid is a line of blocks, tokens before tiles: its other dimensions end at 65535.
// kScored: with scores.
template <typename Element, bool kScored>
__global__ void __launch_bounds__(kMaskThreads)
    visit_mask_kernel(const __grid_constant__ VisitMaskArguments<Element> a) {
  constexpr int kWords = kChainTokens / kMaskBits;
  __shared__ uint32_t chain_parts[kMaskWarps][kChainTokens];
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const unsigned token_blocks = static_cast<unsigned>(a.n + kChainTokens - 1) / kChainTokens;
  const int block = static_cast<int>(blockIdx.x % token_blocks);
  const int first = block * kChainTokens;
  // A memset would take a launch.
  if (a.sums != nullptr) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kMaskThreads;
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x; k < a.sums_size / 4;
         k += step) {
      reinterpret_cast<float4*>(a.sums)[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  const int64_t seed = *a.seed ^ a.salt;
  const GradientScale<Element> scale(*a.largest);
  const int first_of_cell = static_cast<int>(blockIdx.x / token_blocks) * kChainTiles;
  const int begin = first_of_cell + warp * kMaskTiles;
  const int end = min(begin + kMaskTiles, a.tiles);
  // A lane's tokens are 32 apart, so that a ballot is a word.
  bool live[kWords];
  float log2_reference[kWords], weight[kWords], lse2[kWords];
  TokenScore score[kScored ? kWords : 1];
  int label_tile[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int token = first + k * kMaskBits + lane;
    const bool inside = token < a.n;
    const GradientRow row = inside ? a.rows[token] : GradientRow{0.0f, 0.0f, 0.0f, -1};
    live[k] = row.live();
    log2_reference[k] = inside ? a.nll[token] * kLog2E : 0.0f;
    weight[k] = row.a * scale.factor;
    lse2[k] = row.lse2;
    if constexpr (kScored) {
      score[k] = inside ? a.scores[token] : TokenScore{kLog2E, 0.0f, 0.0f, 1.0f, 0.0f};
      score[k].h *= scale.factor;
    }
    label_tile[k] = row.label < 0 ? -1 : row.label / kTileColumns;
  }
  // Fetched a tile ahead.
  uint16_t next[kWords];
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const bool inside = tile < end && live[k];
      next[k] = inside ? a.tile_map[static_cast<int64_t>(tile) * a.n + first + k * kMaskBits + lane] : 0;
    }
  };
  // The tile's share of a token's p; in the label's tile all is certain, and there is nothing to make up for.
  const auto drawn = [&](int k, int tile) { return live[k] && tile != label_tile[k]; };

  const auto probability = [&](int k, const TileShare& share) {
    return a.rate.probability(share, kScored ? score[kScored ? k : 0].factor(share) : 1.0f);
  };
  const auto weighed_mass = [&](int k, const TileShare& share) {
    const float mass = tile_mass(share);
    // The weight may be NaN.
    if (mass == 0.0f) return 0.0f;
    const TokenScore& s = score[kScored ? k : 0];
    const float sum = kScored ? s.weighed_mass(weight[k], mass, share) : weight[k] * mass;
    return sum * slope_of_tile(share, lse2[k], kScored ? s.scale2 : kLog2E, a.softcap);
  };

  // A token's chain runs through the tiles of all warps: each begins with what the ones before it add.
  uint32_t chain[kWords] = {};
  const int first_in_chains = begin + (chain_of_token(block, begin) ? 0 : 1);
  fetch(first_in_chains);
  for (int tile = first_in_chains; tile < end; tile += 2) {
    uint16_t code[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) code[k] = next[k];
    fetch(tile + 2);
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      if (drawn(k, tile)) {
        chain[k] += visit_step(probability(k, decode_tile(code[k], log2_reference[k])));
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kWords; ++k) chain_parts[warp][k * kMaskBits + lane] = chain[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kWords; ++k) {
    const int token = first + k * kMaskBits + lane;
    chain[k] = token_chain(row_key(seed, static_cast<uint32_t>(token)), first_of_cell);
#pragma unroll
    for (int other = 0; other < kMaskWarps - 1; ++other) {
      if (other < warp) chain[k] += chain_parts[other][k * kMaskBits + lane];
    }
  }
  static_assert(kMaskTiles <= kWarpLanes, "a lane for each tile's chain");
  const uint32_t tile_chains = tile_chain(seed, begin + lane, block);

  const int words = mask_words(a.n);
  fetch(begin);
  for (int tile = begin; tile < end; ++tile) {
    uint16_t code[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) code[k] = next[k];
    fetch(tile + 1);
    uint32_t step[kWords];
    bool visit[kWords];
    float q[kWords], mass[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      q[k] = 1.0f;
      mass[k] = 0.0f;
      if (drawn(k, tile)) {
        const TileShare share = decode_tile(code[k], log2_reference[k]);
        q[k] = probability(k, share);
        mass[k] = weighed_mass(k, share);
      }
      visit[k] = live[k] && q[k] == 1.0f;
      step[k] = live[k] ? visit_step(q[k]) : 0;
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
    for (int k = 0; k < kWords; ++k) {
      word[k] = __ballot_sync(0xffffffffu, visit[k]);
      const int token = first + k * kMaskBits + lane;
      if (a.residual != nullptr && token < a.residual_stride) {
        const float left = visit[k] ? 1.0f - 1.0f / q[k] : 1.0f;
        // Where nothing is left, the mass may be anything, NaN as well.
        a.residual[static_cast<int64_t>(tile) * a.residual_stride + token] =
            narrow<Element>(left == 0.0f ? 0.0f : mass[k] * left);
      }
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
