#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/host_device.h"
#include "tile/sampling.h"
#include "tile/swizzle.h"

// The visits of the sampled method: what the kernels that find, plan and compute them share.
namespace cce {

// ---- Which (token, vocab tile) pairs are visited: a bit each ----

// A block of eight warps looks at 1024 tokens by 32 tiles, a warp at one cell of chains.
constexpr int kMaskThreads = 256;
constexpr int kMaskTokens = kMaskThreads / kWarpLanes * kChainTokens;
constexpr int kMaskBits = 32;

// 32-bit words of one tile's bits.
CCE_HOST_DEVICE constexpr int mask_words(int n) {
  return (n + kChainTokens - 1) / kChainTokens * (kChainTokens / kMaskBits);
}

// ---- The plan: items of work, and stages of items that others wait for ----

// Visiting tokens that one item takes to a vocab tile.
constexpr int kVisitRows = 128;
// Columns of D that a slice of an item's second product has.
constexpr int kVisitSlice = 128;
// Stages of 64 visits and one slice that an item of dC should have, so that its start and end do not show.
constexpr int kVisitItemStages = 48;
constexpr int kPlanThreads = 512;

enum class VisitWork : uint32_t {
  kVisits,      // the part-th kVisitRows of the tile's visits: their dz for dC, and their dE
  kVisitsOfC,   // the same without their dE
  kVisitsOfE,   // the same for dE only
  kClassifier,  // the tile's dC, in the part-th slices_per_item() of D
  kRound,       // dE of the part-th kRoundRows tokens, from its sums
};

// Chunk k of the visits has two stages of items, its dz and its dC. What adds to dE is a stage too.
constexpr int kStageOfE = 0;
constexpr int kStageOfRounding = 1;
CCE_HOST_DEVICE constexpr int stage_of_dz(int chunk) { return 2 + 2 * chunk; }
CCE_HOST_DEVICE constexpr int stage_of_dc(int chunk) { return 3 + 2 * chunk; }
// Buffers of the ring that the chunks' dz take in turns. With three the dz of a chunk is done while that of
// the next is computed, before its dC is wanted.
constexpr int kVisitBuffers = 3;
constexpr int kNoStage = -1;

struct VisitItem {
  int tile;
  VisitWork work : 3;
  uint32_t part : 29;
  uint32_t first_row;  // of the tile's dz in the scratch ring
  int stage;           // that it is of
  int needs[2];        // stages that must be done before, or kNoStage
};

// Tokens of an item that rounds dE.
constexpr int kRoundRows = 64;

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
};

// ---- The kernel ----

constexpr int kVisitWarpsM = 2;
constexpr int kVisitWarpsN = 4;
constexpr int kVisitThreads = kVisitWarpsM * kVisitWarpsN * kWarpLanes;
constexpr int kVisitTileBytes = kVisitRows * kRowBytes;  // an operand of a stage: 128 by 64
constexpr int kVisitStageBytes = 2 * kVisitTileBytes;
constexpr int kVisitGradientBytes = 2 * kVisitTileBytes;  // dz, 128 by 128

}  // namespace cce
