#pragma once

#include <cstdint>

#include "kernels/logits_sm90_config.h"
#include "kernels/visits_config.h"

namespace cce {

// The visits on wgmma: a strip is a whole vocab tile. The ring of stages is the forward's: 128 rows of E and
// 256 of C, 64 of D; for dC its halves are 64 visits of dz and the same tokens' rows in 128 of D.
struct VisitsSm90 {
  static constexpr VisitShape kShape = {kTileColumns, 16, kLeastChunkEntries / kTileColumns, true};
  // Columns of D that a stage of dE has.
  static constexpr int kSlice = kRowElements;
  // Roles: two warpgroups of consumers, then three warps that load and one that looks for work ahead of all.
  static constexpr int kConsumerThreads = LogitsSm90::kConsumers * LogitsSm90::kWarpgroupThreads;
  static constexpr int kLoaderWarps = 3;
  static constexpr int kLoaderThreads = kLoaderWarps * kWarpLanes;
  static constexpr int kFirstLoaderWarp = kConsumerThreads / kWarpLanes;
  static constexpr int kScoutWarp = kFirstLoaderWarp + kLoaderWarps;
  static constexpr int kThreads = LogitsSm90::kThreads;
  static constexpr int kSlots = 2;  // items that a block holds: one is worked on, the other is ready

  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static_assert(kProducerRegisters + LogitsSm90::kConsumers * kConsumerRegisters <=
                    (LogitsSm90::kConsumers + 1) * LogitsSm90::kFirstRegisters,
                "the consumers would wait for registers for ever");
};

// What dz of one visiting token needs where there are scores: as LogitScore, h weighed.
struct VisitScore {
  float scale2, h;
};

// An item that the scout has found, with all that the others need to know.
template <typename Element>
struct VisitSlot {
  VisitItem item;
  bool more;   // false: there are no more items
  int rows;    // of an item of dz: its tokens and the control variate's row; of dC: the strip's
  int visits;  // of an item of dz: its tokens
  VisitRow row[kVisitRows];
  VisitScore score[kVisitRows];  // where there are scores
  int token[kVisitRows];
  const Element* e[kVisitRows];  // of each row, its tokens' and the mean token's
};

template <typename Element>
struct VisitsSm90Shared {
  LogitsSm90Shared ring;
  VisitSlot<Element> slots[VisitsSm90::kSlots];
  uint64_t found[VisitsSm90::kSlots];  // barriers: the scout has filled the slot
  uint64_t done[VisitsSm90::kSlots];   // barriers: loader and consumers need it no more
};

// Whatever the element.
constexpr int kVisitsSm90SharedBytes =
    LogitsSm90Shared::kAlignment + static_cast<int>(sizeof(VisitsSm90Shared<uint16_t>));

}  // namespace cce
