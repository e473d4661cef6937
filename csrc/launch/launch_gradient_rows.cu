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
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.n, kGradientRowsThreads));
  cudaError_t error = cudaSetDevice(device);
  // A block that is alone makes the zeros itself.
  if (error == cudaSuccess && blocks > 1) error = cudaMemsetAsync(control, 0, p.zeroed_bytes, on);
  if (error != cudaSuccess) return cuda_error(error);
  GradientRowsArguments a;
  a.g_nll = p.g_nll;
  a.g_lse = p.g_lse;
  a.g_nll_stride = p.g_nll_stride;
  a.g_lse_stride = p.g_lse_stride;
  a.count = p.count;
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
  a.zeroed = static_cast<uint32_t*>(p.control);
  a.zeroed_words = p.zeroed_bytes / static_cast<int64_t>(sizeof(uint32_t));
  a.n = static_cast<int>(p.in.n);
  a.v = p.in.v;
  gradient_rows_kernel<<<blocks, kGradientRowsThreads, 0, on>>>(a);
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
