#pragma once

#include <cstdint>

#include "ptx/math.cuh"
#include "tile/tile_map.h"

// What the log-probabilities have besides the loss: a scale of each token's logits, and a gradient of its
// entropy H = -sum p log p. With h = dH, a token's dz is p (a - h (log p + H)) - b onehot.
namespace cce {

// Beside the token's GradientRow, whose a is a - h H, and whose a and b are times the scale.
struct alignas(16) TokenScore {
  float scale2;   // log2 e times the scale of the logits: makes bits of them
  float h;        // of p log2 p: h ln 2 times the scale
  float entropy;  // H in nats
  // The probability of a visit is the loss's, the tile's norm times the rate, times a factor:
  // even + steep |log norm + H|. It bounds what p (log p + H) weighs after the division by it, and a token's
  // expected visits as before (docs/logprobs.md, "The gradient of the entropy").
  float even, steep;

  __device__ __forceinline__ float factor(const TileShare& share) const {
    // A norm of 0 has a logarithm that is not finite.
    if (steep == 0.0f) return even;
    // Step by step, as in sampling.py: both are to name the same visits.
    const float far = fabsf(__fadd_rn(__fmul_rn(share.log2_norm, kLn2), entropy));
    return __fadd_rn(even, __fmul_rn(far, steep));
  }
  // The sum of the tile's p (a - h log2 p), of mass m > 0, if its p were equal: then log2 p = 2 log2 norm -
  // log2 m.
  __device__ __forceinline__ float weighed_mass(float a, float mass, const TileShare& share) const {
    return mass * fmaf(-h, 2.0f * share.log2_norm - share.log2_mass, a);
  }
};

// Of a row of logits: what its dz needs besides.
struct LogitScore {
  float scale2, h;  // as TokenScore's first two

  // p (a - h log2 p), with p = 2^(z scale2 - lse2).
  __device__ __forceinline__ float weighed(float z, float lse2, float a) const {
    // Where p is 0 its logarithm may be -inf, and 0 times that is NaN. A NaN passes.
    constexpr float kFar = -1024.0f;
    const float bits = fmaf(z, scale2, -lse2);
    const float x = bits < kFar ? kFar : bits;
    return ptx::exp2_approx(x) * fmaf(-h, x, a);
  }
};

}  // namespace cce
