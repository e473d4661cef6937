#pragma once

#include <cstdint>

#include "tile/host_device.h"

// How a persistent grid walks over an [N, V] product. Pure C++: tested without a GPU.
namespace cce {

// Row blocks that are taken together while the columns pass by: their part of e stays in L2.
constexpr int kScheduleGroup = 16;

// A run of column blocks of one row block.
struct LogitsUnit {
  int row_block;
  int first_column_block, end_column_block;
  int split;
};

// Units of one split in neighbouring row blocks follow each other, so that blocks that run side by side read
// the same columns at about the same time.
struct LogitsSchedule {
  int row_blocks, column_blocks;
  int splits;  // runs that the column blocks are cut into
  int group;   // row blocks that are taken together

  CCE_HOST_DEVICE int units() const { return row_blocks * splits; }

  CCE_HOST_DEVICE LogitsUnit unit(int index) const {
    const int round = index / (group * splits);
    const int first_row = round * group;
    const int left = row_blocks - first_row;
    const int rows = left < group ? left : group;
    const int within = index - first_row * splits;
    const int split = within / rows;
    LogitsUnit unit;
    unit.row_block = first_row + within % rows;
    unit.split = split;
    unit.first_column_block = column(split);
    unit.end_column_block = column(split + 1);
    return unit;
  }

 private:
  CCE_HOST_DEVICE int column(int split) const {
    return static_cast<int>(static_cast<int64_t>(column_blocks) * split / splits);
  }
};

// ---- How many runs the forward cuts the columns into ----

// Partial log-sum-exps may take 1.5 MB, or one run of columns a token.
constexpr int64_t kMaxPartials = int64_t{3} << 17;

CCE_HOST_DEVICE constexpr int most_splits(int column_blocks, int64_t rows) {
  const int64_t most = kMaxPartials / rows;
  return most < 1 ? (column_blocks < 1 ? column_blocks : 1)
                  : static_cast<int>(most < column_blocks ? most : column_blocks);
}

// The time of all waves, in tenths of a block of columns. A unit takes one of them besides its columns: its
// row block's first stages come from further away. `slots` units run at a time.
CCE_HOST_DEVICE constexpr int64_t split_time(int64_t row_blocks, int column_blocks, int slots, int splits) {
  const int64_t waves = (row_blocks * splits + slots - 1) / slots;
  return waves * (10 * ((column_blocks + splits - 1) / splits) + 1);
}

// The units of a product of which only the device knows how many rows count. What they are depends on nothing
// but these rows: on the same rows alone, every sum would be the same.
struct ForwardSplits {
  int column_blocks;
  int multiprocessors;
  int block_rows;
  bool pairs;  // from two blocks of rows on, two of them make a unit's rows

  CCE_HOST_DEVICE constexpr int cluster(int64_t rows) const { return pairs && rows > block_rows ? 2 : 1; }
  CCE_HOST_DEVICE constexpr int slots(int64_t rows) const { return multiprocessors / cluster(rows); }
  CCE_HOST_DEVICE constexpr int64_t row_blocks(int64_t rows) const {
    const int64_t unit = int64_t{block_rows} * cluster(rows);
    return (rows + unit - 1) / unit;
  }
  CCE_HOST_DEVICE constexpr int most(int64_t rows) const {
    return rows < 1 ? 0 : most_splits(column_blocks, rows);
  }
  CCE_HOST_DEVICE constexpr int64_t time(int64_t rows, int splits) const {
    return split_time(row_blocks(rows), column_blocks, slots(rows), splits);
  }
};

}  // namespace cce
