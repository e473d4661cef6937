#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/gradient.cuh"
#include "kernels/logit_codes.h"
#include "ptx/math.cuh"
#include "tile/constants.h"
#include "tile/gradient_row.cuh"

// The logits of few tokens in 16 bits each. The forward leaves them where reading C again would cost more
// than they take, and the exact backward makes dz of them. A code says how far a logit lies below the largest
// of its row in the vocab tile, in steps of 2^-10 of a factor two: p is right to 2^-11 log 2, 0.0003, a
// sixth of what rounding dz to bf16 adds at most. fp16 adds as little itself:
// cce_ext/few_tokens.py asks for bf16 alone.
namespace cce {

constexpr float kCodeSteps = 1024.0f;
// What lies 64 factors of two or more below the tile's largest counts as nothing.
constexpr uint32_t kCodeOfNothing = 0xffff;

// A logit that is not a number has a code of one that is: its row's log-sum-exp is not, which shows.
__device__ __forceinline__ uint32_t encode_logit(float z, float largest) {
  return min(__float2uint_rn((largest - z) * (kLog2E * kCodeSteps)), kCodeOfNothing);
}
__device__ __forceinline__ float decode_logit(uint32_t code, float largest) {
  return fmaf(static_cast<float>(code), -kLn2 / kCodeSteps, largest);
}

// A lane's columns of one row: 32 of the warp's at a time. out: the row's codes from the warp's first column.
template <typename Sums>
__device__ __forceinline__ void store_codes(const Sums& sums, int r, float largest, bool inside,
                                            uint16_t* out, int lane) {
#pragma unroll
  for (int c = 0; c < Sums::kColumns; c += 8) {
    const auto pair = [&](int k) {
      return encode_logit(sums.at(r, c + 2 * k), largest) | encode_logit(sums.at(r, c + 2 * k + 1), largest)
                                                                << 16;
    };
    store_32_columns<true>(pair, inside, out + Sums::column_offset(c), lane);
  }
}

constexpr int kCodesThreads = 256;

template <typename Element>
struct CodesGradientArguments {
  GradientArguments<Element> gradient;  // of a chunk of whole tiles; its bias is in the codes
  LogitCodes codes;
  const float* nll;       // [n]
  int first_tile, tiles;  // of the chunk
};

// dz of a chunk from the codes. A warp a token and a tile, a lane eight of its columns. A label
// that counts as nothing has its logit from its loss, so that its slope is right.
template <typename Element>
__global__ void __launch_bounds__(kCodesThreads)
    gradient_of_codes_kernel(const __grid_constant__ CodesGradientArguments<Element> a) {
  constexpr int kColumns = kTileColumns / kWarpLanes;
  static_assert(kColumns * sizeof(uint16_t) == sizeof(uint4), "one load and one store");
  const GradientArguments<Element>& g = a.gradient;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kCodesThreads / kWarpLanes) +
                        static_cast<int>(threadIdx.x) / kWarpLanes;
  const int tile = static_cast<int>(index / g.n), token = static_cast<int>(index % g.n);
  if (tile >= a.tiles) return;
  const GradientRow row = g.rows[token];
  uint4 out = {0, 0, 0, 0};
  if (row.live()) {
    const GradientScale<Element> scale(*g.largest);
    const int64_t at = (static_cast<int64_t>(a.first_tile) + tile) * g.n + token;
    const float largest = a.codes.largest()[at];
    const uint4 packed = __ldcs(reinterpret_cast<const uint4*>(a.codes.codes + at * kTileColumns) + lane);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    const int label = row.label - g.first_column - tile * kTileColumns - lane * kColumns;
    // Of a row that is not a number all is not.
    const bool sound = isfinite(row.a) && isfinite(row.lse2);
    const auto dz = [&](int column) {
      const uint32_t code = words[column / 2] >> column % 2 * 16 & 0xffff;
      const bool is_label = label == column, nothing = code == kCodeOfNothing;
      if (!sound) return NAN;
      if (nothing && !is_label) return 0.0f;
      // Not from the loss where the code says it: that is another sum than the log-sum-exp's, and of a
      // confident token p - 1 is what is left of their difference.
      const float z = nothing && is_label ? row.lse2 * kLn2 - a.nll[token] : decode_logit(code, largest);
      float value = row.a * row.probability(z);
      if (is_label) value -= row.b;
      if (g.softcap.present()) value *= g.softcap.slope(z);
      return value * scale.factor;
    };
    const auto pair = [&](int k) { return pack(dz(2 * k), dz(2 * k + 1), Element()); };
    out = {pair(0), pair(1), pair(2), pair(3)};
  }
  reinterpret_cast<uint4*>(g.dz + token * g.stride + tile * kTileColumns)[lane] = out;
}

}  // namespace cce
