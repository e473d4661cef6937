#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "ops/checks.h"

namespace cce {

// torch's current CUDA stream on a device, a cudaStream_t. The stable ABI has it as
// getCurrentStream().nativeHandle() from target 2.13 on; for 2.10 it is a function of libtorch_cuda, which a
// library that also serves a torch without CUDA cannot link.
inline void* current_cuda_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  CCE_CHECK(get_stream != nullptr, "cce: this PyTorch has no CUDA support (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  CCE_CHECK(get_stream(device, &stream) == 0, "cce: PyTorch gave no current stream for cuda:", device);
  return stream;
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
