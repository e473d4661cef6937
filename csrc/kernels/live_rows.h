#pragma once

#include <cstdint>

#include "tile/schedule.h"

// Which tokens the forward has to look at. Prompts and padding are ignored: the product takes the rows of the
// others alone, from a copy, and only the device knows how many there are.
namespace cce {

// Rows that a unit of the product may read beyond the last. They reach nothing, but what is read is to have
// been written: compute-sanitizer knows no better.
constexpr int kLiveRowsPadding = 256;

struct LiveCount {
  int rows;
  int splits;  // of the columns, as for so many rows alone
};

struct LiveRows {
  const int* tokens;       // [n], of which the first `rows` are those that count, in their order
  const LiveCount* count;  // one; or null: the product is of all rows
};

// What the blocks of a product E C^T do: of all tokens, or of those that count. In shared memory: the
// products take the registers.
struct LogitsWork {
  LogitsSchedule schedule;
  int units;
  bool compact;  // the rows are those of the copy: some tokens do not count

  // of_all: for all n rows; where only the device knows how many count, its row blocks and splits are not
  // used. rows_of_unit: in one of its row blocks.
  __device__ __forceinline__ void find(const LogitsSchedule& of_all, const LiveRows& live, int n,
                                       int rows_of_unit) {
    schedule = of_all;
    compact = false;
    if (live.count != nullptr) {
      const LiveCount count = *live.count;
      schedule.row_blocks = (count.rows + rows_of_unit - 1) / rows_of_unit;
      schedule.splits = count.splits;
      compact = count.rows < n;
    }
    units = schedule.units();
  }
};

}  // namespace cce
