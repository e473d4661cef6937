#pragma once

#include "launch/heuristics.h"
#include "launch/launch_error.h"

namespace cce {

template <typename Element>
struct VisitsArguments;

// Hopper's part of launch_visits, on the current device: only in builds with kernels for sm_90a.
template <typename Element>
LaunchError launch_visits_sm90(const VisitsArguments<Element>& arguments, const VisitsPlan& plan,
                               void* stream);

}  // namespace cce
