#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/label_logits_config.h"
#include "launch/params.h"

// Which configuration a kernel runs in, and why. Pure C++: tested without a GPU.
namespace cce {

inline int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

struct LabelLogitsPlan {
  bool vector_loads;   // 16-byte loads, else element by element
  const char* reason;  // for vector_loads
  unsigned blocks;
};

inline LabelLogitsPlan plan_label_logits(const LabelLogitsParams& p) {
  const int64_t bytes = element_bytes(p.dtype);
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kLabelLogitsVectorBytes == 0;
  };
  // With a single row the stride between rows is never used, and torch lets it be anything.
  const auto rows_aligned = [bytes](int64_t rows, int64_t stride) {
    return rows <= 1 || stride * bytes % kLabelLogitsVectorBytes == 0;
  };
  LabelLogitsPlan plan{};
  if (p.d * bytes < kLabelLogitsVectorBytes) {
    plan.reason = "element loads: a row is shorter than 16 bytes";
  } else if (!aligned(p.e)) {
    plan.reason = "element loads: e does not start at a multiple of 16 bytes";
  } else if (!aligned(p.c)) {
    plan.reason = "element loads: c does not start at a multiple of 16 bytes";
  } else if (!rows_aligned(p.n, p.e_row_stride)) {
    plan.reason = "element loads: e's rows are not a multiple of 16 bytes apart";
  } else if (!rows_aligned(p.v, p.c_row_stride)) {
    plan.reason = "element loads: c's rows are not a multiple of 16 bytes apart";
  } else {
    plan.vector_loads = true;
    plan.reason = "16-byte loads: every row of e and c starts at a multiple of 16 bytes";
  }
  // The kernel strides over the tokens, so CUDA's largest grid bounds the blocks, not the tokens.
  constexpr int64_t kLargestGrid = INT32_MAX;
  const int64_t blocks = (p.n + kLabelLogitsTokensPerBlock - 1) / kLabelLogitsTokensPerBlock;
  plan.blocks = static_cast<unsigned>(std::min(blocks, kLargestGrid));
  return plan;
}

}  // namespace cce
