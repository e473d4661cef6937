#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/logits_sm80.cuh"
#include "kernels/visit_queue.cuh"
#include "kernels/visits_config.h"
#include "tile/gradient_row.cuh"
#include "tile/softcap.cuh"

namespace cce {

template <typename Element>
struct VisitsArguments {
  Rows<Element> e;      // [n, d]
  Rows<Element> c;      // [v, d]
  const Element* bias;  // [v] or null
  int64_t bias_stride;
  Softcap softcap;
  int d, stages;
  const GradientRow* rows;        // [n]
  const float* nll;               // [n]
  const __nv_bfloat16* tile_map;  // [tiles, n]
  const uint32_t* mask;           // [tiles, mask_words(n)]
  const uint32_t* counts;         // [tiles]
  VisitQueueArguments queue;
  float log_rate;      // log(1/eps - 1)
  Element* dz;         // the ring: [buffers, 128], scaled
  int* tokens;         // the ring: whose dz it is
  float* sum_e;        // [n, d], scaled, added to; it may lie in grad_c
  Element* grad_e;     // [n, d]
  Element* grad_c;     // [v, d] contiguous, or null
  Element* grad_bias;  // [v] or null
};

}  // namespace cce
