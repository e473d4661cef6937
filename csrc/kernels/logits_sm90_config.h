#pragma once

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

  // Bytes of a stage.
  static constexpr int kTileE = kRows * kRowBytes;
  static constexpr int kTileC = kColumns * kRowBytes;
  static constexpr int kStageBytes = kTileE + kTileC;

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

// Offsets in shared memory, from the first multiple of 1024: there the swizzle's pattern begins.
struct LogitsSm90Memory {
  static constexpr int kAlignment = 8 * kRowBytes;
  static constexpr int kStages = 0;
  static constexpr int kFull = kStages + LogitsSm90::kStages * LogitsSm90::kStageBytes;  // a barrier a stage
  static constexpr int kEmpty = kFull + LogitsSm90::kStages * 8;                         // a barrier a stage
  static constexpr int kEnd = kEmpty + LogitsSm90::kStages * 8;
  static constexpr int kBytes = kAlignment + kEnd;  // wherever the block's memory begins
  static_assert(LogitsSm90::kStageBytes % kAlignment == 0 && LogitsSm90::kTileE % kAlignment == 0 &&
                    LogitsSm90::kTileC / 2 % kAlignment == 0 &&
                    LogitsSm90::kConsumerRows * kRowBytes % kAlignment == 0,
                "every operand begins where the pattern does");
};

// To be measured: how many of eight columns' exponentials are taken by a polynomial instead of the special
// function unit, and whether L2 is told to keep E and to let C go.
constexpr int kSm90PolynomialEighths = 0;
constexpr bool kSm90CacheHints = false;

}  // namespace cce
