#pragma once

#include "launch/heuristics.h"
#include "launch/params.h"

namespace cce {

// Hopper's part of launch_lce_forward, on the current device: only in builds with kernels for sm_90a.
template <DType kDType>
const char* launch_lse_sm90(const LceForwardParams& params, const LceForwardPlan& plan, void* stream);

extern template const char* launch_lse_sm90<DType::kFloat16>(const LceForwardParams&, const LceForwardPlan&,
                                                             void*);
extern template const char* launch_lse_sm90<DType::kBFloat16>(const LceForwardParams&, const LceForwardPlan&,
                                                              void*);

}  // namespace cce
