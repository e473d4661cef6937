#pragma once

#include <optional>

#include "launch/heuristics.h"
#include "launch/launch_error.h"
#include "launch/params.h"

// The launchers: each enqueues its kernel on `stream` (a cudaStream_t) of `device` and returns at once, with
// what went wrong where it could not. A launch of no tokens does nothing.
namespace cce {

LaunchError launch_label_logits(const LabelLogitsParams& params, int device, void* stream);

LaunchError launch_pair_logits(const PairLogitsParams& params, int device, void* stream);

LaunchError launch_pair_gradients(const PairGradientsParams& params, const PairGradientsPlan& plan,
                                  int device, void* stream);

// Fills in the limits, for which CUDA is asked once a device. After an error CUDA has nothing left to report.
LaunchError find_device_limits(int device, DeviceLimits& limits);

// CCE_DEBUG=1 in the environment has what waits inside a kernel give up with a message after so many
// milliseconds: CCE_WATCHDOG_MS, or 20 seconds. -1: waits are not limited.
int64_t watchdog_milliseconds();

// fp16 and bf16 only. The label logits must have been computed.
LaunchError launch_lce_forward(const LceForwardParams& params, const LceForwardPlan& plan, int device,
                               void* stream);

// The sum or the mean of nll over the tokens that count; of none too.
LaunchError launch_reduce_nll(const ReduceNllParams& params, int device, void* stream);

// The gradients' weights a token: what the backward launches below begin from.
LaunchError launch_gradient_rows(const LceBackwardParams& params, int device, void* stream);

// All but e's gradient, whose sums are left in sum_e. blas: only a call for bias's gradient alone can do
// without.
LaunchError launch_exact_backward(const LceBackwardParams& params, const ExactScratch& scratch,
                                  const ExactPlan& plan, const std::optional<Blas>& blas, int device,
                                  void* stream);

// Rounds these sums to grad_e, which may be allocated as late as this.
LaunchError launch_round_gradient(const LceBackwardParams& params, int device, void* stream);

// Finds the visits and lists the work. blas: where the plan needs one.
LaunchError launch_visits_plan(const LceBackwardParams& params, const VisitsScratch& scratch,
                               const VisitsPlan& plan, const std::optional<Blas>& blas, int device,
                               void* stream);

// The same without the control variate: for a scan's visits.
LaunchError launch_visits_search(const LceBackwardParams& params, const VisitsScratch& scratch,
                                 const VisitsPlan& plan, int device, void* stream);

// Corrects the log-sum-exps and losses of a forward that scanned, by the visits of a plan_scan_visits().
LaunchError launch_scan_correction(const LceForwardParams& params, const LceBackwardParams& visits,
                                   const VisitsScratch& scratch, const VisitsPlan& plan, int device,
                                   void* stream);

// Does the work.
LaunchError launch_visits(const LceBackwardParams& params, const VisitsScratch& scratch,
                          const VisitsPlan& plan, int device, void* stream);

}  // namespace cce
