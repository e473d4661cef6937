#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/lse_epilogue.cuh"
#include "kernels/lse_finish.cuh"
#include "launch/inputs.cuh"
#include "launch/launch.h"
#include "launch/lce_forward_sm90.h"

namespace cce {
namespace {

template <DType kDType>
const char* launch_lse_sm80(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  using Epilogue = LseEpilogue<Element>;
  const auto kernel = logits_sm80_kernel<Element, Epilogue>;
  const cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return error_text(error);
  LogitsOperands<Element> operands = {rows_of_e<Element>(p.in),
                                      rows_of_c<Element>(p.in, 0, p.in.v),
                                      static_cast<int>(p.in.d),
                                      plan.stages,
                                      plan.schedule,
                                      0,
                                      0};
  operands.count();
  kernel<<<plan.blocks, kLogitsThreads, plan.shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      operands, lse_arguments<Element>(p));
  return error_text(cudaGetLastError());
}

// The log-sum-exps of each unit, and the tile map.
template <DType kDType>
const char* launch_lse(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
#if CCE_HAS_SM90
  if (plan.kernel == ForwardKernel::kSm90) return launch_lse_sm90<kDType>(p, plan, stream);
#endif
  return launch_lse_sm80<kDType>(p, plan, stream);
}

}  // namespace

template <DType kDType>
const char* launch_lce_forward(const LceForwardParams& p, const LceForwardPlan& plan, int device,
                               void* stream) {
  if (p.in.n == 0) return nullptr;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error_text(error);
  if (const char* text = launch_lse<kDType>(p, plan, stream)) return text;

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
  lse_finish_kernel<<<blocks, kLseFinishThreads, 0, static_cast<cudaStream_t>(stream)>>>(f);
  return error_text(cudaGetLastError());
}

template const char* launch_lce_forward<DType::kFloat16>(const LceForwardParams&, const LceForwardPlan&, int,
                                                         void*);
template const char* launch_lce_forward<DType::kBFloat16>(const LceForwardParams&, const LceForwardPlan&, int,
                                                          void*);

}  // namespace cce
