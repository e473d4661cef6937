#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/live_product_sm80.cuh"
#include "launch/arguments.cuh"
#include "launch/cublas.h"
#include "launch/heuristics.h"

// What the exact and the sampled backward share around their products by cuBLAS.
namespace cce {

inline VisitControl* control_of(const LceBackwardParams& p) { return static_cast<VisitControl*>(p.control); }

template <typename Element>
void find_stray_rows(const LceBackwardParams& p, cudaStream_t stream) {
  StrayRowsArguments<Element> a;
  a.e = rows_of_e<Element>(p.in);
  a.rows = static_cast<const GradientRow*>(p.rows);
  a.d = static_cast<int>(p.in.d);
  a.control = control_of(p);
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.n, kStrayRowsThreads / kWarpLanes));
  stray_rows_kernel<Element><<<blocks, kStrayRowsThreads, 0, stream>>>(a);
}

template <typename Element, Major kMajorOfWeights>
LaunchError launch_live_product(const LiveProductArguments<Element>& a, int most_blocks,
                                cudaStream_t stream) {
  const auto kernel = live_product_kernel<Element, kMajorOfWeights>;
  const int shared_bytes = a.stages * kVisitStageBytes;
  const cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error != cudaSuccess) return cuda_error(error);
  const int64_t parts = ceil_div(a.columns, kLiveProductRows) * ceil_div(a.d, kVisitSlice);
  // Nearly always they have nothing to do: one each of the product's blocks took 66 us for that.
  const int64_t blocks = std::min<int64_t>(parts, most_blocks);
  kernel<<<static_cast<unsigned>(blocks), kVisitThreads, static_cast<size_t>(shared_bytes), stream>>>(a);
  return cuda_error(cudaGetLastError());
}

template <typename Element>
BlasMatrix matrix(const Rows<Element>& rows, int64_t d) {
  // A single row's stride may be anything.
  return {rows.data, rows.count == 1 ? d : rows.stride};
}

}  // namespace cce
