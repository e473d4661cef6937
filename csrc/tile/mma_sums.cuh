#pragma once

namespace cce {

// A warp's part of a product: the sums that a lane holds, by its own rows and columns. This is the layout
// that mma.m16n8k16 and wgmma leave in registers: 16 kTilesM rows by 8 kTilesN columns a warp, of which a
// quad of lanes has two rows in sixteen and a lane two columns in eight. What an epilogue knows of it is
// here, so that sums from another place (tensor memory) need the same members and no other epilogue.
template <int kTilesM, int kTilesN>
struct MmaSums {
  // Of a lane.
  static constexpr int kRows = 2 * kTilesM;
  static constexpr int kColumns = 2 * kTilesN;
  // Of the warp.
  static constexpr int kWarpColumns = 8 * kTilesN;

  float tiles[kTilesM][kTilesN][4];

  // The lane's value at its own row and column, which must be known when the code is compiled.
  __device__ __forceinline__ float& at(int row, int column) {
    return tiles[row / 2][column / 2][row % 2 * 2 + column % 2];
  }
  __device__ __forceinline__ const float& at(int row, int column) const {
    return tiles[row / 2][column / 2][row % 2 * 2 + column % 2];
  }

  // Where the lane's first row and column are in the warp's part, and how far from there its others are.
  __device__ __forceinline__ static int first_row(int lane) { return lane / 4; }
  __device__ __forceinline__ static int first_column(int lane) { return lane % 4 * 2; }
  __device__ __forceinline__ static constexpr int row_offset(int row) {
    return 16 * (row / 2) + 8 * (row % 2);
  }
  __device__ __forceinline__ static constexpr int column_offset(int column) {
    return 8 * (column / 2) + column % 2;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int column = 0; column < kColumns; ++column) at(row, column) = 0.0f;
    }
  }
};

}  // namespace cce
