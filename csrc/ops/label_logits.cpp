#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "launch/launch.h"
#include "ops/allocate.h"
#include "ops/cuda_scope.h"
#include "ops/inputs.h"
#include "ops/namespace.h"

namespace cce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = CCE_OPERATOR("label_logits: ");

Tensor label_logits(const Tensor& e_in, const Tensor& c_in, const std::optional<Tensor>& bias,
                    const Tensor& targets, std::optional<int64_t> ignore_index, std::optional<double> softcap,
                    const std::optional<Tensor>& scale) {
  const DType dtype = dtype_of(kOp, e_in);
  check_inputs(kOp, e_in, c_in, bias, targets, softcap);
  check_scale(kOp, scale, e_in);
  const CudaScope scope(e_in);
  const Tensor e = with_contiguous_rows(e_in);
  const Tensor c = with_contiguous_rows(c_in);
  const Tensor out =
      allocate(e, {e.size(0)}, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  const LabelLogitsParams params = {loss_inputs(dtype, e, c, bias, targets, ignore_index, softcap),
                                    scale ? scale->const_data_ptr() : nullptr, out.mutable_data_ptr()};
  check_launch(kOp, launch_label_logits(params, scope.device(), scope.stream()), e);
  return out;
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CUDA, m) { m.impl("label_logits", TORCH_BOX(&cce::label_logits)); }
