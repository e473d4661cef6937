#include <cuda_runtime.h>

#include "kernels/reduce_nll.cuh"
#include "launch/arguments.cuh"
#include "launch/launch.h"

namespace cce {

LaunchError launch_reduce_nll(const ReduceNllParams& p, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  const ReduceNllArguments a = {
      p.nll, {p.targets, p.target_stride, p.targets_are_int64}, p.ignore_index, p.n, p.mean, p.loss, p.count};
  reduce_nll_kernel<<<1, kReduceNllThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
