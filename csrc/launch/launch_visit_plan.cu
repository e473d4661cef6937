#include <cuda_runtime.h>

#include <optional>

#include "kernels/centroids.cuh"
#include "kernels/visit_mask.cuh"
#include "kernels/visit_plan.cuh"
#include "launch/arguments.cuh"
#include "launch/cublas.h"
#include "launch/launch.h"
#include "launch/launch_live_product.cuh"
#include "launch/visit_sums.h"

namespace cce {
namespace {

// The mean token, and unless the visits find them each tile's weights and centroid.
template <typename Element>
cudaError_t find_centroids(const LceBackwardParams& p, const VisitsScratch& scratch, const VisitsPlan& plan,
                           cudaStream_t on) {
  MeanRowsArguments<Element> m;
  m.e = rows_of_e<Element>(p.in);
  m.rows = static_cast<const GradientRow*>(p.rows);
  m.scores = static_cast<const TokenScore*>(p.scores);
  m.d = plan.layout.d;
  m.sums = scratch.mean_sums;
  m.mean = static_cast<Element*>(scratch.mean);
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.d, kMeanColumns));
  if (!plan.few_tokens) {
    mean_rows_sums_kernel<Element><<<dim3(blocks, kMeanSplits), kMeanThreads, 0, on>>>(m);
  }
  const auto kernel = plan.few_tokens ? mean_rows_kernel<Element, true> : mean_rows_kernel<Element, false>;
  kernel<<<blocks, kMeanThreads, 0, on>>>(m);
  if (plan.shape.finds_centroids) return cudaGetLastError();

  CentroidsArguments<Element> c;
  c.c = rows_of_c<Element>(p.in, 0, p.in.v);
  c.mean = m.mean;
  c.bias = bias_from<Element>(p.in, 0);
  c.bias_stride = p.in.bias_stride;
  c.softcap = softcap_of(p.in);
  c.d = plan.layout.d;
  c.group = plan.centroid_group;
  c.weights = static_cast<Element*>(scratch.weights);
  c.centroids = static_cast<Element*>(scratch.centroids);
  const int shared_bytes = plan.centroid_shared_bytes();
  const cudaError_t error = allow_shared_memory(centroids_kernel<Element>, shared_bytes);
  if (error != cudaSuccess) return error;
  centroids_kernel<Element>
      <<<static_cast<unsigned>(plan.tiles), kCentroidThreads, static_cast<size_t>(shared_bytes), on>>>(c);
  return cudaGetLastError();
}

// Which pairs are visited, and what the control variate makes up for.
template <typename Element>
cudaError_t find_visits(const LceBackwardParams& p, const VisitsScratch& scratch, const VisitsPlan& plan,
                        cudaStream_t on) {
  VisitMaskArguments<Element> m;
  m.rows = static_cast<const GradientRow*>(p.rows);
  m.scores = static_cast<const TokenScore*>(p.scores);
  m.nll = p.nll;
  m.tile_map = static_cast<const uint16_t*>(scratch.tile_map);
  m.seed = scratch.seed;
  m.salt = scratch.salt;
  m.largest = &control_of(p)->largest;
  m.rate = visit_rate(scratch.eps, plan.tiles);
  m.softcap = softcap_of(p.in);
  m.n = plan.layout.n;
  m.tiles = plan.tiles;
  m.mask = static_cast<uint32_t*>(scratch.mask);
  m.counts = static_cast<uint32_t*>(scratch.counts);
  m.residual = visit_residual<Element>(p, scratch, plan.layout);
  m.residual_stride = plan.layout.residual_stride;
  if (p.grad_e != nullptr && plan.layout.finds_centroids) {
    m.sums = visit_sums<Element>(p, plan.layout);
    m.sums_size = p.in.n * p.in.d;
  }
  // A block writes 512 bytes of the mask: 2^31 blocks would be 1 TB of it.
  const int64_t mask_blocks = ceil_div(plan.layout.n, kChainTokens) * ceil_div(plan.tiles, kChainTiles);
  const auto kernel =
      m.scores == nullptr ? visit_mask_kernel<Element, false> : visit_mask_kernel<Element, true>;
  kernel<<<static_cast<unsigned>(mask_blocks), kMaskThreads, 0, on>>>(m);

  VisitPlanArguments s;
  s.layout = plan.layout;
  s.counts = m.counts;
  s.control = control_of(p);
  s.order = static_cast<int*>(scratch.order);
  s.chunk_begins = static_cast<uint32_t*>(scratch.chunk_begins);
  s.pending = static_cast<uint32_t*>(scratch.pending);
  s.items = static_cast<VisitItem*>(scratch.items);
  visit_plan_kernel<<<1, kPlanThreads, 0, on>>>(s);
  return cudaGetLastError();
}

