#pragma once

#include <cstdint>

namespace cce {

// The labels, int32 or int64; stride in elements.
struct Targets {
  const void* data;
  int64_t stride;
  bool are_int64;

  __device__ __forceinline__ int64_t operator[](int64_t token) const {
    return are_int64 ? static_cast<const int64_t*>(data)[token * stride]
                     : static_cast<int64_t>(static_cast<const int32_t*>(data)[token * stride]);
  }
};

}  // namespace cce
