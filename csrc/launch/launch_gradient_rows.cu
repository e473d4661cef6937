#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/gradient_rows.cuh"
#include "kernels/visit_plan.h"
#include "launch/arguments.cuh"
#include "launch/launch.h"

namespace cce {

LaunchError launch_gradient_rows(const LceBackwardParams& p, int device, void* stream) {
  if (p.in.n == 0) return {};
  const auto on = static_cast<cudaStream_t>(stream);
  auto* control = static_cast<VisitControl*>(p.control);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMemsetAsync(control, 0, sizeof(VisitControl), on);
  if (error != cudaSuccess) return cuda_error(error);
  GradientRowsArguments a;
  a.g_nll = p.g_nll;
  a.g_lse = p.g_lse;
  a.g_nll_stride = p.g_nll_stride;
  a.g_lse_stride = p.g_lse_stride;
  a.nll = p.nll;
  a.lse = p.lse;
  a.targets = targets_of(p.in);
  a.ignore_index = p.in.ignore_index;
  a.g_entropy = p.g_entropy;
  a.g_entropy_stride = p.g_entropy_stride;
  a.entropy = p.entropy;
  a.scale = p.scale;
  a.rows = static_cast<GradientRow*>(p.rows);
  static_assert(sizeof(TokenScore) == kTokenScoreBytes, "what the operator allocates");
  a.scores = static_cast<TokenScore*>(p.scores);
  a.largest = &control->largest;
  a.n = static_cast<int>(p.in.n);
  a.v = p.in.v;
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.n, kGradientRowsThreads));
  gradient_rows_kernel<<<blocks, kGradientRowsThreads, 0, on>>>(a);
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
