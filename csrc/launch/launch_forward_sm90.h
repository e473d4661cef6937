#pragma once

#include "launch/heuristics.h"
#include "launch/launch_error.h"
#include "launch/params.h"

namespace cce {

// Hopper's part of launch_lce_forward, on the current device: only in builds with kernels for sm_90a.
LaunchError launch_lse_sm90(const LceForwardParams& params, const LceForwardPlan& plan, void* stream);

}  // namespace cce
