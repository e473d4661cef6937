#pragma once

#include <cstdint>

namespace cce {

// Rows of contiguous elements; stride in elements.
template <typename Element>
struct Rows {
  const Element* data;
  int64_t stride;
  int count;
};

}  // namespace cce
