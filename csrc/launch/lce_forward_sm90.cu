#include "kernels/lse_epilogue_sm90.cuh"
#include "launch/lce_forward_sm90.h"
#include "launch/logits_sm90.cuh"

namespace cce {

template <DType kDType>
LaunchError launch_lse_sm90(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
  using Element = typename TypesOf<kDType>::Element;
  using Epilogue = LseEpilogueSm90<Element, kSm90PolynomialEighths>;
  return launch_logits_sm90<Element, Epilogue>(p.in, 0, p.in.v, plan.logits, plan.schedule,
                                               lse_arguments<Element>(p), stream);
}

template LaunchError launch_lse_sm90<DType::kFloat16>(const LceForwardParams&, const LceForwardPlan&, void*);
template LaunchError launch_lse_sm90<DType::kBFloat16>(const LceForwardParams&, const LceForwardPlan&, void*);

}  // namespace cce
