#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

}  // namespace cce
