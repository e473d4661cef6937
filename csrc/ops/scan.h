#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "launch/launch.h"
#include "ops/cuda_scope.h"

namespace cce {

// Corrects params.nll and params.lse, which a scan of 8 bits has left there, by the visits that the seed
// draws from params.tile_map. e: what allocates.
void correct_scan(const char* op, const LceForwardParams& params, const int64_t* seed, double eps,
                  const torch::stable::Tensor& e, const CudaScope& scope);

}  // namespace cce
