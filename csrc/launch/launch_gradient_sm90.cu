#include "kernels/gradient_epilogue_sm90.cuh"
#include "launch/launch_gradient_sm90.h"
#include "launch/launch_logits_sm90.cuh"

namespace cce {

template <typename Element>
LaunchError launch_gradient_sm90(const LossInputs& in, const LogitsPlan& plan,
                                 const GradientArguments<Element>& a, void* stream) {
  const auto launch = a.threshold > 0 ? launch_logits_sm90<Element, GradientEpilogueSm90<Element, true>>
                                      : launch_logits_sm90<Element, GradientEpilogueSm90<Element, false>>;
  const LogitsSchedule schedule = plan.schedule(in.n, a.columns);
  return launch(in, a.first_column, a.columns, plan, schedule, LiveRows{}, nullptr, plan.blocks(schedule), a,
                stream);
}

template LaunchError launch_gradient_sm90<__half>(const LossInputs&, const LogitsPlan&,
                                                  const GradientArguments<__half>&, void*);
template LaunchError launch_gradient_sm90<__nv_bfloat16>(const LossInputs&, const LogitsPlan&,
                                                         const GradientArguments<__nv_bfloat16>&, void*);

}  // namespace cce
