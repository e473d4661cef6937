#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "ops/allocate.h"

namespace cce {

// Scratch memory of several parts in one allocation: an allocator's call takes longer than a small kernel.
class Workspace {
 public:
  static constexpr int64_t kElement = 2, kWord = 4;  // bytes

  // A part of so many bytes, to which allocate() points `pointer`.
  template <typename T>
  void add(T*& pointer, int64_t bytes) {
    parts_.push_back({&pointer, bytes_});
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  // Of all parts so far, which lie in their order: where the next one begins.
  int64_t bytes() const { return bytes_; }

  bool empty() const { return parts_.empty(); }

  // On the tensor's device. The parts live as long as what it returns.
  torch::stable::Tensor allocate(const torch::stable::Tensor& like) const {
    const torch::stable::Tensor memory = cce::allocate(like, {bytes_}, torch::headeronly::ScalarType::Byte);
    auto* begin = static_cast<unsigned char*>(memory.mutable_data_ptr());
    for (const Part& part : parts_) {
      // The pointers have different types: copied as bytes.
      unsigned char* at = begin + part.offset;
      std::memcpy(part.pointer, &at, sizeof at);
    }
    return memory;
  }

 private:
  static constexpr int64_t kAlignment = 256;
  struct Part {
    void* pointer;
    int64_t offset;
  };
  std::vector<Part> parts_;
  int64_t bytes_ = 0;
};

}  // namespace cce
