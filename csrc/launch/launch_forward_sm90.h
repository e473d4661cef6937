#pragma once

#include "launch/heuristics.h"
#include "launch/launch_error.h"
#include "launch/params.h"

namespace cce {

// Hopper's part of launch_lce_forward, on the current device: only in builds with kernels for sm_90a.
LaunchError launch_lse_sm90(const LceForwardParams& params, const LceForwardPlan& plan, void* stream);

// The same by a scan of 8 bits, whose scratch memory the parameters have.
LaunchError launch_scan_sm90(const LceForwardParams& params, const LceForwardPlan& plan, void* stream);

}  // namespace cce
