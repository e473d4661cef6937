#include <cuda_runtime.h>

#include "kernels/label_logits.cuh"
#include "launch/arguments.cuh"
#include "launch/dtype.cuh"
#include "launch/heuristics.h"
#include "launch/launch.h"

namespace cce {
namespace {

template <DType kDType, typename Index>
void enqueue_label_logits(const LabelLogitsParams& params, const LabelLogitsPlan& plan, cudaStream_t stream) {
  using Element = typename TypesOf<kDType>::Element;
  using Accumulator = typename TypesOf<kDType>::Accumulator;
  const LossInputs& p = params.in;
  LabelLogitsArguments<Element, Accumulator, Index> a;
  a.e = static_cast<const Element*>(p.e);
  a.c = static_cast<const Element*>(p.c);
  a.bias = static_cast<const Element*>(p.bias);
  a.targets = static_cast<const Index*>(p.targets);
  a.out = static_cast<Accumulator*>(params.out);
  a.n = p.n;
  a.d = p.d;
  a.v = p.v;
  a.e_row_stride = p.e_row_stride;
  a.c_row_stride = p.c_row_stride;
  a.bias_stride = p.bias_stride;
  a.target_stride = p.target_stride;
  a.ignore_index = p.ignore_index;
  a.softcap = static_cast<Accumulator>(p.softcap);
  a.scale = static_cast<const Accumulator*>(params.scale);
  if (plan.vector_loads) {
    constexpr int kCount = kLabelLogitsVectorBytes / static_cast<int>(sizeof(Element));
    label_logits_kernel<Element, Accumulator, Index, kCount>
        <<<plan.blocks, kLabelLogitsThreads, 0, stream>>>(a);
  } else {
    label_logits_kernel<Element, Accumulator, Index, 1><<<plan.blocks, kLabelLogitsThreads, 0, stream>>>(a);
  }
}

template <DType kDType>
void enqueue(const LabelLogitsParams& params, void* stream) {
  const LabelLogitsPlan plan = plan_label_logits(params.in);
  if (params.in.targets_are_int64) {
    enqueue_label_logits<kDType, int64_t>(params, plan, static_cast<cudaStream_t>(stream));
  } else {
    enqueue_label_logits<kDType, int32_t>(params, plan, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace

LaunchError launch_label_logits(const LabelLogitsParams& params, int device, void* stream) {
  if (params.in.n == 0) return {};
  // torch's device guard sets the device of torch's CUDA runtime; the static one linked here keeps its own.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  switch (params.in.dtype) {
    case DType::kFloat16:
      enqueue<DType::kFloat16>(params, stream);
      break;
    case DType::kBFloat16:
      enqueue<DType::kBFloat16>(params, stream);
      break;
    case DType::kFloat32:
      enqueue<DType::kFloat32>(params, stream);
      break;
    case DType::kFloat64:
      enqueue<DType::kFloat64>(params, stream);
      break;
  }
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
