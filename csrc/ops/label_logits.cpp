#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "launch/launch.h"
#include "launch/params.h"
#include "ops/checks.h"
#include "ops/cuda_scope.h"

namespace cce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& e) {
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
      fail("cce::label_logits: e must be float16, bfloat16, float32 or float64, but is ", describe(e));
  }
}

void check_label_logits(const Tensor& e, const Tensor& c, const std::optional<Tensor>& bias,
                        const Tensor& targets, std::optional<double> softcap) {
  constexpr const char* kOp = "cce::label_logits: ";
  CCE_CHECK(e.dim() == 2, kOp, "e must be [N, D], but is ", describe(e));
  CCE_CHECK(c.dim() == 2 && c.size(1) == e.size(1), kOp, "c must be [V, D] with D = ", e.size(1),
            " as in e, but is ", describe(c));
  CCE_CHECK(c.scalar_type() == e.scalar_type(), kOp, "c must have e's dtype, ", dtype_name(e.scalar_type()),
            ", but is ", describe(c));
  CCE_CHECK(targets.dim() == 1 && targets.size(0) == e.size(0), kOp,
            "targets must be [N] with N = ", e.size(0), " as in e, but is ", describe(targets));
  CCE_CHECK(targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long, kOp,
            "targets must be int32 or int64, but is ", describe(targets));
  if (bias) {
    CCE_CHECK(bias->dim() == 1 && bias->size(0) == c.size(0), kOp, "bias must be [V] with V = ", c.size(0),
              " as in c, but is ", describe(*bias));
    CCE_CHECK(bias->scalar_type() == e.scalar_type(), kOp, "bias must have e's dtype, ",
              dtype_name(e.scalar_type()), ", but is ", describe(*bias));
  }
  const auto check_device = [&](const Tensor& tensor, const char* name) {
    CCE_CHECK(tensor.is_cuda() && tensor.get_device_index() == e.get_device_index(), kOp, name,
              " must be on e's device, ", device_name(e), ", but is ", describe(tensor));
  };
  CCE_CHECK(e.is_cuda(), kOp, "e must be on a CUDA device as another argument is, but is ", describe(e));
  check_device(c, "c");
  check_device(targets, "targets");
  if (bias) check_device(*bias, "bias");
  CCE_CHECK(!softcap || (*softcap > 0 && std::isfinite(*softcap)), kOp,
            "softcap must be positive and finite, but is ", *softcap);
}

// The tensor itself where its last dimension is contiguous, whatever its row stride; else a contiguous copy.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

const char* launch(const LabelLogitsParams& params, const CudaScope& scope) {
  switch (params.dtype) {
    case DType::kFloat16:
      return launch_label_logits<DType::kFloat16>(params, scope.device(), scope.stream());
    case DType::kBFloat16:
      return launch_label_logits<DType::kBFloat16>(params, scope.device(), scope.stream());
    case DType::kFloat32:
      return launch_label_logits<DType::kFloat32>(params, scope.device(), scope.stream());
    case DType::kFloat64:
      return launch_label_logits<DType::kFloat64>(params, scope.device(), scope.stream());
  }
  return "unknown dtype";
}

Tensor label_logits(const Tensor& e_in, const Tensor& c_in, const std::optional<Tensor>& bias,
                    const Tensor& targets, int64_t ignore_index, std::optional<double> softcap) {
  const DType dtype = dtype_of(e_in);
  check_label_logits(e_in, c_in, bias, targets, softcap);
  const CudaScope scope(e_in);
  const Tensor e = with_contiguous_rows(e_in);
  const Tensor c = with_contiguous_rows(c_in);
  const Tensor out = torch::stable::new_empty(
      e, {e.size(0)}, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  LabelLogitsParams params{};
  params.e = e.const_data_ptr();
  params.c = c.const_data_ptr();
  params.targets = targets.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.n = e.size(0);
  params.d = e.size(1);
  params.v = c.size(0);
  params.e_row_stride = e.stride(0);
  params.c_row_stride = c.stride(0);
  params.target_stride = targets.stride(0);
  if (bias) {
    params.bias = bias->const_data_ptr();
    params.bias_stride = bias->stride(0);
  }
  params.ignore_index = ignore_index;
  params.softcap = softcap.value_or(0.0);
  params.dtype = dtype;
  params.targets_are_int64 = targets.scalar_type() == ScalarType::Long;
  const char* error = launch(params, scope);
  CCE_CHECK(error == nullptr, "cce::label_logits: the kernel could not be launched on ", device_name(e), ": ",
            error, " (this library has kernels for GPU architectures " CCE_CUDA_ARCHS ")");
  return out;
}

}  // namespace
}  // namespace cce

STABLE_TORCH_LIBRARY_IMPL(cce, CUDA, m) { m.impl("label_logits", TORCH_BOX(&cce::label_logits)); }
