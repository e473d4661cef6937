#pragma once

#include <cmath>
#include <cstdint>

#include "tile/constants.h"
#include "tile/gradient_row.cuh"
#include "tile/target.cuh"
#include "tile/tile_map.h"

// A scan of 8 bits leaves a tile map and a log-sum-exp. With m the masses that the map says, and S the sums
// of p of 16 bits, relative to the scan's log-sum-exp,
//
//   sum_t m_t + sum over the visited tiles of (S_t - m_t) / q_t
//
// is without bias the sum of all S, by which the log-sum-exp is corrected. Visits are those of the sampled
// backward, the label's tile always among them.
namespace cce {

constexpr int kScanRowsThreads = 128;

struct ScanRowsArguments {
  const float* lse;  // [n], the scan's
  Targets targets;   // [n]
  int64_t ignore_index;
  GradientRow* rows;    // [n]
  double* corrections;  // [n]
  int n;
  int64_t v;
};

// What the visits want to know of each token: all weights are 1.
static __global__ void __launch_bounds__(kScanRowsThreads) scan_rows_kernel(ScanRowsArguments a) {
  const int i = static_cast<int>(blockIdx.x) * kScanRowsThreads + static_cast<int>(threadIdx.x);
  if (i >= a.n) return;
  const int64_t target = a.targets[i];
  const bool ignored = target == a.ignore_index;
  const bool inside = target >= 0 && target < a.v;
  const float weight = ignored ? 0.0f : 1.0f;
  a.rows[i] = {weight, weight, ignored ? INFINITY : a.lse[i] * kLog2E,
               !ignored && inside ? static_cast<int>(target) : -1};
  a.corrections[i] = 0.0;
}

// A block has so many tokens, and looks at their tiles in so many runs.
constexpr int kScanFinishTokens = kWarpLanes;
constexpr int kScanFinishRuns = 16;

struct ScanFinishArguments {
  const GradientRow* rows;    // [n]
  const uint16_t* tile_map;   // [tiles, n]
  const double* corrections;  // [n]
  const float* label_logits;  // [n]
  float* nll;                 // [n], the scan's, and then the corrected one
  float* lse;                 // [n], likewise
  int n, tiles;
};

// The corrected log-sum-exps and losses of the tokens that count.
static __global__ void __launch_bounds__(kScanFinishTokens* kScanFinishRuns)
    scan_finish_kernel(ScanFinishArguments a) {
  __shared__ float parts[kScanFinishRuns][kScanFinishTokens];
  const int lane = static_cast<int>(threadIdx.x) % kScanFinishTokens;
  const int run = static_cast<int>(threadIdx.x) / kScanFinishTokens;
  const int token = static_cast<int>(blockIdx.x) * kScanFinishTokens + lane;
  const bool live = token < a.n && a.rows[token].live();
  float total = 0.0f;
  if (live) {
    const float log2_reference = a.nll[token] * kLog2E;
#pragma unroll 8
    for (int tile = run; tile < a.tiles; tile += kScanFinishRuns) {
      total += tile_mass(decode_tile(a.tile_map[static_cast<int64_t>(tile) * a.n + token], log2_reference));
    }
  }
  parts[run][lane] = total;
  __syncthreads();
  if (run != 0 || !live) return;
  double sum = a.corrections[token];
  for (int other = 0; other < kScanFinishRuns; ++other) sum += static_cast<double>(parts[other][lane]);
  // Draws that leave nothing at all would make the loss infinite. A NaN stays.
  constexpr double kLeast = 0x1p-24;
  const float lse = a.lse[token] + static_cast<float>(log(sum < kLeast ? kLeast : sum));
  a.lse[token] = lse;
  a.nll[token] = lse - a.label_logits[token];
}

}  // namespace cce
