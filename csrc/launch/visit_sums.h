#pragma once

#include "kernels/visit_items.h"
#include "launch/params.h"

namespace cce {

// Where dE's sums lie: in memory of their own, or in rows of dC that are written last.
template <typename Element>
float* visit_sums(const LceBackwardParams& p, const VisitLayout& layout) {
  if (!layout.borrows()) return p.sum_e;
  return reinterpret_cast<float*>(static_cast<Element*>(p.grad_c) + layout.sums_begin);
}

}  // namespace cce
