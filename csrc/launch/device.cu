#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

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

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  // Held while CUDA is told: of two threads, the one that asks for less must not come last.
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t refused =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (refused == cudaSuccess) most = bytes;
  return refused;
}

LaunchError find_device_limits(int device, DeviceLimits& limits) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    limits = found->second;
    return {};
  }
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
  known[device] = limits;
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
