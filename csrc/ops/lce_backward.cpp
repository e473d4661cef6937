#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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
#include "ops/workspace.h"

namespace cce {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = CCE_OPERATOR("lce_backward: ");

// Which gradients a pass writes.
struct Sides {
  bool e, c, bias;
  bool any() const { return e || c || bias; }
};

LceBackwardParams only(LceBackwardParams params, const Sides& sides) {
  if (!sides.e) {
    params.grad_e = nullptr;
    params.sum_e = nullptr;
  }
  if (!sides.c) params.grad_c = nullptr;
  if (!sides.bias) params.grad_bias = nullptr;
  return params;
}

// All but e's gradient, which is left in params.sum_e. threshold: the filter's, or 0 for none. codes: the
// logits, where the forward has kept them.
void exact(const LceBackwardParams& params, double threshold, const void* codes, const Tensor& e,
           const CudaScope& scope) {
  const LossInputs& in = params.in;
  const bool products = params.sum_e != nullptr || params.grad_c != nullptr;
  const std::optional<Blas> blas = products ? std::optional<Blas>(current_blas()) : std::nullopt;
  const ExactPlan plan =
      plan_exact(in, params.sum_e != nullptr, params.grad_c != nullptr, device_limits(kOp, e));
  ExactScratch scratch{};
  scratch.threshold = threshold;
  scratch.codes = codes;
  Workspace space;
  space.add(scratch.dz, in.n * plan.chunk_columns * Workspace::kElement);
  space.add(scratch.factors, 2 * Workspace::kWord);
  const Tensor memory = space.allocate(e);
  check_launch(kOp, launch_exact_backward(params, scratch, plan, blas, scope.device(), scope.stream()), e);
}

void round_gradient(const LceBackwardParams& params, const Tensor& e, const CudaScope& scope) {
  check_launch(kOp, launch_round_gradient(params, scope.device(), scope.stream()), e);
}

// The sampled pass of some sides: its plan, and its scratch memory.
struct Visits {
  VisitsPlan plan;
  VisitsScratch scratch{};
  // Of what is done with before the ring is wanted, and of the ring, which takes its place.
  Workspace early, late;

  // Not to be copied: a workspace keeps where in `scratch` it will write its parts.
  Visits(const Visits&) = delete;
  Visits& operator=(const Visits&) = delete;

  Visits(const LossInputs& in, const Sides& sides, const Tensor& e)
      : plan(plan_visits(in, sides.e, sides.c, sides.bias, device_limits(kOp, e))) {
    plan.wait_milliseconds = watchdog_milliseconds();
  }

  // Adds all parts but the counts. sum_e: becomes where dE's sums lie, unless they are borrowed.
  void add_parts(Workspace& space, const LossInputs& in, const Sides& sides, float*& sum_e) {
    const VisitLayout& layout = plan.layout;
    const int64_t tiles = plan.tiles;
    constexpr int64_t element = Workspace::kElement, word = Workspace::kWord;
    if (sides.e && !layout.borrows()) space.add(sum_e, in.n * in.d * word);
    space.add(scratch.mask, tiles * plan.words * word);
    space.add(scratch.order, layout.strips * word);
    space.add(scratch.chunk_begins, 2 * (layout.max_chunks + 1) * word);
    space.add(scratch.pending, layout.max_gates() * word);
    space.add(scratch.items, layout.max_items * static_cast<int64_t>(sizeof(VisitItem)));
    space.add(scratch.mean, in.d * element);
    if (!plan.few_tokens) space.add(scratch.mean_sums, kMeanSplits * in.d * word);
    if (sides.c) space.add(scratch.residual_e, tiles * in.d * element);
    if (sides.bias) space.add(scratch.residual_sums, tiles * word);
    if (!plan.shape.finds_centroids) space.add(scratch.weights, tiles * kTileColumns * element);
    // Unless the visits find the centroids, these are done with before the ring is wanted: they never live
    // together.
    Workspace& of_centroids = layout.finds_centroids ? space : early;
    of_centroids.add(scratch.centroids, tiles * in.d * element);
    if (!(layout.borrows() && layout.finds_centroids)) {
      of_centroids.add(scratch.residual, tiles * layout.residual_stride * element);
    }
    Workspace& of_ring = early.empty() ? space : late;
    of_ring.add(scratch.dz, layout.ring_rows() * layout.columns * element);
    of_ring.add(scratch.tokens, layout.ring_rows() * word);
  }

