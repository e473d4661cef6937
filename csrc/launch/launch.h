#pragma once

#include "launch/params.h"

// The launchers: each enqueues its kernel on `stream` (a cudaStream_t) of `device` and returns at once. They
// return null, or what CUDA said where the launch failed. A launch of no tokens does nothing.
namespace cce {

template <DType kDType>
const char* launch_label_logits(const LabelLogitsParams& params, int device, void* stream);

extern template const char* launch_label_logits<DType::kFloat16>(const LabelLogitsParams&, int, void*);
extern template const char* launch_label_logits<DType::kBFloat16>(const LabelLogitsParams&, int, void*);
extern template const char* launch_label_logits<DType::kFloat32>(const LabelLogitsParams&, int, void*);
extern template const char* launch_label_logits<DType::kFloat64>(const LabelLogitsParams&, int, void*);

}  // namespace cce
