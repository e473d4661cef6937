#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "launch/launch.h"
#include "ops/allocate.h"
#include "ops/checks.h"
#include "ops/cuda_scope.h"
#include "ops/inputs.h"
#include "ops/namespace.h"

namespace cce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = CCE_OPERATOR("reduce_nll: ");

std::tuple<Tensor, Tensor> reduce_nll(const Tensor& nll_in, const Tensor& targets, int64_t ignore_index,
                                      bool mean) {
  CCE_CHECK(nll_in.is_cuda() && nll_in.dim() == 1 && nll_in.scalar_type() == ScalarType::Float, kOp,
            "nll must be float32 [N] on a CUDA device, but is ", describe(nll_in));
  const int64_t n = nll_in.size(0);
  CCE_CHECK(n <= INT32_MAX, kOp, "nll may have 2^31 elements at most, but is ", describe(nll_in));
  CCE_CHECK(targets.dim() == 1 && targets.size(0) == n, kOp, "targets must be [N] with N = ", n,
            " as in nll, but is ", describe(targets));
  CCE_CHECK(targets.scalar_type() == ScalarType::Int || targets.scalar_type() == ScalarType::Long, kOp,
            "targets must be int32 or int64, but is ", describe(targets));
  CCE_CHECK(targets.is_cuda() && targets.get_device_index() == nll_in.get_device_index(), kOp,
            "targets must be on nll's device, ", device_name(nll_in), ", but is ", describe(targets));
  const CudaScope scope(nll_in);
  const Tensor nll = with_contiguous_memory(nll_in);
  const Tensor loss = allocate(nll, {});
  const Tensor count = allocate(nll, {});
  ReduceNllParams params{};
  params.nll = static_cast<const float*>(nll.const_data_ptr());
  params.targets = targets.const_data_ptr();
  params.target_stride = targets.stride(0);
  params.targets_are_int64 = targets.scalar_type() == ScalarType::Long;
  params.ignore_index = ignore_index;
  params.n = n;
  params.mean = mean;
  params.loss = static_cast<float*>(loss.mutable_data_ptr());
  params.count = static_cast<float*>(count.mutable_data_ptr());
  check_launch(kOp, launch_reduce_nll(params, scope.device(), scope.stream()), nll);
  return {loss, count};
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CUDA, m) { m.impl("reduce_nll", TORCH_BOX(&cce::reduce_nll)); }
