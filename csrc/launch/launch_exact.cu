#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "kernels/gradient_epilogue.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/logit_codes.cuh"
#include "launch/arguments.cuh"
#include "launch/cublas.h"
#include "launch/launch.h"
#include "launch/launch_gradient_sm90.h"
#include "launch/launch_live_product.cuh"
#include "launch/launch_logits_sm80.cuh"

namespace cce {
namespace {

// dz of a chunk.
template <typename Element>
LaunchError launch_gradient(const LossInputs& in, const LogitsPlan& plan, const GradientArguments<Element>& a,
                            void* stream) {
#if CCE_HAS_SM90
  if (plan.kernel == LogitsKernel::kSm90) return launch_gradient_sm90<Element>(in, plan, a, stream);
#endif
  const auto launch = a.threshold > 0 ? launch_logits_sm80<Element, GradientEpilogue<Element, true>>
                                      : launch_logits_sm80<Element, GradientEpilogue<Element, false>>;
  const LogitsSchedule schedule = plan.schedule(in.n, a.columns);
  return launch(in, a.first_column, a.columns, plan, schedule, LiveRows{}, nullptr, plan.blocks(schedule), a,
                stream);
}

// The same from the logits that the forward has kept.
template <typename Element>
LaunchError launch_gradient_of_codes(const LceBackwardParams& p, const ExactScratch& scratch,
                                     const GradientArguments<Element>& a, cudaStream_t on) {
  CodesGradientArguments<Element> g;
  g.gradient = a;
  g.codes = codes_of(const_cast<void*>(scratch.codes), p.in);
  g.nll = p.nll;
  g.first_tile = a.first_column / kTileColumns;
  g.tiles = static_cast<int>(ceil_div(a.columns, kTileColumns));
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.n * g.tiles, kCodesThreads / kWarpLanes));
  gradient_of_codes_kernel<Element><<<blocks, kCodesThreads, 0, on>>>(g);
  return cuda_error(cudaGetLastError());
}

// Chunk by chunk of the vocabulary: dz, then its products with E and C.
template <typename Element>
LaunchError launch_exact(const LceBackwardParams& p, const ExactScratch& scratch, const ExactPlan& plan,
                         const std::optional<Blas>& blas, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  std::optional<Cublas> cublas;
  if (blas) cublas.emplace(*blas, p.in.dtype);

  const uint32_t* largest = &control_of(p)->largest;
  // bf16 has no scale; of fp16's only the device knows.
  const bool scaled = std::is_same_v<Element, __half>;
  if (scaled) product_factors_kernel<Element><<<1, 1, 0, on>>>(largest, scratch.factors);

  if (p.grad_c != nullptr) find_stray_rows<Element>(p, on);
  auto* dz = static_cast<Element*>(scratch.dz);
  const int64_t n = p.in.n, d = p.in.d;
  const BlasMatrix matrix_dz = {dz, plan.chunk_columns};
  for (int64_t first = 0; first < p.in.v; first += plan.chunk_columns) {
    const int64_t columns = std::min(plan.chunk_columns, p.in.v - first);
    GradientArguments<Element> a;
    a.bias = bias_from<Element>(p.in, first);
    a.bias_stride = p.in.bias_stride;
    a.softcap = softcap_of(p.in);
    a.rows = static_cast<const GradientRow*>(p.rows);
    a.scores = static_cast<const TokenScore*>(p.scores);
    a.largest = largest;
    a.threshold = static_cast<float>(scratch.threshold);
    a.log2_threshold = static_cast<float>(std::log2(scratch.threshold));
    a.log2_rest = static_cast<float>(std::log2(1.0 - scratch.threshold));
    a.dz = dz;
    a.stride = plan.chunk_columns;
    a.n = static_cast<int>(n);
    a.first_column = static_cast<int>(first);
    a.columns = static_cast<int>(columns);
    const LaunchError found = scratch.codes != nullptr
                                  ? launch_gradient_of_codes<Element>(p, scratch, a, on)
                                  : launch_gradient<Element>(p.in, plan.logits, a, stream);
    if (found) return found;

    if (p.grad_c != nullptr) {
      cublas->multiply_transposed(matrix_dz, matrix(rows_of_e<Element>(p.in), d), columns, d, n,
                                  static_cast<Element*>(p.grad_c) + first * d,
                                  scaled ? scratch.factors : nullptr);
      LiveProductArguments<Element> l;
      l.weights = dz;
      l.stride = plan.chunk_columns;
      l.e = rows_of_e<Element>(p.in);
      l.rows = a.rows;
      l.control = control_of(p);
      l.d = static_cast<int>(d);
      l.columns = a.columns;
      l.stages = plan.live_product_stages;
      l.factor = 1.0f;
      l.keeps_scale = false;
      l.out = static_cast<Element*>(p.grad_c) + first * d;
      const LaunchError failed = launch_live_product<Element, Major::kMN>(l, plan.live_product_blocks, on);
      if (failed) return failed;
    }
    if (p.sum_e != nullptr) {
      cublas->multiply(matrix_dz, matrix(rows_of_c<Element>(p.in, first, columns), d), n, d, columns, p.sum_e,
                       first > 0);
    }
    if (p.grad_bias != nullptr) {
      ColumnSumsArguments<Element> s;
      s.dz = dz;
      s.stride = plan.chunk_columns;
      s.n = a.n;
      s.columns = a.columns;
      s.largest = largest;
      s.out = static_cast<Element*>(p.grad_bias) + first;
      column_sums_kernel<<<static_cast<unsigned>(ceil_div(columns, kColumnSumsColumns)), kColumnSumsThreads,
                           0, on>>>(s);
    }
    if (cublas && cublas->error() != nullptr) return {"cuBLAS", cublas->error()};
  }
  return cuda_error(cudaGetLastError());
}

template <typename Element>
LaunchError launch_round(const LceBackwardParams& p, int device, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  const int64_t count = p.in.n * p.in.d;
  constexpr int64_t kMostBlocks = 2048;
  const int64_t blocks = std::min(ceil_div(count, kRoundThreads * 4), kMostBlocks);
  round_gradient_kernel<Element>
      <<<static_cast<unsigned>(blocks), kRoundThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          p.sum_e, static_cast<Element*>(p.grad_e), count, &control_of(p)->largest);
  return cuda_error(cudaGetLastError());
}

}  // namespace

LaunchError launch_exact_backward(const LceBackwardParams& p, const ExactScratch& scratch,
                                  const ExactPlan& plan, const std::optional<Blas>& blas, int device,
                                  void* stream) {
  if (p.in.n == 0) return {};
  return dispatch_16bit(p.in.dtype, [&](auto element) {
    return launch_exact<decltype(element)>(p, scratch, plan, blas, device, stream);
  });
}

LaunchError launch_round_gradient(const LceBackwardParams& p, int device, void* stream) {
  if (p.in.n == 0) return {};
  return dispatch_16bit(p.in.dtype,
                        [&](auto element) { return launch_round<decltype(element)>(p, device, stream); });
}

}  // namespace cce
