#pragma once

#include <cstdint>

#include "tile/host_device.h"

// How many runs the forward cuts the columns into. Only the device knows how many tokens count, so that it is
// the one to choose; pure C++ all the same: tested without a GPU.
namespace cce {

// Partial log-sum-exps may take 1.5 MB, or one run of columns a token.
constexpr int64_t kMaxPartials = int64_t{3} << 17;

// Runs of columns where nothing may depend on the other tokens: enough for a few tokens to have half of a
// large GPU, few enough for the partial sums of many.
constexpr int kInvariantSplits = 64;

// What is chosen depends on nothing but the rows that count: for the same rows alone it is the same, and
// every sum has the same order.
struct ForwardSplits {
  int column_blocks;
  int multiprocessors;
  int block_rows;
  bool pairs;  // from two blocks of rows on, two of them make a unit's rows
  int fixed;   // runs, whatever the rows; 0: the best for them

  CCE_HOST_DEVICE constexpr int cluster(int64_t rows) const { return pairs && rows > block_rows ? 2 : 1; }
  CCE_HOST_DEVICE constexpr int64_t row_blocks(int64_t rows) const {
    const int64_t unit = int64_t{block_rows} * cluster(rows);
    return (rows + unit - 1) / unit;
  }
  CCE_HOST_DEVICE constexpr int most(int64_t rows) const {
    if (rows < 1) return 0;
    if (fixed != 0) return fixed;
    const int64_t partials = kMaxPartials / rows < 1 ? 1 : kMaxPartials / rows;
    return static_cast<int>(partials < column_blocks ? partials : column_blocks);
  }
  CCE_HOST_DEVICE constexpr int least() const { return fixed != 0 ? fixed : 1; }
  // The time of all waves, in tenths of a block of columns. A unit takes one of them besides its columns: its
  // row block's first stages come from further away.
  CCE_HOST_DEVICE constexpr int64_t time(int64_t rows, int splits) const {
    const int slots = multiprocessors / cluster(rows);
    const int64_t waves = (row_blocks(rows) * splits + slots - 1) / slots;
    return waves * (10 * ((column_blocks + splits - 1) / splits) + 1);
  }
  // The least time, and among equals the fewest runs: as one number, of which the least is best. The time has
  // 40 bits, which takes 2^36 blocks of rows and columns a multiprocessor.
  CCE_HOST_DEVICE constexpr uint64_t rank(int64_t rows, int splits) const {
    return static_cast<uint64_t>(time(rows, splits)) << 24 | static_cast<uint64_t>(splits);
  }
  // The runs for so many rows, 0 for none. On the host: a GPU's block of threads shares the search.
  constexpr int best(int64_t rows) const {
    uint64_t found = UINT64_MAX;
    for (int splits = least(); splits <= most(rows); ++splits) {
      found = rank(rows, splits) < found ? rank(rows, splits) : found;
    }
    return most(rows) == 0 ? 0 : splits_of(found);
  }
  CCE_HOST_DEVICE static constexpr int splits_of(uint64_t rank) { return static_cast<int>(rank & 0xffffff); }
};

}  // namespace cce