  void launch(const LceBackwardParams& params, const Tensor& e, const CudaScope& scope) {
    std::optional<Tensor> early_memory, late_memory;
    if (!early.empty()) early_memory = early.allocate(e);
    const std::optional<Blas> blas =
        plan.needs_blas(params.grad_c != nullptr) ? std::optional<Blas>(current_blas()) : std::nullopt;
    check_launch(kOp, launch_visits_plan(params, scratch, plan, blas, scope.device(), scope.stream()), e);
    // What is allocated next may have the same memory: it is used later on the same stream.
    early_memory.reset();
    if (!late.empty()) late_memory = late.allocate(e);
    check_launch(kOp, launch_visits(params, scratch, plan, scope.device(), scope.stream()), e);
  }
};

// A gradient as wide as the input was before its rows were padded.
Tensor unpadded(const Tensor& gradient, int64_t width) {
  if (gradient.dim() != 2 || gradient.size(1) == width) return gradient;
  return torch::stable::contiguous(torch::stable::narrow(const_cast<Tensor&>(gradient), 1, 0, width));
}

std::tuple<Tensor, Tensor, Tensor> lce_backward(
    const std::optional<Tensor>& g_nll, const std::optional<Tensor>& g_lse,
    const std::optional<Tensor>& g_entropy, const Tensor& e_in, const Tensor& c_in,
    const std::optional<Tensor>& bias, const Tensor& targets, const Tensor& nll_in, const Tensor& lse_in,
    const Tensor& tile_map_in, const std::optional<Tensor>& entropy_in, const std::optional<Tensor>& seed,
    std::optional<int64_t> ignore_index, std::optional<double> softcap, const std::string& method, double eps,
    bool filter_e, bool filter_c, bool need_e, bool need_c, bool need_bias,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& count) {
  const DType dtype = dtype_of(kOp, e_in);
  check_inputs(kOp, e_in, c_in, bias, targets, softcap);
  const int64_t n = e_in.size(0), d = e_in.size(1), v = c_in.size(0);
  const auto check_tokens = [&](const Tensor& tensor, const char* name) {
    CCE_CHECK(tensor.dim() == 1 && tensor.size(0) == n && tensor.scalar_type() == ScalarType::Float, kOp,
              name, " must be float32 [N] with N = ", n, ", but is ", describe(tensor));
    check_device(kOp, name, tensor, e_in);
  };
  if (g_nll) check_tokens(*g_nll, "g_nll");
  if (g_lse) check_tokens(*g_lse, "g_lse");
  if (g_entropy) {
    check_tokens(*g_entropy, "g_entropy");
    CCE_CHECK(entropy_in, kOp, "entropy must be given with g_entropy, but is None");
    check_tokens(*entropy_in, "entropy");
  }
  check_scale(kOp, scale, e_in);
  if (count) {
    CCE_CHECK(count->dim() == 0 && count->scalar_type() == ScalarType::Float, kOp,
              "count must be a float32 scalar, but is ", describe(*count));
    check_device(kOp, "count", *count, e_in);
  }
  check_tokens(nll_in, "nll");
  check_tokens(lse_in, "lse");
  const bool sampled = method == "sampled", threshold = method == "threshold", exactly = method == "exact";
  CCE_CHECK(sampled || threshold || exactly, kOp, "method must be sampled, exact or threshold, but is ",
            method);
  CCE_CHECK(!sampled || (eps > 0 && eps <= 0.5), kOp,
            "eps of the sampled method must be in (0, 0.5], but is ", eps);
  CCE_CHECK(!threshold || (eps > 0 && eps < 1), kOp, "eps, the threshold, must be in (0, 1), but is ", eps);
  // A forward with keep_logits has left the logits in the map's place.
  const bool kept = tile_map_in.dim() == 3;
  if (kept) {
    CCE_CHECK(exactly, kOp, "tile_map holds logits (keep_logits), which method exact takes, but method is ",
              method);
    CCE_CHECK(tile_map_in.size(0) == ceil_div(v, kTileColumns) && tile_map_in.size(1) == n &&
                  tile_map_in.size(2) == kCodeWords && tile_map_in.scalar_type() == ScalarType::Short,
              kOp, "tile_map of kept logits must be int16 [", ceil_div(v, kTileColumns), ", ", n, ", ",
              kCodeWords, "], but is ", describe(tile_map_in));
    CCE_CHECK(!scale && !g_entropy, kOp, "kept logits (keep_logits) go with neither scale nor g_entropy");
    check_device(kOp, "tile_map", tile_map_in, e_in);
  }
  if (sampled) {
    CCE_CHECK(tile_map_in.dim() == 2 && tile_map_in.size(0) == ceil_div(v, kTileColumns) &&
                  tile_map_in.size(1) == n && tile_map_in.scalar_type() == ScalarType::Short,
              kOp, "tile_map must be int16 [", ceil_div(v, kTileColumns), ", ", n, "], but is ",
              describe(tile_map_in), " (lce_forward leaves none with need_map=False)");
    check_device(kOp, "tile_map", tile_map_in, e_in);
    check_seed(kOp, seed, e_in);
  }

  const Sides need = {need_e, need_c, need_bias && bias.has_value()};
  const CudaScope scope(e_in);
  // cuBLAS takes no rows that overlap.
  const Tensor e = with_separate_rows(with_vector_rows(e_in));
  const Tensor c = with_separate_rows(with_vector_rows(c_in));
  const int64_t width = e.size(1);
  // Without tokens, or without a vocabulary, as a shard may be.
  const bool nothing = n == 0 || v == 0;
  const auto gradient = [&](bool needed, std::initializer_list<int64_t> shape) {
    if (!needed) return allocate(e, {0});
    return nothing ? torch::stable::new_zeros(e, shape) : allocate(e, shape);
  };
  // Of the exact pass e's gradient comes last: with it, the pass would need more memory.
  std::optional<Tensor> grad_e;
  if (nothing || !need.e) grad_e = gradient(need.e, {n, width});
  const Tensor grad_c = gradient(need.c, {v, width});
  const Tensor grad_bias = gradient(need.bias, {v});

  if (!nothing && need.any()) {
    const Tensor nll = with_contiguous_memory(nll_in);
    const Tensor lse = with_contiguous_memory(lse_in);
    const Tensor tile_map = with_contiguous_memory(tile_map_in);
    LceBackwardParams params{};
    params.in = loss_inputs(dtype, e, c, bias, targets, ignore_index, softcap);
    if (g_nll) {
      params.g_nll = static_cast<const float*>(g_nll->const_data_ptr());
      params.g_nll_stride = g_nll->stride(0);
    }
    if (g_lse) {
      params.g_lse = static_cast<const float*>(g_lse->const_data_ptr());
      params.g_lse_stride = g_lse->stride(0);
    }
    std::optional<Tensor> entropy;
    if (g_entropy) {
      entropy = with_contiguous_memory(*entropy_in);
      params.g_entropy = static_cast<const float*>(g_entropy->const_data_ptr());
      params.g_entropy_stride = g_entropy->stride(0);
      params.entropy = static_cast<const float*>(entropy->const_data_ptr());
    }
    if (count) params.count = static_cast<const float*>(count->const_data_ptr());
    if (scale) params.scale = static_cast<const float*>(scale->const_data_ptr());
    params.nll = static_cast<const float*>(nll.const_data_ptr());
    params.lse = static_cast<const float*>(lse.const_data_ptr());
    params.grad_c = grad_c.mutable_data_ptr();
    params.grad_bias = grad_bias.mutable_data_ptr();
    const void* codes = kept ? tile_map.const_data_ptr() : nullptr;
    // A side that asks for its whole gradient takes it from a pass over every pair.
    const bool part_e = !exactly && filter_e, part_c = !exactly && filter_c;
    const Sides whole = {need.e && !part_e, need.c && !part_c, need.bias && !part_c};
    const Sides part = {need.e && part_e, need.c && part_c, need.bias && part_c};

    constexpr int64_t word = Workspace::kWord;
    std::optional<Visits> visits;
    if (sampled && part.any()) {
      visits.emplace(params.in, part, e);
      visits->scratch.tile_map = tile_map.const_data_ptr();
      visits->scratch.seed = static_cast<const int64_t*>(seed->const_data_ptr());
      visits->scratch.eps = eps;
    }
    Workspace space;
    space.add(params.rows, n * 4 * word);
    const int64_t zeros = space.bytes();
    space.add(params.control, static_cast<int64_t>(sizeof(VisitControl)));
    if (visits) space.add(visits->scratch.counts, visits->plan.tiles * word);
    params.zeroed_bytes = space.bytes() - zeros;
    if (g_entropy || scale) space.add(params.scores, n * kTokenScoreBytes);
    // The sampled method has its own way with e's sums.
    if (need.e && (!sampled || !filter_e)) space.add(params.sum_e, n * width * word);
    // After a pass over every pair, whose memory is given back first.
    Workspace of_visits;
    if (visits) visits->add_parts(whole.any() ? of_visits : space, params.in, part, params.sum_e);
    const Tensor memory = space.allocate(e);

    check_launch(kOp, launch_gradient_rows(params, scope.device(), scope.stream()), e);
    if (whole.any()) exact(only(params, whole), 0.0, codes, e, scope);
    if (part.any() && threshold) exact(only(params, part), eps, nullptr, e, scope);
    if (need.e) {
      grad_e = gradient(true, {n, width});
      params.grad_e = grad_e->mutable_data_ptr();
      if (!sampled || whole.e) round_gradient(params, e, scope);
    }
    if (visits) {
      std::optional<Tensor> visits_memory;
      if (!of_visits.empty()) visits_memory = of_visits.allocate(e);
      visits->launch(only(params, part), e, scope);
    }
  }
  return {unpadded(*grad_e, d), unpadded(grad_c, d), grad_bias};
}

void boxed(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  sixteen_bit_or<TORCH_BOX(&lce_backward), 3>(CCE_OPERATOR("lce_backward_portable"), stack, num_args,
                                              num_outputs);
}

}  // namespace
}  // namespace cce

CCE_TORCH_LIBRARY_IMPL(CUDA, m) { m.impl("lce_backward", &cce::boxed); }
