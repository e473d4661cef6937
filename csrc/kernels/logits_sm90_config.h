#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/swizzle.h"

namespace cce {

// The Hopper product: a block computes 128 x 256 logits, 64 of D at a time. Two warpgroups consume, each 64
// rows of all 256 columns, the widest wgmma: per 16 of D it reads 10 KB of shared memory, and the tensor
// cores are the slower side. A third warpgroup produces: one thread of it drives the copy engine.
struct LogitsSm90 {
  static constexpr int kRows = 128;
  static constexpr int kColumns = 256;
  static constexpr int kDepth = kRowElements;
  static constexpr int kStages = 4;
  static constexpr int kConsumers = 2;
  static constexpr int kConsumerRows = kRows / kConsumers;
  static constexpr int kWarpgroupThreads = 4 * kWarpLanes;
  static constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / kWarpLanes;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;

  // Bytes of a stage's two parts, where E has so many rows.
  static constexpr int kTileE = kRows * kRowBytes;
  static constexpr int kTileC = kColumns * kRowBytes;

  // Registers of a thread: all begin with a third of the multiprocessor's each; the producer's go to the
  // consumers, who hold 128 sums.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * kFirstRegisters,
                "the consumers would wait for registers for ever");

  // Rows of C that one block of a cluster fetches for all.
  template <int kCluster>
  static constexpr int kColumnsOfBlock = kColumns / kCluster;
};

// Shared memory, from the first multiple of kAlignment: there the swizzle's pattern begins.
struct LogitsSm90Shared {
  static constexpr int kAlignment = 8 * kRowBytes;

  struct Stage {
    unsigned char e[LogitsSm90::kTileE];
    unsigned char c[LogitsSm90::kTileC];
  };
  Stage stages[LogitsSm90::kStages];
  uint64_t full[LogitsSm90::kStages];   // barriers: the bytes of a stage are there
  uint64_t empty[LogitsSm90::kStages];  // barriers: all consumers that read what this block sends are done
};
static_assert(sizeof(LogitsSm90Shared::Stage) % LogitsSm90Shared::kAlignment == 0 &&
                  LogitsSm90::kTileE % LogitsSm90Shared::kAlignment == 0 &&
                  LogitsSm90::kTileC / 2 % LogitsSm90Shared::kAlignment == 0 &&
                  LogitsSm90::kConsumerRows * kRowBytes % LogitsSm90Shared::kAlignment == 0,
              "every operand begins where the pattern does");

// Wherever the block's memory begins.
constexpr int kLogitsSm90SharedBytes =
    LogitsSm90Shared::kAlignment + static_cast<int>(sizeof(LogitsSm90Shared));

}  // namespace cce
