#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/pairs_config.h"
#include "tile/element.cuh"
#include "tile/target.cuh"
#include "tile/warp.cuh"

namespace cce {

// Strides are in elements. With softcap 0 there is none.
template <typename Element, typename Accumulator>
struct PairLogitsArguments {
  const Element* e;     // [n, d]
  const Element* c;     // [v, d]
  const Element* bias;  // [v], or null
  Targets targets;      // [n k]
  Accumulator* out;     // [n k]
  int64_t n, k, d, v;
  int64_t e_row_stride, c_row_stride, bias_stride;
  int64_t ignore_index;
  Accumulator softcap;
};

// out[i, j] = e[i] . c[targets[i, j]] + bias[targets[i, j]], capped; 0 for an ignored label, NaN for one
// outside [0, v). A warp takes a token and kPairLabels of its labels: their rows of c are under way at once,
// and the token's row of e, which its neighbours read as well, comes from L1. What is ignored is not read.
template <typename Element, typename Accumulator, int kCount>
__global__ void __launch_bounds__(kPairThreads, kPairBlocks)
    pair_logits_kernel(PairLogitsArguments<Element, Accumulator> a) {
  using Load = Vector<Element, kCount>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  constexpr int kWarps = kPairThreads / kWarpLanes;
  const int64_t groups = (a.k + kPairLabels - 1) / kPairLabels;
  const int64_t vectors = a.d / kCount;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
       item < a.n * groups; item += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t token = item / groups;
    const int first = static_cast<int>(item % groups) * kPairLabels;
    const Element* e = a.e + token * a.e_row_stride;
    int64_t labels[kPairLabels];
    const Element* rows[kPairLabels];  // null for what is not read
    bool any = false;
#pragma unroll
    for (int j = 0; j < kPairLabels; ++j) {
      labels[j] = first + j < a.k ? a.targets[token * a.k + first + j] : a.ignore_index;
      const bool valid = labels[j] != a.ignore_index && labels[j] >= 0 && labels[j] < a.v;
      rows[j] = valid ? a.c + labels[j] * a.c_row_stride : nullptr;
      any = any || valid;
    }
    Accumulator sums[kPairLabels] = {};
    if (any) {
#pragma unroll 2
      for (int64_t at = lane; at < vectors; at += kWarpLanes) {
        const Load x = Load::load_kept(e + at * kCount);
        Load ys[kPairLabels];
#pragma unroll
        for (int j = 0; j < kPairLabels; ++j) {
          ys[j] = rows[j] != nullptr ? Load::load(rows[j] + at * kCount) : Load::zero();
        }
#pragma unroll
        for (int j = 0; j < kPairLabels; ++j) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            sums[j] = fma(widen<Accumulator>(x.values[i]), widen<Accumulator>(ys[j].values[i]), sums[j]);
          }
        }
      }
      for (int64_t at = vectors * kCount + lane; at < a.d; at += kWarpLanes) {
#pragma unroll
        for (int j = 0; j < kPairLabels; ++j) {
          if (rows[j] == nullptr) continue;
          sums[j] = fma(widen<Accumulator>(e[at]), widen<Accumulator>(rows[j][at]), sums[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kPairLabels; ++j) {
      Accumulator z = warp_sum(sums[j]);
      if (rows[j] == nullptr) {
        z = labels[j] == a.ignore_index ? Accumulator(0) : static_cast<Accumulator>(NAN);
      } else {
        if (a.bias != nullptr) z += widen<Accumulator>(a.bias[labels[j] * a.bias_stride]);
        if (a.softcap != Accumulator(0)) z = a.softcap * tanh(z / a.softcap);
      }
      if (lane == j && first + j < a.k) a.out[token * a.k + first + j] = z;
    }
  }
}

}  // namespace cce
