#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "launch/launch.h"
#include "ops/inputs.h"
#include "ops/namespace.h"

namespace cce {
namespace {

// What the plans know of a GPU, as JSON.
std::string device_info(int64_t device) {
  DeviceLimits limits{};
  check_launch(CCE_OPERATOR("device_info: "), find_device_limits(static_cast<int>(device), limits),
               static_cast<int32_t>(device));
  std::ostringstream json;
  json << "{\"multiprocessors\": " << limits.multiprocessors << ", \"shared_bytes\": " << limits.shared_bytes
       << ", \"compute_capability\": [" << limits.major << ", " << limits.minor << "], \"sm90_kernels\": "
       << (limits.has_sm90 && limits.major == 9 && limits.minor == 0 ? "true" : "false") << "}";
  return json.str();
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("device_info", TORCH_BOX(&cce::device_info)); }
