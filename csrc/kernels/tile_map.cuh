#pragma once

#include <cuda_bf16.h>

#include "tile/sampling.h"

// What the forward's tile map says: each tile's largest logit, relative to the token's label logit.
namespace cce {

// The probability with which a token visits a tile that does not hold its label.
__device__ __forceinline__ float probability_of_visit(__nv_bfloat16 map, float nll, float log_rate) {
  return visit_probability(__bfloat162float(map) - nll, log_rate);
}

}  // namespace cce
