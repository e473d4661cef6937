#pragma once

#include <cmath>
#include <cstdint>

#include "tile/constants.h"
#include "tile/host_device.h"

// The tile map: what the forward keeps of a vocab tile's logits for each token, in 16 bits. The upper 12 are
// the tile's mass, the sum of its exp(z), in eighths of a bit; the lower 4 how far below it the L2 norm of
// its exp(z) lies, in quarters of a bit, from 0 (one column has all of it) to 4 (256 equal ones). Both are
// relative to a logit of the token's own (its label's), so that they do not depend on the size of the
// logits, and the steps are the same everywhere, so that no loss is too large for them. What lies outside of
// 256 bits up or down is marked: code 0 says "this or less", the highest "this or more".
namespace cce {

constexpr int kMassSteps = 8;  // a bit
constexpr int kNormSteps = 4;  // a bit
constexpr int kMassCodes = 4096;
constexpr int kNormCodes = 16;
constexpr int kMassOfOne = kMassCodes / 2;

// From the base-2 logarithms of the sum of exp(z - reference) and of its L2 norm. The mass is rounded to the
// nearest code, the norm down, so that no token's expected visits exceed the bound.
CCE_HOST_DEVICE inline uint16_t encode_tile(float log2_mass, float log2_norm) {
  const float steps = log2_mass * kMassSteps + kMassOfOne;
  // Written so that NaN, which only a NaN logit gives, becomes the highest code.
  const int mass = steps < 0.5f             ? 0
                   : steps < kMassCodes - 1 ? static_cast<int>(steps + 0.5f)
                                            : kMassCodes - 1;
  if (mass == 0) return 0;
  const float below = (static_cast<float>(mass - kMassOfOne) / kMassSteps - log2_norm) * kNormSteps;
  const int norm =
      below > 0 ? below < kNormCodes - 1 ? static_cast<int>(std::ceil(below)) : kNormCodes - 1 : 0;
  return static_cast<uint16_t>(mass * kNormCodes + norm);
}

// What a code says of a token's tile: logarithms, base 2, of the sum of its p and of their L2 norm.
struct TileShare {
  float log2_mass, log2_norm;
  bool none;   // the mass is no more than that: take it as 0
  bool above;  // it may be more than that
};

// log2_reference: the log-sum-exp of all of the token's logits less the reference, in bits.
CCE_HOST_DEVICE inline TileShare decode_tile(uint16_t code, float log2_reference) {
  const int mass = code / kNormCodes, norm = code % kNormCodes;
  TileShare share;
  share.log2_mass = static_cast<float>(mass - kMassOfOne) / kMassSteps - log2_reference;
  share.log2_norm = share.log2_mass - static_cast<float>(norm) / kNormSteps;
  share.none = mass == 0;
  share.above = mass == kMassCodes - 1;
  return share;
}

// How many visits a token may spend by chance, 1/eps - 1, as a token's visits to tiles but its label's.
struct VisitRate {
  float log2_rate;
  float even_share;  // of a tile, were they spread evenly; at most 1

  // The probability of a visit: norm * rate, at most 1, and never 0: the gradient is unbiased for any
  // probability above 0. The floor bounds the weight 1/q. Where the code says only "this or more", no less
  // than an even share, so that the weights stay small. A NaN is visited so that it shows.
  // factor: 1 for the loss.
  CCE_HOST_DEVICE float probability(const TileShare& share, float factor = 1.0f) const {
    constexpr float kFloor = 0x1p-24f;
#if defined(__CUDA_ARCH__)
    float q = exp2f(share.log2_norm + log2_rate) * factor;
#else
    float q = std::exp2(share.log2_norm + log2_rate) * factor;
#endif
    if (!(q < 1.0f)) return 1.0f;
    if (share.above && q < even_share) q = even_share;
    return q > kFloor ? q : kFloor;
  }
};

inline VisitRate visit_rate(double eps, int64_t tiles) {
  const double rate = 1.0 / eps - 1.0, even = tiles > 0 ? rate / static_cast<double>(tiles) : 1.0;
  return {static_cast<float>(std::log2(rate)), static_cast<float>(even < 1.0 ? even : 1.0)};
}

// The mass that the control variate takes: at most 1.
CCE_HOST_DEVICE inline float tile_mass(const TileShare& share) {
  if (share.none) return 0.0f;
#if defined(__CUDA_ARCH__)
  return exp2f(fminf(share.log2_mass, 0.0f));
#else
  return std::exp2(std::fmin(share.log2_mass, 0.0f));
#endif
}

}  // namespace cce
