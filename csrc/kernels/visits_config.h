#pragma once

#include <cstdint>

#include "kernels/visit_items.h"
#include "tile/constants.h"
#include "tile/host_device.h"
#include "tile/sampling.h"
#include "tile/swizzle.h"

// The visits of the sampled method: what the kernels that find, plan and compute them share.
namespace cce {

// ---- Which (token, vocab tile) pairs are visited: a bit each ----

// A block looks at a cell of chains, 128 tokens by 32 tiles, a warp at all tokens of eight tiles.
constexpr int kMaskWarps = 4;
constexpr int kMaskThreads = kMaskWarps * kWarpLanes;
constexpr int kMaskTiles = kChainTiles / kMaskWarps;
constexpr int kMaskBits = 32;

// 32-bit words of one tile's bits.
CCE_HOST_DEVICE constexpr int mask_words(int n) {
  return (n + kChainTokens - 1) / kChainTokens * (kChainTokens / kMaskBits);
}

// ---- The kernel on mma.sync ----

// Half a vocab tile at a time, so that two stages and dz fit the smallest shared memory.
constexpr int kVisitColumns = 128;
constexpr VisitShape kVisitShape = {kVisitColumns, 1, kLeastChunkEntries / kVisitColumns, false};

constexpr int kVisitWarpsM = 2;
constexpr int kVisitWarpsN = 4;
constexpr int kVisitThreads = kVisitWarpsM * kVisitWarpsN * kWarpLanes;
constexpr int kVisitTileBytes = kVisitRows * kRowBytes;  // an operand of a stage: 128 by 64
constexpr int kVisitStageBytes = 2 * kVisitTileBytes;
constexpr int kVisitGradientBytes = 2 * kVisitTileBytes;  // dz, 128 by 128

// What dz of one visiting token needs: dz = weight p - b [column = label], p = 2^(z log2 e - lse2).
struct alignas(16) VisitRow {
  float weight;
  float b;  // where it has a label in the strip; else what p is weighed by, 1 / q
  float lse2;
  int label;  // its column in the strip, or -1; kCentroidRow: dz are the tile's weights instead
};
constexpr int kCentroidRow = -2;

struct VisitQueueShared {
  VisitItem item;
  bool more;
};

// Shared memory: the ring of stages, then this.
struct VisitsShared {
  alignas(128) unsigned char dz[kVisitGradientBytes];  // [2 halves of the strip][128 tokens][64], swizzled
  VisitRow rows[kVisitRows];
  int tokens[kVisitRows];  // -1 past the item's last; n: the control variate's
  uint32_t scan[kVisitThreads / kWarpLanes];
  VisitQueueShared queue;
};

}  // namespace cce
