#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "tile/softcap.cuh"

namespace cce {

// What the forward's epilogues read and write, whichever kernel they belong to.
template <typename Element>
struct LseArguments {
  const Element* bias;  // [V] or null
  int64_t bias_stride;
  Softcap softcap;
  const float* label_logits;  // [N]
  __nv_bfloat16* tile_map;    // [V / 128, N] or null
  float* partial_lse;         // [splits, N]
  int n, v;
};

}  // namespace cce
