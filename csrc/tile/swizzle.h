#pragma once

#include "tile/host_device.h"

// How a tile of 16-bit elements lies in shared memory: rows of 64 elements, each of eight 16-byte chunks.
namespace cce {

constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;
constexpr int kRowElements = 64;
constexpr int kRowBytes = 128;

// Byte offset of a chunk. A row covers all 32 banks, so chunk c of eight neighbouring rows would share four
// of them; with the row's number folded in, eight rows of one chunk, which is what ldmatrix reads, take them
// all.
CCE_HOST_DEVICE constexpr int swizzled_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

}  // namespace cce
