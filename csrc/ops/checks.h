#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace cce {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  // The one exception type that crosses the stable ABI unharmed; Python sees a RuntimeError.
  throw std::runtime_error(message.str());
}

// Throws with the given parts as the message, which are evaluated only then.
#define CCE_CHECK(condition, ...)               \
  do {                                          \
    if (!(condition)) ::cce::fail(__VA_ARGS__); \
  } while (false)

// A dtype by the name it has in Python.
inline std::string dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_name(const torch::stable::Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

// "float32 [3, 4] on cuda:0"
inline std::string describe(const torch::stable::Tensor& tensor) {
  std::string text = dtype_name(tensor.scalar_type()) + " [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "] on " + device_name(tensor);
}

}  // namespace cce
