#pragma once

#include "tile/constants.h"

namespace cce {

// A warp computes a token's label logit, so a block of four takes four tokens.
constexpr int kLabelLogitsThreads = 128;
constexpr int kLabelLogitsTokensPerBlock = kLabelLogitsThreads / kWarpLanes;

// Vectors of each row that a lane requests before it uses the first: with 2 KB of each row under way a warp,
// and 16 warps or more on a multiprocessor, latency is hidden at any D.
constexpr int kLabelLogitsInFlight = 4;

constexpr int kLabelLogitsVectorBytes = 16;

}  // namespace cce
