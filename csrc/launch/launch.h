#pragma once

#include <optional>

#include "launch/heuristics.h"
#include "launch/launch_error.h"
#include "launch/params.h"

// The launchers: each enqueues its kernel on `stream` (a cudaStream_t) of `device` and returns at once, with
// what went wrong where it could not. A launch of no tokens does nothing.
namespace cce {

template <DType kDType>
LaunchError launch_label_logits(const LabelLogitsParams& params, int device, void* stream);

extern template LaunchError launch_label_logits<DType::kFloat16>(const LabelLogitsParams&, int, void*);
extern template LaunchError launch_label_logits<DType::kBFloat16>(const LabelLogitsParams&, int, void*);
extern template LaunchError launch_label_logits<DType::kFloat32>(const LabelLogitsParams&, int, void*);
extern template LaunchError launch_label_logits<DType::kFloat64>(const LabelLogitsParams&, int, void*);

// Fills in the limits. After an error CUDA has nothing left to report.
LaunchError find_device_limits(int device, DeviceLimits& limits);

// Shared memory of the visits' kernel beside its stages.
int visits_row_bytes();

// CCE_DEBUG=1 in the environment has what waits inside a kernel give up with a message after so many
// milliseconds: CCE_WATCHDOG_MS, or 20 seconds. -1: waits are not limited.
int64_t watchdog_milliseconds();

// fp16 and bf16 only. The label logits must have been computed.
template <DType kDType>
LaunchError launch_lce_forward(const LceForwardParams& params, const LceForwardPlan& plan, int device,
                               void* stream);

// The gradients' weights a token: what the backward launches below begin from.
LaunchError launch_gradient_rows(const LceBackwardParams& params, int device, void* stream);

// All but e's gradient, which is left in sum_e: launch_round_gradient brings it to grad_e, and need not exist
// before. blas: only a call for bias's gradient alone can do without.
template <DType kDType>
LaunchError launch_exact_backward(const LceBackwardParams& params, const ExactScratch& scratch,
                                  const ExactPlan& plan, const std::optional<Blas>& blas, int device,
                                  void* stream);

template <DType kDType>
LaunchError launch_round_gradient(const LceBackwardParams& params, int device, void* stream);

template <DType kDType>
LaunchError launch_visits_backward(const LceBackwardParams& params, const VisitsScratch& scratch,
                                   const VisitsPlan& plan, int device, void* stream);

extern template LaunchError launch_lce_forward<DType::kFloat16>(const LceForwardParams&,
                                                                const LceForwardPlan&, int, void*);
extern template LaunchError launch_lce_forward<DType::kBFloat16>(const LceForwardParams&,
                                                                 const LceForwardPlan&, int, void*);
extern template LaunchError launch_exact_backward<DType::kFloat16>(const LceBackwardParams&,
                                                                   const ExactScratch&, const ExactPlan&,
                                                                   const std::optional<Blas>&, int, void*);
extern template LaunchError launch_exact_backward<DType::kBFloat16>(const LceBackwardParams&,
                                                                    const ExactScratch&, const ExactPlan&,
                                                                    const std::optional<Blas>&, int, void*);
extern template LaunchError launch_round_gradient<DType::kFloat16>(const LceBackwardParams&, int, void*);
extern template LaunchError launch_round_gradient<DType::kBFloat16>(const LceBackwardParams&, int, void*);
extern template LaunchError launch_visits_backward<DType::kFloat16>(const LceBackwardParams&,
                                                                    const VisitsScratch&, const VisitsPlan&,
                                                                    int, void*);
extern template LaunchError launch_visits_backward<DType::kBFloat16>(const LceBackwardParams&,
                                                                     const VisitsScratch&, const VisitsPlan&,
                                                                     int, void*);

}  // namespace cce
