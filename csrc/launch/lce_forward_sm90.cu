#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/logits_sm90.cuh"
#include "kernels/lse_epilogue_sm90.cuh"
#include "launch/inputs.cuh"
#include "launch/lce_forward_sm90.h"
#include "launch/tensor_map.cuh"

namespace cce {
namespace {

template <typename Element, int kCluster>
const char* launch(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
  using Epilogue = LseEpilogueSm90<Element, kSm90PolynomialEighths>;
  const auto kernel = logits_sm90_kernel<Element, Epilogue, kCluster, kSm90CacheHints>;
  cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return error_text(error);

  LogitsSm90Operands operands{};
  const char* refused =
      encode_rows<Element>(operands.e, p.in.e, p.in.n, p.in.d, p.in.e_row_stride, LogitsSm90::kRows);
  if (refused == nullptr) {
    refused = encode_rows<Element>(operands.c, p.in.c, p.in.v, p.in.d, p.in.c_row_stride,
                                   LogitsSm90::kColumnsOfBlock<kCluster>);
  }
  if (refused != nullptr) return refused;
  operands.schedule = plan.schedule;
  operands.units = plan.schedule.units();
  operands.steps = static_cast<int>(ceil_div(p.in.d, LogitsSm90::kDepth));

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(LogitsSm90::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = kCluster > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, operands, lse_arguments<Element>(p));
  return error_text(error);
}

}  // namespace

template <DType kDType>
const char* launch_lse_sm90(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  return plan.cluster == 2 ? launch<Element, 2>(p, plan, stream) : launch<Element, 1>(p, plan, stream);
}

template const char* launch_lse_sm90<DType::kFloat16>(const LceForwardParams&, const LceForwardPlan&, void*);
template const char* launch_lse_sm90<DType::kBFloat16>(const LceForwardParams&, const LceForwardPlan&, void*);

}  // namespace cce
