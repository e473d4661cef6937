#pragma once

#include <cstdint>

#include "kernels/live_rows.h"
#include "kernels/logit_codes.h"
#include "ptx/math.cuh"
#include "tile/softcap.cuh"
#include "tile/target.cuh"
#include "tile/tile_map.h"

// The log-sum-exp of the logits: what the epilogues that reduce them share, and the kernel that joins what
// they leave.
namespace cce {

// What the forward's epilogues read and write, whichever kernel they belong to.
template <typename Element>
struct LseArguments {
  const Element* bias;  // [V] or null
  int64_t bias_stride;
  Softcap softcap;
  LiveRows live;              // R of the N tokens
  const float* label_logits;  // [N]
  uint16_t* tile_map;         // [V / 256, N] or null
  float* partial_lse;         // [splits, R]
  int n, v;
};

// The same for a product of 8 bits, of the rows that count, and the scales of its operands.
template <typename Element>
struct ScanArguments {
  LseArguments<Element> lse;
  const float* row_scale;   // [R]
  const float* tile_scale;  // [V / 256]
};

// The same where the logits are kept: see logit_codes.cuh.
template <typename Element>
struct CodesArguments {
  LseArguments<Element> lse;
  LogitCodes codes;
};

// log sum exp as a maximum and a sum relative to it.
struct MaxSum {
  float max;
  float sum;

  __device__ __forceinline__ void add(const MaxSum& other) {
    const float higher = fmaxf(max, other.max);
    sum = sum * ptx::exp2_approx((max - higher) * kLog2E) +
          other.sum * ptx::exp2_approx((other.max - higher) * kLog2E);
    max = higher;
  }
  __device__ __forceinline__ float lse() const { return max + ptx::log2_approx(sum) * kLn2; }
  // Finite, also times log2 e, so that columns of -inf (past the vocabulary, or masked by the bias) do not
  // make -inf - -inf.
  static constexpr float kLowest = -0x1p126f;
  __device__ __forceinline__ static MaxSum none() { return {kLowest, 0.0f}; }
};

// The sum of exp(z) and of its squares, relative to the largest z.
struct TileSums {
  float max;
  float sum, squares;

  __device__ __forceinline__ void add(const TileSums& other) {
    const float higher = fmaxf(max, other.max);
    const float own = ptx::exp2_approx((max - higher) * kLog2E);
    const float others = ptx::exp2_approx((other.max - higher) * kLog2E);
    sum = sum * own + other.sum * others;
    squares = squares * (own * own) + other.squares * (others * others);
    max = higher;
  }
  __device__ __forceinline__ MaxSum max_sum() const { return {max, sum}; }
  // The tile map's entry. A label logit that is NaN, where there is none, stands for 0.
  __device__ __forceinline__ uint16_t code(float label_logit) const {
    const float reference = label_logit == label_logit ? label_logit : 0.0f;
    const float offset = (max - reference) * kLog2E;
    return encode_tile(offset + ptx::log2_approx(sum), offset + 0.5f * ptx::log2_approx(squares));
  }
};

constexpr int kLseFinishThreads = 128;

struct LseFinishArguments {
  LiveRows live;              // R of the n tokens
  const float* partial_lse;   // [splits, R]
  const float* label_logits;  // [n]
  Targets targets;            // [n]
  int64_t ignore_index;
  float* nll;          // [n]
  float* lse;          // [n]
  uint16_t* tile_map;  // [tiles, n] or null
  LogitCodes codes;
  int n, tiles;
};

// Joins the partial log-sum-exps of each token, in their order. An ignored token's loss, lse and codes are 0:
// nobody reads the codes, but an output is to be the same each time. Where logits are kept, the grid has rows
// of blocks for the tiles.
static __global__ void __launch_bounds__(kLseFinishThreads) lse_finish_kernel(LseFinishArguments a) {
  const int index = static_cast<int>(blockIdx.x) * kLseFinishThreads + static_cast<int>(threadIdx.x);
  if (index >= a.n) return;
  if (a.codes.kept() && a.targets[index] == a.ignore_index) {
    for (int tile = static_cast<int>(blockIdx.y); tile < a.tiles; tile += static_cast<int>(gridDim.y)) {
      const int64_t at = static_cast<int64_t>(tile) * a.n + index;
      a.codes.largest()[at] = 0.0f;
      auto* codes = reinterpret_cast<uint4*>(a.codes.codes + at * kTileColumns);
      for (int k = 0; k < kTileColumns / 8; ++k) codes[k] = {0, 0, 0, 0};
    }
  }
  if (blockIdx.y != 0) return;
  const LiveCount live = *a.live.count;
  if (index < live.rows) {
    const int token = a.live.tokens[index];
    MaxSum total = MaxSum::none();
    // Of few tokens there are many: their loads are not to wait for each other.
#pragma unroll 8
    for (int split = 0; split < live.splits; ++split) {
      total.add({a.partial_lse[static_cast<int64_t>(split) * live.rows + index], 1.0f});
    }
    const float lse = total.lse();
    a.lse[token] = lse;
    a.nll[token] = lse - a.label_logits[token];
  }
  if (a.targets[index] == a.ignore_index) {
    a.lse[index] = 0.0f;
    a.nll[index] = 0.0f;
    if (a.tile_map == nullptr) return;
    for (int tile = 0; tile < a.tiles; ++tile) a.tile_map[static_cast<int64_t>(tile) * a.n + index] = 0;
  }
}

}  // namespace cce
