#pragma once

#include "launch/heuristics.h"
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

// Throws nothing: on an error the limits are those of the smallest supported GPU, and the launch will tell.
DeviceLimits device_limits(int device);

// Shared memory of the visits' kernel beside its stages.
int visits_row_bytes();

// fp16 and bf16 only. The label logits must have been computed.
template <DType kDType>
const char* launch_lce_forward(const LceForwardParams& params, const LceForwardPlan& plan, int device,
                               void* stream);

// The gradients' weights a token: what both backward launches below begin from.
const char* launch_gradient_rows(const LceBackwardParams& params, int device, void* stream);

// All but e's gradient, which is left in sum_e: launch_round_gradient brings it to grad_e, and need not exist
// before.
template <DType kDType>
const char* launch_exact_backward(const LceBackwardParams& params, const ExactScratch& scratch,
                                  const ExactPlan& plan, const Blas& blas, int device, void* stream);

template <DType kDType>
const char* launch_round_gradient(const LceBackwardParams& params, int device, void* stream);

template <DType kDType>
const char* launch_visits_backward(const LceBackwardParams& params, const VisitsScratch& scratch,
                                   const VisitsPlan& plan, int device, void* stream);

extern template const char* launch_lce_forward<DType::kFloat16>(const LceForwardParams&,
                                                                const LceForwardPlan&, int, void*);
extern template const char* launch_lce_forward<DType::kBFloat16>(const LceForwardParams&,
                                                                 const LceForwardPlan&, int, void*);
extern template const char* launch_exact_backward<DType::kFloat16>(const LceBackwardParams&,
                                                                   const ExactScratch&, const ExactPlan&,
                                                                   const Blas&, int, void*);
extern template const char* launch_exact_backward<DType::kBFloat16>(const LceBackwardParams&,
                                                                    const ExactScratch&, const ExactPlan&,
                                                                    const Blas&, int, void*);
extern template const char* launch_round_gradient<DType::kFloat16>(const LceBackwardParams&, int, void*);
extern template const char* launch_round_gradient<DType::kBFloat16>(const LceBackwardParams&, int, void*);
extern template const char* launch_visits_backward<DType::kFloat16>(const LceBackwardParams&,
                                                                    const VisitsScratch&, const VisitsPlan&,
                                                                    int, void*);
extern template const char* launch_visits_backward<DType::kBFloat16>(const LceBackwardParams&,
                                                                     const VisitsScratch&, const VisitsPlan&,
                                                                     int, void*);

}  // namespace cce
