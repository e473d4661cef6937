#pragma once

#include "tile/constants.h"

namespace cce {

constexpr int kPairThreads = 128;
constexpr int kPairVectorBytes = 16;

// Blocks that a multiprocessor has room for at least. Left to itself ptxas spills to have more.
constexpr int kPairBlocks = 4;

// Labels of a token whose logits a warp computes at a time: a row of e is read once for them.
constexpr int kPairLabels = 4;

// Rows that a thread requests before it uses the first.
constexpr int kPairInFlight = 4;

// The pairs sorted by label are cut into at most so many segments, of at least so many pairs: enough blocks
// for every GPU, and few enough that what they leave at their edges, two rows of sums each, stays small (17
// MB at a width of 4096).
constexpr int kPairSegments = 512;
constexpr int kPairSegmentLeast = 16;

}  // namespace cce
