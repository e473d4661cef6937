#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "launch/launch.h"
#include "ops/allocate.h"
#include "ops/checks.h"
#include "ops/cuda_scope.h"
#include "ops/inputs.h"
#include "ops/namespace.h"
#include "ops/workspace.h"

namespace cce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType sums_of(DType dtype) { return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// Of e [N, D], c [V, D], bias [V] and targets [N, K]: as for the first of a token's labels.
void check_pairs(const char* op, const char* name, const Tensor& e, const Tensor& c,
                 const std::optional<Tensor>& bias, const Tensor& targets, std::optional<double> softcap) {
  CCE_CHECK(e.dim() == 2, op, "e must be [N, D], but is ", describe(e));
  CCE_CHECK(targets.dim() == 2 && targets.size(0) == e.size(0) && targets.size(1) > 0, op, name,
            " must be [N, K] with N = ", e.size(0), " as in e, and K > 0, but is ", describe(targets));
  check_inputs(op, e, c, bias, torch::stable::select(targets, 1, 0), softcap);
}

Tensor pair_logits(const Tensor& e_in, const Tensor& c_in, const std::optional<Tensor>& bias,
                   const Tensor& targets_in, int64_t ignore_index, std::optional<double> softcap) {
  constexpr const char* kOp = CCE_OPERATOR("pair_logits: ");
  const DType dtype = dtype_of(kOp, e_in);
  check_pairs(kOp, "targets", e_in, c_in, bias, targets_in, softcap);
  const CudaScope scope(e_in);
  const Tensor e = with_contiguous_rows(e_in), c = with_contiguous_rows(c_in);
  const Tensor targets = with_contiguous_memory(targets_in);
  const int64_t k = targets.size(1);
  const Tensor out = allocate(e, {e.size(0), k}, sums_of(dtype));
  PairLogitsParams params{};
  params.in = loss_inputs(dtype, e, c, bias, torch::stable::select(targets, 1, 0), ignore_index, softcap);
  params.targets = targets.const_data_ptr();
  params.k = k;
  params.out = out.mutable_data_ptr();
  check_launch(kOp, launch_pair_logits(params, scope.device(), scope.stream()), e);
  return out;
}

void add_pair_gradients(const Tensor& coefficients, const Tensor& labels, const std::optional<Tensor>& order,
                        const Tensor& e_in, const Tensor& c_in, const std::optional<Tensor>& grad_e,
                        const std::optional<Tensor>& grad_c, const std::optional<Tensor>& grad_bias) {
  constexpr const char* kOp = CCE_OPERATOR("add_pair_gradients: ");
  const DType dtype = dtype_of(kOp, e_in);
  check_pairs(kOp, "labels", e_in, c_in, std::nullopt, labels, std::nullopt);
  const int64_t n = e_in.size(0), d = e_in.size(1), v = c_in.size(0), k = labels.size(1);
  const ScalarType sums = sums_of(dtype);
  CCE_CHECK(labels.scalar_type() == ScalarType::Int && labels.is_contiguous(), kOp,
            "labels must be int32 and contiguous, but is ", describe(labels));
  CCE_CHECK(coefficients.dim() == 2 && coefficients.size(0) == n && coefficients.size(1) == k &&
                coefficients.scalar_type() == sums && coefficients.is_contiguous(),
            kOp, "coefficients must be contiguous ", dtype_name(sums), " of labels' shape, but is ",
            describe(coefficients));
  check_device(kOp, "coefficients", coefficients, e_in);
  const auto check_gradient = [&](const std::optional<Tensor>& gradient, const char* name, const Tensor& of,
                                  int64_t dim) {
    if (!gradient) return;
    bool fits = gradient->dim() == dim && gradient->scalar_type() == of.scalar_type() &&
                gradient->is_contiguous() && gradient->size(0) == of.size(0);
    fits = fits && (dim == 1 || gradient->size(1) == d);
    CCE_CHECK(fits, kOp, name, " must be contiguous and of the shape and dtype of what it is of, but is ",
              describe(*gradient));
    check_device(kOp, name, *gradient, e_in);
  };
  check_gradient(grad_e, "grad_e", e_in, 2);
  check_gradient(grad_c, "grad_c", c_in, 2);
  check_gradient(grad_bias, "grad_bias", c_in, 1);
  if (grad_c || grad_bias) {
    CCE_CHECK(order && order->dim() == 1 && order->size(0) == n * k &&
                  order->scalar_type() == ScalarType::Long && order->is_contiguous(),
              kOp, "order must be contiguous int64 [N K], the pairs sorted by label, but is ",
              order ? describe(*order) : "None");
    check_device(kOp, "order", *order, e_in);
  }
  const CudaScope scope(e_in);
  const Tensor e = with_contiguous_rows(e_in), c = with_contiguous_rows(c_in);
  const auto written = [](const std::optional<Tensor>& gradient) {
    return gradient ? gradient->mutable_data_ptr() : nullptr;
  };
  PairGradientsParams params{};
  params.in = loss_inputs(dtype, e, c, std::nullopt, torch::stable::select(labels, 1, 0), -1, std::nullopt);
  params.k = k;
  params.coefficients = coefficients.const_data_ptr();
  params.labels = static_cast<const int*>(labels.const_data_ptr());
  params.order = order ? static_cast<const int64_t*>(order->const_data_ptr()) : nullptr;
  params.grad_e = written(grad_e);
  params.grad_c = written(grad_c);
  params.grad_bias = written(grad_bias);
  const PairGradientsPlan plan = plan_pair_gradients(params);
  const int64_t bytes = dtype == DType::kFloat64 ? 8 : 4;
  Workspace space;
  if (v > 0 && grad_c) space.add(params.edges, plan.segments * 2 * d * bytes);
  if (v > 0 && grad_bias) space.add(params.edge_biases, plan.segments * 2 * bytes);
  std::optional<Tensor> memory;
  if (!space.empty()) memory = space.allocate(e);
  check_launch(kOp, launch_pair_gradients(params, plan, scope.device(), scope.stream()), e);
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CUDA, m) {
  m.impl("pair_logits", TORCH_BOX(&cce::pair_logits));
  m.impl("add_pair_gradients", TORCH_BOX(&cce::add_pair_gradients));
}
