#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>

#include "ops/namespace.h"

namespace cce {
namespace {

// "80,90a" as the elements of a JSON list: "80", "90a".
std::string json_strings(const std::string& list) {
  std::istringstream stream(list);
  std::string item, json;
  while (std::getline(stream, item, ',')) json += (json.empty() ? "\"" : ", \"") + item + "\"";
  return json;
}

// What this library was built from and for, as JSON. The CMake build defines the macros.
std::string build_info() {
  std::ostringstream json;
  json << "{\"cuda\": " << (CCE_HAS_CUDA ? "true" : "false")
       << ", \"cuda_version\": " << (CCE_HAS_CUDA ? "\"" CCE_CUDA_VERSION "\"" : "null")
       << ", \"cuda_archs\": [" << (CCE_HAS_CUDA ? json_strings(CCE_CUDA_ARCHS) : "") << "]"
       << ", \"torch_built_with\": \"" TORCH_VERSION "\"" << ", \"torch_target\": \"" CCE_TORCH_TARGET "\""
       << ", \"compiler\": \"" CCE_COMPILER "\"}";
  return json.str();
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&cce::build_info)); }
