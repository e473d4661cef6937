#pragma once

#include <cstdint>

#include "kernels/copy_rows.cuh"
#include "kernels/visit_queue.cuh"
#include "kernels/visits_config.h"
#include "tile/gradient_row.cuh"
#include "tile/softcap.cuh"
#include "tile/tile_map.h"
#include "tile/token_score.cuh"

namespace cce {

template <typename Element>
struct VisitsArguments {
  Rows<Element> e;      // [n, d]
  Rows<Element> c;      // [v, d]
  const Element* bias;  // [v] or null
  int64_t bias_stride;
  Softcap softcap;
  int d, stages;
  const GradientRow* rows;   // [n]
  const TokenScore* scores;  // [n], or null: there are none
  const float* nll;          // [n]
  const uint16_t* tile_map;  // [tiles, n]
  const uint32_t* mask;      // [tiles, mask_words(n)]
  const uint32_t* counts;    // [tiles]
  VisitQueueArguments queue;
  VisitRate rate;
  VisitLayout layout;
  // Where the kernel finds the centroids: the mean token, and where they go.
  const Element* mean;      // [d]
  Element* centroids;       // [tiles, d]
  const Element* residual;  // [tiles, residual_stride]: residual masses, scaled
  // Else they are known: each tile's weights, times centroid_weight_scale().
  const Element* weights;  // [tiles, kTileColumns]
  // The control variate of dC: the sum of the tokens by their residual masses, scaled and divided by
  // centroid_weight_scale(), and, where dbias is wanted, the sum of these masses, scaled.
  const Element* residual_e;   // [tiles, d]
  const float* residual_sums;  // [tiles]
  Element* dz;                 // the ring: [buffers, columns of a strip], scaled
  int* tokens;                 // the ring: whose dz it is
  double* corrections;         // [n], added to: of a scan's sums of p
  float* sum_e;                // [n, d], scaled, added to; it may lie in grad_c
  Element* grad_e;             // [n, d]
  Element* grad_c;             // [v, d] contiguous, or null
  Element* grad_bias;          // [v] or null
};

}  // namespace cce
