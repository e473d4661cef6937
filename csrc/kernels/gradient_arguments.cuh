#pragma once

#include <cstdint>

#include "tile/gradient_row.cuh"
#include "tile/softcap.cuh"

namespace cce {

// What the epilogues that write dz read and write, whichever kernel they belong to. dz of a chunk of the
// vocabulary, whose columns count from its first.
template <typename Element>
struct GradientArguments {
  const Element* bias;  // of the chunk, or null
  int64_t bias_stride;
  Softcap softcap;
  const GradientRow* rows;  // [n]
  const uint32_t* largest;
  // The least |p - onehot| for which a filter keeps a block, or 0: all are; log2 of it and of 1 - it.
  float threshold, log2_threshold, log2_rest;
  Element* dz;  // [n, stride], scaled
  int64_t stride;
  int n;
  int first_column, columns;  // of the chunk
};

}  // namespace cce
