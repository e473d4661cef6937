#include "kernels/lse_epilogue_sm90.cuh"
#include "kernels/score_epilogue_sm90.cuh"
#include "launch/launch_forward_sm90.h"
#include "launch/launch_logits_sm90.cuh"

namespace cce {

LaunchError launch_lse_sm90(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
  return dispatch_16bit(p.in.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto launch = [&](auto epilogue, const auto& arguments) {
      using Epilogue = typename decltype(epilogue)::type;
      return launch_logits_sm90<Element, Epilogue>(p.in, 0, p.in.v, plan.logits,
                                                   plan.logits.schedule(p.in.n, p.in.v), live_rows_of(p),
                                                   p.live_e, plan.blocks, arguments, stream);
    };
    if (p.codes != nullptr) {
      return launch(Type<LseEpilogueSm90<Element, LseOf::kKeptLogits>>{}, codes_arguments<Element>(p));
    }
    return p.scored() ? launch(Type<ScoreEpilogueSm90<Element>>{}, score_arguments<Element>(p))
                      : launch(Type<LseEpilogueSm90<Element>>{}, lse_arguments<Element>(p));
  });
}

}  // namespace cce
