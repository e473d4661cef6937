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

// The residual masses, which where the visits need them lie there as well.
template <typename Element>
Element* visit_residual(const LceBackwardParams& p, const VisitsScratch& scratch, const VisitLayout& layout) {
  if (!layout.borrows() || !layout.finds_centroids) return static_cast<Element*>(scratch.residual);
  return static_cast<Element*>(p.grad_c) + layout.residual_begin;
}

}  // namespace cce
