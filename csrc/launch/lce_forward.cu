#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/lse_epilogue.cuh"
#include "kernels/lse_finish.cuh"
#include "launch/inputs.cuh"
#include "launch/launch.h"

namespace cce {

template <DType kDType>
const char* launch_lce_forward(const LceForwardParams& p, const LceForwardPlan& plan, int device,
                               void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  using Epilogue = LseEpilogue<Element>;
  if (p.in.n == 0) return nullptr;
  const auto kernel = logits_sm80_kernel<Element, Epilogue>;
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return error_text(error);

  LogitsOperands<Element> operands = {rows_of_e<Element>(p.in),
                                      rows_of_c<Element>(p.in, 0, p.in.v),
                                      static_cast<int>(p.in.d),
                                      plan.stages,
                                      plan.schedule,
                                      0,
                                      0};
  operands.count();
  typename Epilogue::Arguments a;
  a.bias = bias_from<Element>(p.in, 0);
  a.bias_stride = p.in.bias_stride;
  a.softcap = softcap_of(p.in);
  a.label_logits = p.label_logits;
  a.tile_map = static_cast<__nv_bfloat16*>(p.tile_map);
  a.partial_lse = p.partial_lse;
  a.n = static_cast<int>(p.in.n);
  a.v = static_cast<int>(p.in.v);
  kernel<<<plan.blocks, kLogitsThreads, plan.shared_bytes, on>>>(operands, a);

  LseFinishArguments f;
  f.partial_lse = p.partial_lse;
  f.label_logits = p.label_logits;
  f.targets = targets_of(p.in);
  f.ignore_index = p.in.ignore_index;
  f.nll = p.nll;
  f.lse = p.lse;
  f.n = static_cast<int>(p.in.n);
  f.splits = plan.schedule.splits;
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.n, kLseFinishThreads));
  lse_finish_kernel<<<blocks, kLseFinishThreads, 0, on>>>(f);
  return error_text(cudaGetLastError());
}

template const char* launch_lce_forward<DType::kFloat16>(const LceForwardParams&, const LceForwardPlan&, int,
                                                         void*);
template const char* launch_lce_forward<DType::kBFloat16>(const LceForwardParams&, const LceForwardPlan&, int,
                                                          void*);

}  // namespace cce
