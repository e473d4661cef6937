#include "ops/inputs.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>

#include "ops/allocate.h"
#include "ops/checks.h"

namespace cce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const char* op, const Tensor& e) {
  switch (e.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(op, "e must be float16, bfloat16, float32 or float64, but is ", describe(e));
  }
}

void check_inputs(const char* op, const Tensor& e, const Tensor& c, const std::optional<Tensor>& bias,
                  const Tensor& targets, std::optional<double> softcap) {
  CCE_CHECK(e.dim() == 2, op, "e must be [N, D], but is ", describe(e));
  CCE_CHECK(c.dim() == 2 && c.size(1) == e.size(1), op, "c must be [V, D] with D = ", e.size(1),
            " as in e, but is ", describe(c));
  CCE_CHECK(c.scalar_type() == e.scalar_type(), op, "c must have e's dtype, ", dtype_name(e.scalar_type()),
            ", but is ", describe(c));
  CCE_CHECK(targets.dim() == 1 && targets.size(0) == e.size(0), op,
            "targets must be [N] with N = ", e.size(0), " as in e, but is ", describe(targets));
  CCE_CHECK(targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long, op,
            "targets must be int32 or int64, but is ", describe(targets));
  if (bias) {
    CCE_CHECK(bias->dim() == 1 && bias->size(0) == c.size(0), op, "bias must be [V] with V = ", c.size(0),
              " as in c, but is ", describe(*bias));
    CCE_CHECK(bias->scalar_type() == e.scalar_type(), op, "bias must have e's dtype, ",
              dtype_name(e.scalar_type()), ", but is ", describe(*bias));
  }
  CCE_CHECK(e.is_cuda(), op, "e must be on a CUDA device as another argument is, but is ", describe(e));
  check_device(op, "c", c, e);
  check_device(op, "targets", targets, e);
  if (bias) check_device(op, "bias", *bias, e);
  CCE_CHECK(!softcap || (*softcap > 0 && std::isfinite(*softcap)), op,
            "softcap must be positive and finite, but is ", *softcap);
  CCE_CHECK(e.size(0) <= INT32_MAX - 1024, op, "e may have 2^31 rows at most, but is ", describe(e));
  CCE_CHECK(c.size(0) <= INT32_MAX - 1024, op, "c may have 2^31 rows at most, but is ", describe(c));
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& e) {
  CCE_CHECK(tensor.is_cuda() && tensor.get_device_index() == e.get_device_index(), op, name,
            " must be on e's device, ", device_name(e), ", but is ", describe(tensor));
}

void check_scale(const char* op, const std::optional<Tensor>& scale, const Tensor& e) {
  if (!scale) return;
  const ScalarType dtype = e.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  CCE_CHECK(scale->dim() == 1 && scale->size(0) == e.size(0) && scale->scalar_type() == dtype &&
                (scale->size(0) <= 1 || scale->stride(0) == 1),
            op, "scale must be contiguous ", dtype_name(dtype), " [N] with N = ", e.size(0), ", but is ",
            describe(*scale));
  check_device(op, "scale", *scale, e);
}

void check_seed(const char* op, const std::optional<Tensor>& seed, const Tensor& e) {
  CCE_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cuda() &&
                seed->get_device_index() == e.get_device_index(),
            op, "seed must be one int64 on e's device for the sampled method, but is ",
            seed ? describe(*seed) : "None");
}

Tensor with_contiguous_memory(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor with_vector_rows(const Tensor& tensor) {
  constexpr int64_t kElements = 8;
  const int64_t rows = tensor.size(0), d = tensor.size(1);
  const bool whole = d > 0 && d % kElements == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 &&
                       (rows <= 1 || (tensor.stride(0) % kElements == 0 && tensor.stride(0) >= 0));
  if (whole && aligned && tensor.stride(1) == 1) return tensor;
  const int64_t width = whole ? d : (d / kElements + 1) * kElements;
  Tensor copy = whole ? allocate(tensor, {rows, width}) : torch::stable::new_zeros(tensor, {rows, width});
  if (d > 0) {
    Tensor part = torch::stable::narrow(copy, 1, 0, d);
    torch::stable::copy_(part, tensor);
  }
  return copy;
}

Tensor with_separate_rows(const Tensor& tensor) {
  return tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1) ? tensor
                                                                   : torch::stable::contiguous(tensor);
}

LossInputs loss_inputs(DType dtype, const Tensor& e, const Tensor& c, const std::optional<Tensor>& bias,
                       const Tensor& targets, std::optional<int64_t> ignore_index,
                       std::optional<double> softcap) {
  LossInputs in{};
  in.e = e.const_data_ptr();
  in.c = c.const_data_ptr();
  in.targets = targets.const_data_ptr();
  in.n = e.size(0);
  in.d = e.size(1);
  in.v = c.size(0);
  in.e_row_stride = e.stride(0);
  in.c_row_stride = c.stride(0);
  in.target_stride = targets.stride(0);
  if (bias) {
    in.bias = bias->const_data_ptr();
    in.bias_stride = bias->stride(0);
  }
  in.ignore_index = ignore_index.value_or(kIgnoreNone);
  in.softcap = softcap.value_or(0.0);
  in.dtype = dtype;
  in.targets_are_int64 = targets.scalar_type() == ScalarType::Long;
  return in;
}

void check_launch(const char* op, const LaunchError& error, const Tensor& e) {
  check_launch(op, error, e.get_device_index());
}

void check_launch(const char* op, const LaunchError& error, int32_t device) {
  CCE_CHECK(!error, op, error.source, " failed on cuda:", device, ": ", error.text,
            error.no_kernel ? " (this library has kernels for GPU architectures " CCE_CUDA_ARCHS
                              ": build it on this machine, or with CCE_CUDA_ARCHS)"
                            : "");
}

DeviceLimits device_limits(const char* op, const Tensor& e) {
  DeviceLimits limits{};
  check_launch(op, find_device_limits(e.get_device_index(), limits), e);
  return limits;
}

}  // namespace cce
