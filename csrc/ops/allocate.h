#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>

#include "ops/checks.h"

namespace cce {

// An uninitialised contiguous tensor on a device. By torch's C functions: torch::stable::new_empty asks the
// dispatcher by the operator's name, which takes a multiple of the host's time, and a call allocates a dozen.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape,
                                      torch::headeronly::ScalarType dtype) {
  constexpr size_t kMostDims = 3;
  CCE_CHECK(shape.size() <= kMostDims, "cce: a tensor of more than three dimensions is not allocated so");
  std::array<int64_t, kMostDims> strides{};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape.begin()[i], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               device_type, like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

// The same in its dtype.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like,
                                      std::initializer_list<int64_t> shape) {
  return allocate(like, shape, like.scalar_type());
}

}  // namespace cce
