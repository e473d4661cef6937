#include "launch/label_logits.cuh"

namespace cce {

template LaunchError launch_label_logits<DType::kFloat32>(const LabelLogitsParams&, int, void*);
template LaunchError launch_label_logits<DType::kFloat64>(const LabelLogitsParams&, int, void*);

}  // namespace cce