// The products of the residual masses: with E for dC, with the centroids for dE.
template <typename Element>
LaunchError multiply_residuals(const LceBackwardParams& p, const VisitsScratch& scratch,
                               const VisitsPlan& plan, const std::optional<Blas>& blas, cudaStream_t on) {
  const Element* residual = visit_residual<Element>(p, scratch, plan.layout);
  const BlasMatrix masses = {residual, plan.layout.residual_stride};
  const int64_t n = p.in.n, d = p.in.d, tiles = plan.tiles;
  std::optional<Cublas> cublas;
  if (blas) cublas.emplace(*blas, p.in.dtype);
  if (p.grad_c != nullptr) {
    constexpr float kFactor = 1.0f / centroid_weight_scale<Element>();
    // Of few tokens the kernel of ours alone: it takes no longer, and looks at the rows that count only.
    if (!plan.few_tokens) {
      find_stray_rows<Element>(p, on);
      cublas->multiply_rounded(masses, matrix(rows_of_e<Element>(p.in), d), tiles, d, n, scratch.residual_e,
                               kFactor);
    }
    LiveProductArguments<Element> l;
    l.weights = residual;
    l.stride = plan.layout.residual_stride;
    l.e = rows_of_e<Element>(p.in);
    l.rows = static_cast<const GradientRow*>(p.rows);
    l.control = plan.few_tokens ? nullptr : control_of(p);
    l.d = static_cast<int>(d);
    l.columns = plan.tiles;
    l.stages = plan.live_product_stages;
    l.factor = kFactor;
    l.keeps_scale = true;
    l.out = static_cast<Element*>(scratch.residual_e);
    if (const LaunchError failed = launch_live_product<Element, Major::kK>(l, plan.live_product_blocks, on))
      return failed;
  }
  if (p.grad_bias != nullptr) {
    const auto blocks = static_cast<unsigned>(ceil_div(tiles, kResidualSumsThreads / kWarpLanes));
    residual_sums_kernel<Element><<<blocks, kResidualSumsThreads, 0, on>>>(
        residual, plan.layout.residual_stride, plan.layout.n, plan.tiles, scratch.residual_sums);
  }
  // Where the visits find the centroids, they multiply them as well.
  if (p.grad_e != nullptr && !plan.layout.finds_centroids) {
    cublas->multiply_transposed_wide(masses, {scratch.centroids, d}, n, d, tiles,
                                     visit_sums<Element>(p, plan.layout));
  }
  if (cublas && cublas->error() != nullptr) return {"cuBLAS", cublas->error()};
  return cuda_error(cudaGetLastError());
}

}  // namespace

LaunchError launch_visits_search(const LceBackwardParams& p, const VisitsScratch& scratch,
                                 const VisitsPlan& plan, int device, void* stream) {
  if (p.in.n == 0) return {};
  return dispatch_16bit(p.in.dtype, [&](auto element) -> LaunchError {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) {
      error = find_visits<decltype(element)>(p, scratch, plan, static_cast<cudaStream_t>(stream));
    }
    return cuda_error(error);
  });
}

LaunchError launch_visits_plan(const LceBackwardParams& p, const VisitsScratch& scratch,
                               const VisitsPlan& plan, const std::optional<Blas>& blas, int device,
                               void* stream) {
  if (p.in.n == 0) return {};
  const auto on = static_cast<cudaStream_t>(stream);
  return dispatch_16bit(p.in.dtype, [&](auto element) -> LaunchError {
    using Element = decltype(element);
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = find_centroids<Element>(p, scratch, plan, on);
    if (error == cudaSuccess) error = find_visits<Element>(p, scratch, plan, on);
    if (error != cudaSuccess) return cuda_error(error);
    return multiply_residuals<Element>(p, scratch, plan, blas, on);
  });
}

}  // namespace cce
