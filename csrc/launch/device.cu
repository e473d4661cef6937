#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "launch/launch.h"

namespace cce {
namespace {

// CCE_KERNELS=sm80 has GPUs run the kernels of older ones: a debugging aid, read once.
bool sm90_kernels_held_back() {
  static const bool held_back = [] {
    const char* kernels = std::getenv("CCE_KERNELS");
    return kernels != nullptr && std::strcmp(kernels, "sm80") == 0;
  }();
  return held_back;
}

}  // namespace

DeviceLimits device_limits(int device) {
  DeviceLimits limits = {1, 99 * 1024};
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&limits.major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&limits.minor, cudaDevAttrComputeCapabilityMinor, device);
  limits.has_sm90 = CCE_HAS_SM90 && !sm90_kernels_held_back();
  return limits;
}

}  // namespace cce
