#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/host_device.h"
#include "tile/swizzle.h"

// The visits of the sampled and the threshold method: what the kernels that find, plan and compute them
// share.
namespace cce {

// ---- Which (token, vocab tile) pairs are visited: a bit each ----

// A block of eight warps looks at 1024 tokens by 32 tiles, a warp at 128 tokens: the filter's block of rows.
constexpr int kFilterRows = 128;
constexpr int kMaskThreads = 256;
constexpr int kMaskTokens = kMaskThreads / kWarpLanes * kFilterRows;
constexpr int kMaskTiles = 32;
constexpr int kMaskBits = 32;

// 32-bit words of one tile's bits.
CCE_HOST_DEVICE constexpr int mask_words(int n) {
  return (n + kFilterRows - 1) / kFilterRows * (kFilterRows / kMaskBits);
}

// ---- The plan: items of work, in an order in which each needs only earlier ones ----

// Visiting tokens that one item takes to a vocab tile.
constexpr int kVisitRows = 128;
// Columns of D that a slice of an item's second product has.
constexpr int kVisitSlice = 128;
// Stages of 64 visits and one slice that an item of dC should have, so that its start and end do not show.
constexpr int kVisitItemStages = 48;
constexpr int kPlanThreads = 512;

// part >= 0: the part-th kVisitRows of the tile's visits: their dz, and from it their dE. part < 0: the
// tile's dC in slices [first, end) of D, see visit_slices.
struct VisitItem {
  int tile;
  int part;
  uint32_t first_row;  // of the tile's dz in the scratch ring
  uint32_t ready;      // items that must be done before this one: always earlier ones
};

// Slices in each of a tile's items of dC.
CCE_HOST_DEVICE constexpr int slices_per_item(int visits, int slices) {
  const int stages = visits <= 64 ? 1 : (visits + 63) / 64;
  const int most = kVisitItemStages / stages;
  return most < 1 ? 1 : most < slices ? most : slices;
}

// Zeroed before each backward.
struct VisitControl {
  uint32_t largest;  // bits of the largest |a| or |b|
  uint32_t items;
  uint32_t taken;
  uint32_t done;
};

// ---- The kernel ----

constexpr int kVisitWarpsM = 2;
constexpr int kVisitWarpsN = 4;
constexpr int kVisitThreads = kVisitWarpsM * kVisitWarpsN * kWarpLanes;
constexpr int kVisitTileBytes = kVisitRows * kRowBytes;  // an operand of a stage: 128 by 64
constexpr int kVisitStageBytes = 2 * kVisitTileBytes;
constexpr int kVisitGradientBytes = 2 * kVisitTileBytes;  // dz, 128 by 128

}  // namespace cce
