#pragma once

#include <cmath>
#include <cstdint>

#include "tile/host_device.h"

// Which (token, vocab tile) pairs the sampled backward visits: a counter-based hash of (seed, token, tile),
// so that every kernel and every implementation draws the same pairs in any order and with no state.
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

// The part of the hash that a token's tiles share. The seed is mixed before it meets the index: neighbouring
// seeds must not deal the same keys to other tokens.
CCE_HOST_DEVICE constexpr uint32_t row_key(int64_t seed, uint32_t token) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const uint32_t first = fmix32(static_cast<uint32_t>(bits) + 0x9e3779b9u);
  const uint32_t second = fmix32(first ^ static_cast<uint32_t>(bits >> 32));
  return fmix32(fmix32(token ^ first) + second);
}

// Uniform on [0, 2^32). The multiplier (2^32 over the golden ratio) is odd, so a row's tiles get distinct
// inputs.
CCE_HOST_DEVICE constexpr uint32_t visit_hash(uint32_t row_key, uint32_t tile) {
  return fmix32(row_key + tile * 0x9e3779b9u);
}

// min(1, mass * rate) from their logarithms, and never 0: the gradient is unbiased for any probability above
// 0. The floor bounds the weight 1/q; a NaN, which only a NaN logit gives, is visited so that it shows in the
// gradient.
CCE_HOST_DEVICE inline float visit_probability(float log_mass, float log_rate) {
  constexpr float kFloor = 0x1p-24f;
#if defined(__CUDA_ARCH__)
  const float q = expf(log_mass + log_rate);
#else
  const float q = std::exp(log_mass + log_rate);
#endif
  if (!(q < 1.0f)) return 1.0f;
  return q > kFloor ? q : kFloor;
}

// Whether a pair with this hash is visited with probability q in (0, 1]. q is a float, so q * 2^32 is exact;
// 64 bits hold the threshold of q = 1, which every hash is below.
CCE_HOST_DEVICE constexpr bool visited(uint32_t hash, float q) {
  return static_cast<uint64_t>(hash) < static_cast<uint64_t>(q * 4294967296.0f);
}

}  // namespace cce
