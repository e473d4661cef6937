#pragma once

#include <cstdint>

#include "tile/constants.h"

namespace cce {

// A block of eight warps computes 128 x 256 logits, a warp 64 x 64 of them: per 16 of D it reads 4 KB of
// shared memory for 64 products of 16x16 by 16x8, which leaves the tensor cores the slower side. One block a
// multiprocessor: 128 sums and 64 operand registers a thread.
constexpr int kLogitsRows = 128;
constexpr int kLogitsColumns = 256;
constexpr int kLogitsDepth = 64;
constexpr int kLogitsWarpsM = 2;
constexpr int kLogitsWarpsN = 4;
constexpr int kLogitsThreads = kLogitsWarpsM * kLogitsWarpsN * kWarpLanes;
constexpr int kLogitsTileE = kLogitsRows * kLogitsDepth * 2;  // bytes
constexpr int kLogitsTileC = kLogitsColumns * kLogitsDepth * 2;
constexpr int kLogitsStageBytes = kLogitsTileE + kLogitsTileC;

// What an epilogue may keep in shared memory: eight bytes a row.
constexpr int kLogitsStateBytes = kLogitsRows * 8;

constexpr int logits_shared_bytes(int stages) { return stages * kLogitsStageBytes + kLogitsStateBytes; }

}  // namespace cce
