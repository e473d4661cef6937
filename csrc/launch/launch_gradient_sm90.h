#pragma once

#include "launch/heuristics.h"
#include "launch/launch_error.h"
#include "launch/params.h"

namespace cce {

template <typename Element>
struct GradientArguments;

// Hopper's part of launch_exact_backward, dz of a chunk, on the current device: only in builds with kernels
// for sm_90a.
template <typename Element>
LaunchError launch_gradient_sm90(const LossInputs& in, const LogitsPlan& plan,
                                 const GradientArguments<Element>& arguments, void* stream);

}  // namespace cce
