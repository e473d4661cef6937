#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "launch/launch.h"
#include "ops/allocate.h"
#include "ops/checks.h"
#include "ops/cuda_scope.h"
#include "ops/inputs.h"
#include "ops/namespace.h"
#include "ops/portable.h"
#include "ops/scan.h"
#include "ops/workspace.h"

namespace cce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = CCE_OPERATOR("lce_forward: ");

void check_scan(const std::string& scan, const std::string& method, double eps, bool need_map,
                const std::optional<Tensor>& seed, bool others, const Tensor& e) {
  CCE_CHECK(scan == "fp8", kOp, "scan must be None or 'fp8', but is '", scan, "'");
  CCE_CHECK(method == "sampled" && need_map && eps > 0 && eps <= 0.5, kOp,
            "scan='fp8' takes method='sampled', eps in (0, 0.5] and need_map=True, which correct the loss by "
            "the visits; got method='",
            method, "', eps=", eps, ", need_map=", need_map ? "True" : "False");
  CCE_CHECK(!others, kOp, "scan='fp8' goes with neither stats, scale nor batch_invariant");
  check_seed(kOp, seed, e);
}

// The seed and the method say how the backward will visit; but for a scan, the forward is the same for all.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lce_forward(
    const Tensor& e_in, const Tensor& c_in, const std::optional<Tensor>& bias, const Tensor& targets,
    const std::optional<Tensor>& seed, std::optional<int64_t> ignore_index, std::optional<double> softcap,
    const std::string& method, double eps, bool, bool, bool need_map, const std::optional<Tensor>& scale,
    int64_t statistics, bool batch_invariant, const std::optional<std::string>& scan, bool keep_logits) {
  const DType dtype = dtype_of(kOp, e_in);
  check_inputs(kOp, e_in, c_in, bias, targets, softcap);
  check_scale(kOp, scale, e_in);
  constexpr int64_t kAll = kEntropy | kLogSumSquares | kMeanLogit | kArgmax;
  CCE_CHECK(statistics >= 0 && statistics <= kAll, kOp, "stats must be in [0, ", kAll, "], but is ",
            statistics);
  const CudaScope scope(e_in);
  const int64_t n = e_in.size(0), v = c_in.size(0);
  const int64_t tiles = ceil_div(v, kTileColumns);
  const Tensor nll = allocate(e_in, {n}, ScalarType::Float);
  const Tensor lse = allocate(e_in, {n}, ScalarType::Float);
  CCE_CHECK(!keep_logits || !(scan || scale || statistics != 0), kOp,
            "keep_logits goes with neither stats, scale nor scan");
  CCE_CHECK(!keep_logits || method == "exact", kOp, "keep_logits is for method exact, but method is ",
            method);
  const Tensor tile_map = keep_logits ? allocate(e_in, {tiles, n, kCodeWords}, ScalarType::Short)
                          : need_map  ? allocate(e_in, {tiles, n}, ScalarType::Short)
                                      : allocate(e_in, {0, 0}, ScalarType::Short);
  if (scan)
    check_scan(*scan, method, eps, need_map, seed, scale.has_value() || statistics != 0 || batch_invariant,
               e_in);
  const bool any = statistics != 0;
  const Tensor stats = allocate(e_in, {any ? kStatistics : 0, any ? n : 0}, ScalarType::Float);
  const Tensor argmax = allocate(e_in, {(statistics & kArgmax) != 0 ? n : 0}, ScalarType::Long);
  if (n == 0) return {nll, lse, tile_map, stats, argmax};

  const Tensor e = with_vector_rows(e_in);
  const Tensor c = with_vector_rows(c_in);
  const LossInputs in = loss_inputs(dtype, e, c, bias, targets, ignore_index, softcap);
  const LceForwardPlan plan = plan_lce_forward(in, device_limits(kOp, e), batch_invariant);
  LceForwardParams params{};
  params.in = in;
  (keep_logits ? params.codes : params.tile_map) =
      keep_logits || need_map ? tile_map.mutable_data_ptr() : nullptr;
  params.nll = static_cast<float*>(nll.mutable_data_ptr());
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.scale = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  params.statistics = static_cast<int>(statistics);
  params.partials = plan.partials;
  if (any) params.stats = static_cast<float*>(stats.mutable_data_ptr());
  if ((statistics & kArgmax) != 0) params.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
  constexpr int64_t word = Workspace::kWord;
  Workspace space;
  space.add(params.label_logits, n * word);
  space.add(params.live_tokens, n * word);
  space.add(params.live_count, kLiveCountBytes);
  if (!scan && !in.all_count()) space.add(params.live_e, n * in.d * Workspace::kElement);
  space.add(params.partial_lse, plan.partials * word);
  if (any) space.add(params.partial_statistics, partial_statistics(statistics) * plan.partials * word);
  Workspace scanned;
  if (scan) {
    CCE_CHECK(plan.logits.kernel == LogitsKernel::kSm90, kOp,
              "scan='fp8' cannot run here: ", plan.logits.reason);
    constexpr int64_t kRowAlignment = 16;
    params.scan.stride = round_up(in.d, kRowAlignment);
    scanned.add(params.scan.e, n * params.scan.stride);
    scanned.add(params.scan.c, v * params.scan.stride);
    scanned.add(params.scan.row_scale, n * word);
    scanned.add(params.scan.tile_scale, tiles * word);
  }
  const Tensor memory = space.allocate(e);
  std::optional<Tensor> scanned_memory;
  if (scan) scanned_memory = scanned.allocate(e);
  const LabelLogitsParams label = {in, params.scale, params.label_logits};
  check_launch(kOp, launch_label_logits(label, scope.device(), scope.stream()), e);
  check_launch(kOp, launch_lce_forward(params, plan, scope.device(), scope.stream()), e);
  if (scan) {
    // What is allocated next may have the same memory: it is used later on the same stream.
    scanned_memory.reset();
    correct_scan(kOp, params, static_cast<const int64_t*>(seed->const_data_ptr()), eps, e, scope);
  }
  return {nll, lse, tile_map, stats, argmax};
}

void boxed(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  sixteen_bit_or<TORCH_BOX(&lce_forward), 0>(CCE_OPERATOR("lce_forward_portable"), stack, num_args,
                                             num_outputs);
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CUDA, m) { m.impl("lce_forward", &cce::boxed); }
