#pragma once

#include <cstdint>

#include "tile/host_device.h"

// Which (token, vocab tile) pairs the sampled backward visits: a counter-based hash of (seed, token, tile),
// so that every kernel and every implementation draws the same pairs in any order and with no state.
//
// Pairs are drawn in chains (systematic sampling). A chain begins at a uniform 32-bit number and each of its
// pairs adds q 2^32; a pair is visited where the sum wraps. That happens with probability q whatever came
// before, and any run of a chain has its expected number of visits, rounded up or down: what its pairs have
// in common adds little variance. Within a cell of 128 tokens by 32 tiles every other tile belongs to its
// tokens' chains, which run along the tiles (for dE), the rest to chains of their own along the tokens (for
// dC); the next block of tokens has it the other way round.
namespace cce {

// MurmurHash3's 32-bit finalizer (Austin Appleby, public domain): every input bit flips every output bit
// about half the time.
CCE_HOST_DEVICE constexpr uint32_t fmix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  x ^= x >> 16;
  return x;
}

// The part of the hash that a token's (or a tile's) chains share. The seed is mixed before it meets the
// index: neighbouring seeds must not deal the same keys to other tokens.
CCE_HOST_DEVICE constexpr uint32_t row_key(int64_t seed, uint32_t token) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const uint32_t first = fmix32(static_cast<uint32_t>(bits) + 0x9e3779b9u);
  const uint32_t second = fmix32(first ^ static_cast<uint32_t>(bits >> 32));
  return fmix32(fmix32(token ^ first) + second);
}

// Uniform on [0, 2^32). The multiplier (2^32 over the golden ratio) is odd, so one key's indices get distinct
// inputs.
CCE_HOST_DEVICE constexpr uint32_t visit_hash(uint32_t row_key, uint32_t index) {
  return fmix32(row_key + index * 0x9e3779b9u);
}

constexpr int kChainTokens = 128;
constexpr int kChainTiles = 32;

// Whether a block of kChainTokens tokens draws this tile in its tokens' chains.
CCE_HOST_DEVICE constexpr bool chain_of_token(int token_block, int tile) {
  return (token_block + tile) % 2 == 0;
}

// Where chains begin. A tile's keys are the complements of its index: no token has them.
CCE_HOST_DEVICE constexpr uint32_t token_chain(uint32_t row_key, int tile) {
  return visit_hash(row_key, static_cast<uint32_t>(tile / kChainTiles));
}
CCE_HOST_DEVICE constexpr uint32_t tile_chain(int64_t seed, int tile, int token_block) {
  return visit_hash(row_key(seed, ~static_cast<uint32_t>(tile)), static_cast<uint32_t>(token_block));
}

// What a pair of probability q < 1 adds to its chain. One of q = 1 is visited without it.
CCE_HOST_DEVICE constexpr uint32_t visit_step(float q) {
  return q < 1.0f ? static_cast<uint32_t>(q * 4294967296.0f) : 0;
}

// Whether the chain's sum wrapped when it became `sum` by adding `step`.
CCE_HOST_DEVICE constexpr bool chain_wraps(uint32_t sum, uint32_t step) { return sum < step; }

}  // namespace cce
