#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch/launch_error.h"
#include "launch/params.h"

namespace cce {

// The CUDA types that stand for a DType: of an element, and of sums over elements.
template <DType kDType>
struct TypesOf;
template <>
struct TypesOf<DType::kFloat16> {
  using Element = __half;
  using Accumulator = float;
};
template <>
struct TypesOf<DType::kBFloat16> {
  using Element = __nv_bfloat16;
  using Accumulator = float;
};
template <>
struct TypesOf<DType::kFloat32> {
  using Element = float;
  using Accumulator = float;
};
template <>
struct TypesOf<DType::kFloat64> {
  using Element = double;
  using Accumulator = double;
};

// Calls launch(x), x being of the CUDA type of a 16-bit dtype.
template <typename Launch>
LaunchError dispatch_16bit(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat16:
      return launch(__half());
    case DType::kBFloat16:
      return launch(__nv_bfloat16());
    default:
      return {"cce", "these kernels take fp16 and bf16"};
  }
}

}  // namespace cce
