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

}  // namespace cce
