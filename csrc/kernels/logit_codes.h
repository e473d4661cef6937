#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/host_device.h"

namespace cce {

// 16-bit words that one token has in one vocab tile: its codes, and the largest logit.
constexpr int kCodeWords = kTileColumns + 2;

// Codes [tiles, n, 256], then the largest logits [tiles, n]: together [tiles, n, kCodeWords] words.
struct LogitCodes {
  uint16_t* codes;  // null: none are kept
  int64_t rows;     // tiles n

  CCE_HOST_DEVICE bool kept() const { return codes != nullptr; }
  CCE_HOST_DEVICE float* largest() const { return reinterpret_cast<float*>(codes + rows * kTileColumns); }
};

}  // namespace cce
