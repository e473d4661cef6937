#include "launch/label_logits.cuh"

namespace cce {

template LaunchError launch_label_logits<DType::kFloat16>(const LabelLogitsParams&, int, void*);
template LaunchError launch_label_logits<DType::kBFloat16>(const LabelLogitsParams&, int, void*);

}  // namespace cce
