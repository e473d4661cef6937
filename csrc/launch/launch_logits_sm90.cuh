#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/logits_sm90.cuh"
#include "launch/arguments.cuh"
#include "launch/heuristics.h"
#include "launch/tensor_map.cuh"

namespace cce {

template <typename Element, typename Epilogue, int kCluster>
LaunchError launch_logits_sm90_in_clusters(const LossInputs& in, int64_t first, int64_t columns,
                                           const LogitsPlan& plan, const LogitsSchedule& schedule,
                                           const LiveRows& live, const void* live_e, int blocks,
                                           const typename Epilogue::Arguments& arguments, void* stream) {
  const auto kernel = logits_sm90_kernel<Element, Epilogue, kCluster>;
  cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return cuda_error(error);

  const Rows<Element> e = rows_of_e<Element>(in), c = rows_of_c<Element>(in, first, columns);
  LogitsSm90Operands operands{};
  operands.box_rows = static_cast<int>(std::min<int64_t>(in.n, LogitsSm90::kRows));
  const char* refused = encode_rows<Element>(operands.e, e.data, e.count, in.d, e.stride, operands.box_rows);
  if (refused == nullptr && live_e != nullptr) {
    // Its rows follow each other, unless e itself is the copy.
    const int64_t stride = live_e == in.e ? in.e_row_stride : in.d;
    refused = encode_rows<Element>(operands.live_e, static_cast<const Element*>(live_e), in.n, in.d, stride,
                                   operands.box_rows);
  }
  if (refused == nullptr) {
    refused = encode_rows<Element>(operands.c, c.data, c.count, in.d, c.stride,
                                   LogitsSm90::kColumnsOfBlock<kCluster>);
  }
  if (refused != nullptr) return {"CUDA", refused};
  operands.live = live;
  operands.schedule = schedule;
  operands.n = static_cast<int>(in.n);
  operands.depth = kRowBytes / static_cast<int>(sizeof(Element));
  operands.steps = static_cast<int>(ceil_div(in.d, operands.depth));

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(LogitsSm90::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = kCluster > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, operands, arguments);
  return cuda_error(error);
}

// As launch_logits_sm80, by Hopper's kernel.
template <typename Element, typename Epilogue>
LaunchError launch_logits_sm90(const LossInputs& in, int64_t first, int64_t columns, const LogitsPlan& plan,
                               const LogitsSchedule& schedule, const LiveRows& live, const void* live_e,
                               int blocks, const typename Epilogue::Arguments& arguments, void* stream) {
  const auto launch = plan.cluster == 2 ? launch_logits_sm90_in_clusters<Element, Epilogue, 2>
                                        : launch_logits_sm90_in_clusters<Element, Epilogue, 1>;
  return launch(in, first, columns, plan, schedule, live, live_e, blocks, arguments, stream);
}

}  // namespace cce
