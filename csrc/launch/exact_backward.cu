#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/gradient_epilogue.cuh"
#include "kernels/gradient_products_sm80.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/visits_config.h"
#include "launch/inputs.cuh"
#include "launch/launch.h"

namespace cce {

// Chunk by chunk of the vocabulary: dz, then its products with E and C.
template <DType kDType>
const char* launch_exact_backward(const LceBackwardParams& p, const ExactScratch& scratch,
                                  const ExactPlan& plan, int device, void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  using Epilogue = GradientEpilogue<Element>;
  if (p.in.n == 0) return nullptr;
  const auto logits = logits_sm80_kernel<Element, Epilogue>;
  const auto products = gradient_products_sm80_kernel<Element>;
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = allow_shared_memory(logits, plan.shared_bytes);
  if (error == cudaSuccess) error = allow_shared_memory(products, plan.shared_bytes);
  if (error != cudaSuccess) return error_text(error);

  const uint32_t* largest = &static_cast<const VisitControl*>(p.control)->largest;
  auto* dz = static_cast<Element*>(scratch.dz);
  const int n = static_cast<int>(p.in.n), d = static_cast<int>(p.in.d);
  for (int64_t first = 0; first < p.in.v; first += plan.chunk_columns) {
    const int columns = static_cast<int>(std::min(plan.chunk_columns, p.in.v - first));

    const ForwardSchedule schedule = {static_cast<int>(ceil_div(n, kLogitsRows)),
                                      static_cast<int>(ceil_div(columns, kLogitsColumns)),
                                      static_cast<int>(ceil_div(columns, kLogitsColumns))};
    LogitsOperands<Element> operands = {
        rows_of_e<Element>(p.in), rows_of_c<Element>(p.in, first, columns), d, plan.stages, schedule, 0, 0};
    operands.count();
    typename Epilogue::Arguments a;
    a.bias = bias_from<Element>(p.in, first);
    a.bias_stride = p.in.bias_stride;
    a.softcap = softcap_of(p.in);
    a.rows = static_cast<const GradientRow*>(p.rows);
    a.largest = largest;
    a.dz = dz;
    a.stride = plan.chunk_columns;
    a.n = n;
    a.first_column = static_cast<int>(first);
    a.columns = columns;
    logits<<<std::min(schedule.units(), plan.blocks), kLogitsThreads, plan.shared_bytes, on>>>(operands, a);

    GradientProductsArguments<Element> g;
    g.e = rows_of_e<Element>(p.in);
    g.c = rows_of_c<Element>(p.in, first, columns);
    g.dz = {dz, plan.chunk_columns, n};
    g.d = d;
    g.stages = plan.stages;
    g.largest = largest;
    g.grad_c = p.grad_c == nullptr ? nullptr : static_cast<Element*>(p.grad_c) + first * d;
    g.grad_e = static_cast<Element*>(p.grad_e);
    g.sum_e = p.sum_e;
    g.first_chunk = first == 0;
    g.last_chunk = first + columns == p.in.v;
    g.count_blocks();
    if (g.blocks > 0) {
      products<<<std::min(g.blocks, plan.blocks), kLogitsThreads, plan.shared_bytes, on>>>(g);
    }

    if (p.grad_bias != nullptr) {
      ColumnSumsArguments<Element> s;
      s.dz = dz;
      s.stride = plan.chunk_columns;
      s.n = n;
      s.columns = columns;
      s.largest = largest;
      s.out = static_cast<Element*>(p.grad_bias) + first;
      column_sums_kernel<<<static_cast<unsigned>(ceil_div(columns, kColumnSumsColumns)), kColumnSumsThreads,
                           0, on>>>(s);
    }
  }
  return error_text(cudaGetLastError());
}

template const char* launch_exact_backward<DType::kFloat16>(const LceBackwardParams&, const ExactScratch&,
                                                            const ExactPlan&, int, void*);
template const char* launch_exact_backward<DType::kBFloat16>(const LceBackwardParams&, const ExactScratch&,
                                                             const ExactPlan&, int, void*);

}  // namespace cce
