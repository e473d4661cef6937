#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/pair_gradients.cuh"
#include "kernels/pair_logits.cuh"
#include "launch/arguments.cuh"
#include "launch/dtype.cuh"
#include "launch/heuristics.h"
#include "launch/launch.h"

namespace cce {
namespace {

constexpr int64_t kLargestGrid = INT32_MAX;

// Calls launch.run<kDType>().
template <typename Launch>
void dispatch(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat16:
      return launch.template run<DType::kFloat16>();
    case DType::kBFloat16:
      return launch.template run<DType::kBFloat16>();
    case DType::kFloat32:
      return launch.template run<DType::kFloat32>();
    case DType::kFloat64:
      return launch.template run<DType::kFloat64>();
  }
}

template <typename Element>
constexpr int kVectorCount = kPairVectorBytes / static_cast<int>(sizeof(Element));

struct LaunchLogits {
  const PairLogitsParams& p;
  cudaStream_t stream;

  template <DType kDType>
  void run() const {
    using Element = typename TypesOf<kDType>::Element;
    using Accumulator = typename TypesOf<kDType>::Accumulator;
    PairLogitsArguments<Element, Accumulator> a;
    a.e = static_cast<const Element*>(p.in.e);
    a.c = static_cast<const Element*>(p.in.c);
    a.bias = static_cast<const Element*>(p.in.bias);
    a.targets = {p.targets, 1, p.in.targets_are_int64};
    a.out = static_cast<Accumulator*>(p.out);
    a.n = p.in.n;
    a.k = p.k;
    a.d = p.in.d;
    a.v = p.in.v;
    a.e_row_stride = p.in.e_row_stride;
    a.c_row_stride = p.in.c_row_stride;
    a.bias_stride = p.in.bias_stride;
    a.ignore_index = p.in.ignore_index;
    a.softcap = static_cast<Accumulator>(p.in.softcap);
    const int64_t warps = p.in.n * ceil_div(p.k, kPairLabels);
    const auto blocks =
        static_cast<unsigned>(std::min(ceil_div(warps, kPairThreads / kWarpLanes), kLargestGrid));
    // As for one label a token: what a row has beyond whole vectors is read element by element.
    if (plan_label_logits(p.in).vector_loads) {
      pair_logits_kernel<Element, Accumulator, kVectorCount<Element>><<<blocks, kPairThreads, 0, stream>>>(a);
    } else {
      pair_logits_kernel<Element, Accumulator, 1><<<blocks, kPairThreads, 0, stream>>>(a);
    }
  }
};

struct LaunchGradients {
  const PairGradientsParams& p;
  const PairGradientsPlan& plan;
  cudaStream_t stream;

  template <DType kDType>
  void run() const {
    if (plan.vector_loads) {
      enqueue<kDType, kVectorCount<typename TypesOf<kDType>::Element>>();
    } else {
      enqueue<kDType, 1>();
    }
  }

  template <DType kDType, int kCount>
  void enqueue() const {
    using Element = typename TypesOf<kDType>::Element;
    using Accumulator = typename TypesOf<kDType>::Accumulator;
    PairGradientsArguments<Element, Accumulator> a;
    a.e = static_cast<const Element*>(p.in.e);
    a.c = static_cast<const Element*>(p.in.c);
    a.coefficients = static_cast<const Accumulator*>(p.coefficients);
    a.labels = p.labels;
    a.order = p.order;
    a.grad_e = static_cast<Element*>(p.grad_e);
    a.grad_c = static_cast<Element*>(p.grad_c);
    a.grad_bias = static_cast<Element*>(p.grad_bias);
    a.edges = static_cast<Accumulator*>(p.edges);
    a.edge_biases = static_cast<Accumulator*>(p.edge_biases);
    a.k = p.k;
    a.d = p.in.d;
    a.e_row_stride = p.in.e_row_stride;
    a.c_row_stride = p.in.c_row_stride;
    a.pairs = p.in.n * p.k;
    a.segment_pairs = plan.pairs;
    a.segments = plan.segments;
    const auto slices = static_cast<unsigned>(ceil_div(p.in.d, plan.columns));
    if (p.grad_e != nullptr && slices > 0) {
      const dim3 grid(static_cast<unsigned>(p.in.n), slices);
      pair_tokens_kernel<Element, Accumulator, kCount><<<grid, kPairThreads, 0, stream>>>(a);
    }
    if (p.grad_c == nullptr && p.grad_bias == nullptr) return;
    const dim3 grid(static_cast<unsigned>(plan.segments), p.grad_c == nullptr ? 1 : std::max(slices, 1u));
    pair_segments_kernel<Element, Accumulator, kCount><<<grid, kPairThreads, 0, stream>>>(a);
    if (plan.segments > 1) {
      pair_edges_kernel<Element, Accumulator, kCount><<<grid, kPairThreads, 0, stream>>>(a);
    }
  }
};

}  // namespace

LaunchError launch_pair_logits(const PairLogitsParams& params, int device, void* stream) {
  if (params.in.n == 0 || params.k == 0) return {};
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  dispatch(params.in.dtype, LaunchLogits{params, static_cast<cudaStream_t>(stream)});
  return cuda_error(cudaGetLastError());
}

LaunchError launch_pair_gradients(const PairGradientsParams& params, const PairGradientsPlan& plan,
                                  int device, void* stream) {
  if (params.in.n == 0 || params.k == 0) return {};
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  dispatch(params.in.dtype, LaunchGradients{params, plan, static_cast<cudaStream_t>(stream)});
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
