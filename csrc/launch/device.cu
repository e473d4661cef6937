#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

#include "launch/arguments.cuh"
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

LaunchError find_device_limits(int device, DeviceLimits& limits) {
  struct {
    int* value;
    cudaDeviceAttr attribute;
  } const wanted[] = {
      {&limits.multiprocessors, cudaDevAttrMultiProcessorCount},
      {&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&limits.major, cudaDevAttrComputeCapabilityMajor},
      {&limits.minor, cudaDevAttrComputeCapabilityMinor},
  };
  for (const auto& [value, attribute] : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) {
      // Else the next launch would report it as its own.
      cudaGetLastError();
      return cuda_error(error);
    }
  }
  limits.has_sm90 = CCE_HAS_SM90 && !sm90_kernels_held_back();
  return {};
}

int64_t watchdog_milliseconds() {
  const char* debug = std::getenv("CCE_DEBUG");
  if (debug == nullptr || std::strcmp(debug, "1") != 0) return -1;
  const char* limit = std::getenv("CCE_WATCHDOG_MS");
  constexpr int64_t kDefault = 20'000;
  return limit == nullptr ? kDefault : std::strtoll(limit, nullptr, 10);
}

}  // namespace cce
