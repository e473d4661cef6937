#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/gradient_small.cuh"
#include "kernels/visit_mask.cuh"
#include "kernels/visit_plan.cuh"
#include "kernels/visits_sm80.cuh"
#include "launch/inputs.cuh"
#include "launch/launch.h"

namespace cce {

int visits_row_bytes() { return static_cast<int>(sizeof(VisitsShared)); }

// Finds the visits, plans the work, does it, and rounds dE.
template <DType kDType>
const char* launch_visits_backward(const LceBackwardParams& p, const VisitsScratch& scratch,
                                   const VisitsPlan& plan, int device, void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  if (p.in.n == 0) return nullptr;
  const auto visits = visits_sm80_kernel<Element>;
  const auto on = static_cast<cudaStream_t>(stream);
  auto* control = static_cast<VisitControl*>(p.control);
  const int n = static_cast<int>(p.in.n), d = static_cast<int>(p.in.d), tiles = static_cast<int>(plan.tiles);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = allow_shared_memory(visits, plan.shared_bytes);
  if (error == cudaSuccess) error = cudaMemsetAsync(scratch.counts, 0, plan.tiles * sizeof(uint32_t), on);
  if (error == cudaSuccess && p.grad_e != nullptr) {
    error = cudaMemsetAsync(p.sum_e, 0, p.in.n * p.in.d * sizeof(float), on);
  }
  if (error != cudaSuccess) return error_text(error);

  VisitMaskArguments m;
  m.rows = static_cast<const GradientRow*>(p.rows);
  m.nll = p.nll;
  m.tile_map = static_cast<const __nv_bfloat16*>(scratch.tile_map);
  m.seed = scratch.seed;
  m.log_rate = static_cast<float>(std::log(1.0 / scratch.eps - 1.0));
  m.log_eps = static_cast<float>(std::log(scratch.eps));
  m.n = n;
  m.tiles = tiles;
  m.mask = static_cast<uint32_t*>(scratch.mask);
  m.counts = static_cast<uint32_t*>(scratch.counts);
  const dim3 grid(static_cast<unsigned>(ceil_div(n, kMaskTokens)),
                  static_cast<unsigned>(ceil_div(tiles, kMaskTiles)));
  visit_mask_kernel<<<grid, kMaskThreads, 0, on>>>(m);

  VisitPlanArguments s;
  s.counts = m.counts;
  s.tiles = tiles;
  s.slices = plan.slices;
  s.capacity = static_cast<uint32_t>(plan.capacity);
  s.buffer = static_cast<uint32_t>(plan.buffer);
  s.control = control;
  s.order = static_cast<int*>(scratch.order);
  s.chunk_begins = static_cast<uint32_t*>(scratch.chunk_begins);
  s.items = static_cast<VisitItem*>(scratch.items);
  visit_plan_kernel<<<1, kPlanThreads, 0, on>>>(s);

  VisitsArguments<Element> a;
  a.e = rows_of_e<Element>(p.in);
  a.c = rows_of_c<Element>(p.in, 0, p.in.v);
  a.bias = bias_from<Element>(p.in, 0);
  a.bias_stride = p.in.bias_stride;
  a.softcap = softcap_of(p.in);
  a.d = d;
  a.stages = plan.stages;
  a.rows = m.rows;
  a.nll = p.nll;
  a.tile_map = m.tile_map;
  a.mask = m.mask;
  a.counts = m.counts;
  a.items = s.items;
  a.control = control;
  a.sampled = scratch.seed != nullptr;
  a.log_rate = m.log_rate;
  a.threshold = static_cast<float>(scratch.eps);
  a.dz = plan.slices == 0 ? nullptr : static_cast<Element*>(scratch.dz);
  a.tokens = static_cast<int*>(scratch.tokens);
  a.sum_e = p.grad_e == nullptr ? nullptr : p.sum_e;
  a.grad_c = static_cast<Element*>(p.grad_c);
  a.grad_bias = static_cast<Element*>(p.grad_bias);
  visits<<<plan.blocks, kVisitThreads, plan.shared_bytes, on>>>(a);

  if (p.grad_e != nullptr) {
    const int64_t count = p.in.n * p.in.d;
    const int64_t blocks = std::min<int64_t>(ceil_div(count, kRoundThreads * 4), plan.blocks * 16);
    round_gradient_kernel<Element><<<static_cast<unsigned>(blocks), kRoundThreads, 0, on>>>(
        p.sum_e, static_cast<Element*>(p.grad_e), count, &control->largest);
  }
  return error_text(cudaGetLastError());
}

template const char* launch_visits_backward<DType::kFloat16>(const LceBackwardParams&, const VisitsScratch&,
                                                             const VisitsPlan&, int, void*);
template const char* launch_visits_backward<DType::kBFloat16>(const LceBackwardParams&, const VisitsScratch&,
                                                              const VisitsPlan&, int, void*);

}  // namespace cce
