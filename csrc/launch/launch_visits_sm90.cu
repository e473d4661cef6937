#include <cuda_runtime.h>

#include "kernels/visits_sm90.cuh"
#include "launch/arguments.cuh"
#include "launch/launch_visits_sm90.h"
#include "launch/tensor_map.cuh"

namespace cce {

template <typename Element>
LaunchError launch_visits_sm90(const VisitsArguments<Element>& a, const VisitsPlan& plan, void* stream) {
  const auto kernel = visits_sm90_kernel<Element>;
  const cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return cuda_error(error);

  VisitsSm90Maps maps{};
  const VisitLayout& layout = plan.layout;
  const char* refused = encode_rows<Element>(maps.c, a.c.data, a.c.count, a.d, a.c.stride, kTileColumns);
  if (refused == nullptr && layout.slices > 0) {
    refused =
        encode_rows<Element>(maps.dz, a.dz, layout.ring_rows(), kTileColumns, kTileColumns, kRowElements);
  }
  if (layout.finds_centroids) {
    if (refused == nullptr) {
      refused = encode_rows<Element>(maps.residual, a.residual, layout.strips, layout.residual_stride,
                                     layout.residual_stride, kRowElements);
    }
    if (refused == nullptr) {
      refused = encode_rows<Element>(maps.centroids, a.centroids, layout.strips, a.d, a.d, kRowElements);
    }
  }
  if (refused != nullptr) return {"CUDA", refused};
  kernel<<<plan.blocks, VisitsSm90::kThreads, plan.shared_bytes, static_cast<cudaStream_t>(stream)>>>(maps,
                                                                                                      a);
  return cuda_error(cudaGetLastError());
}

template LaunchError launch_visits_sm90<__half>(const VisitsArguments<__half>&, const VisitsPlan&, void*);
template LaunchError launch_visits_sm90<__nv_bfloat16>(const VisitsArguments<__nv_bfloat16>&,
                                                       const VisitsPlan&, void*);

}  // namespace cce
