#pragma once

#include <cmath>
#include <cstdint>

#include "tile/constants.h"
#include "tile/gradient_row.cuh"
#include "tile/target.cuh"
#include "tile/token_score.cuh"

namespace cce {

constexpr int kGradientRowsThreads = 128;

struct GradientRowsArguments {
  const float* g_nll;  // [n] or null, stride in elements (0: one value for all)
  const float* g_lse;
  int64_t g_nll_stride, g_lse_stride;
  const float* count;  // one, by which g_nll is divided, or null
  const float* nll;    // [n]
  const float* lse;    // [n]
  Targets targets;     // [n]
  int64_t ignore_index;
  const float* g_entropy;  // [n] or null
  int64_t g_entropy_stride;
  const float* entropy;  // [n]
  const float* scale;    // [n] or null
  GradientRow* rows;     // [n]
  TokenScore* scores;    // [n] or null
  uint32_t* largest;     // of what is zeroed: the bits of the largest finite weight
  uint32_t* zeroed;      // zeros before the kernel, or made so by its one block
  int64_t zeroed_words;
  int n;
  int64_t v;
};

// What the entropy's gradient and the scale make of a token: its row's weights become those of TokenScore.
// Returns a bound of |dz| before visits weigh it.
__device__ __forceinline__ float score_token(const GradientRowsArguments& args, int i, bool ignored,
                                             GradientRow& row) {
  constexpr float kInverseE = 0.36787944f;
  const float scale = args.scale == nullptr ? 1.0f : args.scale[i];
  const float h = ignored || args.g_entropy == nullptr ? 0.0f : args.g_entropy[i * args.g_entropy_stride];
  const float entropy = h == 0.0f ? 0.0f : args.entropy[i];
  // Step by step, as in sampling.py: both are to name the same visits.
  const float bound = __fadd_rn(fabsf(row.a), __fmul_rn(fabsf(h), 2.0f * entropy + kInverseE));
  TokenScore score;
  score.scale2 = scale * kLog2E;
  score.h = h * kLn2 * scale;
  score.entropy = entropy;
  const bool known = bound > 0.0f && static_cast<bool>(isfinite(bound));
  score.even = known ? __fdiv_rn(__fadd_rn(fabsf(row.a), __fmul_rn(fabsf(h), kInverseE)), bound) : 1.0f;
  score.steep = known ? __fdiv_rn(fabsf(h), bound) : 0.0f;
  args.scores[i] = score;
  const bool live = row.live() || h != 0.0f;
  row.a = (row.a - h * entropy) * scale;
  row.b *= scale;
  // A row is live by its weights. This one adds nothing that a result could show.
  constexpr float kLeast = 0x1p-126f;
  if (live && !row.live()) row.a = kLeast;
  return fmaxf(bound * scale, fabsf(row.b));
}

// The gradients of nll and lse as the weights a and b of each token. What flows into an ignored token may be
// anything, NaN as well: it is masked, not multiplied.
static __global__ void __launch_bounds__(kGradientRowsThreads)
    gradient_rows_kernel(GradientRowsArguments args) {
  const int i = static_cast<int>(blockIdx.x) * kGradientRowsThreads + static_cast<int>(threadIdx.x);
  if (gridDim.x == 1) {
    for (int64_t k = threadIdx.x; k < args.zeroed_words; k += kGradientRowsThreads) args.zeroed[k] = 0;
    __syncthreads();
  }
  float magnitude = 0.0f;
  if (i < args.n) {
    const int64_t target = args.targets[i];
    const bool ignored = target == args.ignore_index;
    const bool inside = target >= 0 && target < args.v;
    GradientRow row;
    row.b = ignored || args.g_nll == nullptr ? 0.0f : args.g_nll[i * args.g_nll_stride];
    if (!ignored && args.count != nullptr) row.b = __fdiv_rn(row.b, *args.count);
    row.a = row.b + (ignored || args.g_lse == nullptr ? 0.0f : args.g_lse[i * args.g_lse_stride]);
    if (!ignored && !inside) row.a = NAN;
    row.lse2 = ignored ? INFINITY : args.lse[i] * kLog2E;
    row.label = !ignored && inside ? static_cast<int>(target) : -1;
    magnitude = fmaxf(fabsf(row.a), fabsf(row.b));
    if (args.scores != nullptr) magnitude = score_token(args, i, ignored, row);
    args.rows[i] = row;
    if (!isfinite(magnitude)) magnitude = 0.0f;
  }
  // Bits of floats that are not negative are in the floats' order.
  const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(magnitude));
  if (threadIdx.x % kWarpLanes == 0 && largest != 0) atomicMax(args.largest, largest);
}

}  // namespace cce
