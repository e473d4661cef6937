#pragma once

#include <cstdint>

// What the operators hand to the launchers: plain structs, without torch's types or CUDA's.
namespace cce {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// Strides are in elements; the last dimension of e and c has stride 1.
struct LabelLogitsParams {
  const void* e;        // [n, d]
  const void* c;        // [v, d], of e's dtype
  const void* bias;     // [v], of e's dtype, or null
  const void* targets;  // [n], int32 or int64
  void* out;            // [n], contiguous: float, or double for double e
  int64_t n, d, v;
  int64_t e_row_stride, c_row_stride, bias_stride, target_stride;
  int64_t ignore_index;
  double softcap;  // 0: none
  DType dtype;
  bool targets_are_int64;
};

}  // namespace cce
