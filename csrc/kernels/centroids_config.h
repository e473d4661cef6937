#pragma once

#include "tile/constants.h"
#include "tile/host_device.h"

namespace cce {

// Runs of tokens, whose sums are taken by themselves and then joined to the mean token's.
constexpr int kMeanSplits = 64;

constexpr int kCentroidThreads = 256;
constexpr int kCentroidWarps = kCentroidThreads / kWarpLanes;
// Rows of C in shared memory at a time, in bytes: as many as leave two blocks a multiprocessor on most GPUs,
// of which one computes while the other's rows arrive.
constexpr int kCentroidStageBytes = 80 * 1024;
// Shared memory besides: a logit and a weight for each column of a tile.
constexpr int kCentroidStaticBytes = 2 * kTileColumns * 4;

// The block's shared memory: the tile's weighted sum, and a group of rows.
CCE_HOST_DEVICE constexpr int centroid_sums_bytes(int d) { return d * static_cast<int>(sizeof(float)); }
CCE_HOST_DEVICE constexpr int centroid_shared_bytes(int d, int group) {
  return centroid_sums_bytes(d) + group * d * 2;
}

// Rows at a time where a block may have so many bytes: whole rounds of the warps if possible.
inline int centroid_group(int d, int shared_bytes) {
  const int limit = shared_bytes - centroid_sums_bytes(d);
  const int fit = (limit < kCentroidStageBytes ? limit : kCentroidStageBytes) / (2 * d);
  if (fit <= 0) return 0;
  if (fit < kCentroidWarps) return fit;
  return fit < kTileColumns ? fit / kCentroidWarps * kCentroidWarps : kTileColumns;
}

}  // namespace cce
