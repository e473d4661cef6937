#pragma once

#include <cmath>
#include <cstdint>

#include "tile/constants.h"
#include "tile/gradient_row.cuh"
#include "tile/target.cuh"

namespace cce {

constexpr int kGradientRowsThreads = 128;

struct GradientRowsArguments {
  const float* g_nll;  // [n] or null, stride in elements (0: one value for all)
  const float* g_lse;
  int64_t g_nll_stride, g_lse_stride;
  const float* nll;  // [n]
  const float* lse;  // [n]
  Targets targets;   // [n]
  int64_t ignore_index;
  GradientRow* rows;  // [n]
  uint32_t* largest;  // 0 before: the bits of the largest finite |a| or |b|
  int n;
  int64_t v;
};

// The gradients of nll and lse as the weights a and b of each token. What flows into an ignored token may be
// anything, NaN as well: it is masked, not multiplied.
static __global__ void __launch_bounds__(kGradientRowsThreads)
    gradient_rows_kernel(GradientRowsArguments args) {
  const int i = static_cast<int>(blockIdx.x) * kGradientRowsThreads + static_cast<int>(threadIdx.x);
  float magnitude = 0.0f;
  if (i < args.n) {
    const int64_t target = args.targets[i];
    const bool ignored = target == args.ignore_index;
    const bool inside = target >= 0 && target < args.v;
    GradientRow row;
    row.b = ignored || args.g_nll == nullptr ? 0.0f : args.g_nll[i * args.g_nll_stride];
    row.a = row.b + (ignored || args.g_lse == nullptr ? 0.0f : args.g_lse[i * args.g_lse_stride]);
    if (!ignored && !inside) row.a = NAN;
    row.lse2 = ignored ? INFINITY : args.lse[i] * kLog2E;
    row.label = !ignored && inside ? static_cast<int>(target) : -1;
    args.rows[i] = row;
    magnitude = fmaxf(fabsf(row.a), fabsf(row.b));
    if (!isfinite(magnitude)) magnitude = 0.0f;
  }
  // Bits of floats that are not negative are in the floats' order.
  const uint32_t largest = __reduce_max_sync(0xffffffffu, __float_as_uint(magnitude));
  if (threadIdx.x % kWarpLanes == 0 && largest != 0) atomicMax(args.largest, largest);
}

}  // namespace cce
