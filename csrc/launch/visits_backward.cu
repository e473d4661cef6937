#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "kernels/visit_mask.cuh"
#include "kernels/visit_plan.cuh"
#include "kernels/visits_sm80.cuh"
#include "launch/inputs.cuh"
#include "launch/launch.h"

namespace cce {

int visits_row_bytes() { return static_cast<int>(sizeof(VisitsShared)); }

// Finds the visits, plans the work and does it.
template <DType kDType>
const char* launch_visits_backward(const LceBackwardParams& p, const VisitsScratch& scratch,
                                   const VisitsPlan& plan, int device, void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  if (p.in.n == 0) return nullptr;
  const auto visits = visits_sm80_kernel<Element>;
  const auto on = static_cast<cudaStream_t>(stream);
  auto* control = static_cast<VisitControl*>(p.control);
  const int n = static_cast<int>(p.in.n), d = static_cast<int>(p.in.d), tiles = static_cast<int>(plan.tiles);
  float* sum_e = p.sum_e;
  if (plan.first_borrowed < plan.tiles) {
    sum_e = reinterpret_cast<float*>(static_cast<Element*>(p.grad_c) + plan.sums_begin);
  }
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = allow_shared_memory(visits, plan.shared_bytes);
  if (error == cudaSuccess) error = cudaMemsetAsync(scratch.counts, 0, plan.tiles * sizeof(uint32_t), on);
  if (error == cudaSuccess && p.grad_e != nullptr) {
    error = cudaMemsetAsync(sum_e, 0, p.in.n * p.in.d * sizeof(float), on);
  }
  if (error != cudaSuccess) return error_text(error);

  VisitMaskArguments m;
  m.rows = static_cast<const GradientRow*>(p.rows);
  m.nll = p.nll;
  m.tile_map = static_cast<const __nv_bfloat16*>(scratch.tile_map);
  m.seed = scratch.seed;
  m.log_rate = static_cast<float>(std::log(1.0 / scratch.eps - 1.0));
  m.n = n;
  m.tiles = tiles;
  m.mask = static_cast<uint32_t*>(scratch.mask);
  m.counts = static_cast<uint32_t*>(scratch.counts);
  const dim3 grid(static_cast<unsigned>(ceil_div(n, kMaskTokens)),
                  static_cast<unsigned>(ceil_div(tiles, kChainTiles)));
  visit_mask_kernel<<<grid, kMaskThreads, 0, on>>>(m);

  VisitPlanArguments s;
  s.counts = m.counts;
  s.n = n;
  s.tiles = tiles;
  s.slices = plan.slices;
  s.need_e = p.grad_e != nullptr;
  s.first_borrowed = static_cast<int>(plan.first_borrowed);
  s.capacity = static_cast<uint32_t>(plan.capacity);
  s.buffer = static_cast<uint32_t>(plan.buffer);
  s.control = control;
  s.order = static_cast<int*>(scratch.order);
  s.chunk_begins = static_cast<uint32_t*>(scratch.chunk_begins);
  s.pending = static_cast<uint32_t*>(scratch.pending);
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
  a.pending = s.pending;
  a.log_rate = m.log_rate;
  a.dz = plan.slices == 0 ? nullptr : static_cast<Element*>(scratch.dz);
  a.tokens = static_cast<int*>(scratch.tokens);
  a.sum_e = sum_e;
  a.grad_e = static_cast<Element*>(p.grad_e);
  a.grad_c = static_cast<Element*>(p.grad_c);
  a.grad_bias = static_cast<Element*>(p.grad_bias);
  visits<<<plan.blocks, kVisitThreads, plan.shared_bytes, on>>>(a);
  return error_text(cudaGetLastError());
}

template const char* launch_visits_backward<DType::kFloat16>(const LceBackwardParams&, const VisitsScratch&,
                                                             const VisitsPlan&, int, void*);
template const char* launch_visits_backward<DType::kBFloat16>(const LceBackwardParams&, const VisitsScratch&,
                                                              const VisitsPlan&, int, void*);

}  // namespace cce
