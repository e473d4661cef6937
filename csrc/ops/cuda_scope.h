#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "launch/params.h"
#include "ops/checks.h"

namespace cce {

// A function of libtorch_cuda or of a library that it is linked with, such as cuBLAS; null where there is
// none. Looked for at run time, since a library that also serves a torch without CUDA cannot link it; once,
// since that goes through the symbols of all libraries that torch's is linked with.
inline void* torch_cuda_function(const char* name) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  static std::mutex mutex;
  static std::map<std::string, void*, std::less<>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(name);
  if (found == known.end()) found = known.emplace(name, dlsym(library, name)).first;
  return found->second;
}

// torch's current CUDA stream on a device, a cudaStream_t. The stable ABI has it as
// getCurrentStream().nativeHandle() from target 2.13 on.
inline void* current_cuda_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream =
      reinterpret_cast<GetStream>(torch_cuda_function("aoti_torch_get_current_cuda_stream"));
  CCE_CHECK(get_stream != nullptr, "cce: this PyTorch has no CUDA support (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  CCE_CHECK(get_stream(device, &stream) == 0, "cce: PyTorch gave no current stream for cuda:", device);
  return stream;
}

// torch's cuBLAS, for its current stream on the current device.
inline Blas current_blas() {
  using GetHandle = AOTITorchError (*)(void**);
  static const auto get_handle =
      reinterpret_cast<GetHandle>(torch_cuda_function("torch_get_current_cuda_blas_handle"));
  void* handle = nullptr;
  CCE_CHECK(get_handle != nullptr && get_handle(&handle) == 0, "cce: PyTorch gave no handle of cuBLAS");
  return {handle, &torch_cuda_function};
}

// Makes a tensor's device the current one, for allocations and launches, and knows its current stream.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_), stream_(current_cuda_stream(device_)) {}

  int32_t device() const { return device_; }
  void* stream() const { return stream_; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

}  // namespace cce
