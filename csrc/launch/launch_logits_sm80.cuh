#pragma once

#include <cuda_runtime.h>

#include "kernels/logits_sm80.cuh"
#include "launch/arguments.cuh"
#include "launch/heuristics.h"

namespace cce {

// The product of E, or of its live rows alone, and rows [first, first + columns) of C, on the current device.
template <typename Element, typename Epilogue>
LaunchError launch_logits_sm80(const LossInputs& in, int64_t first, int64_t columns, const LogitsPlan& plan,
                               const LogitsSchedule& schedule, const LiveRows& live, const void* live_e,
                               int blocks, const typename Epilogue::Arguments& arguments, void* stream) {
  const auto kernel = logits_sm80_kernel<Element, Epilogue>;
  const cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return cuda_error(error);
  const LogitsOperands<Element> operands = {
      rows_of_e<Element>(in),
      rows_of_c<Element>(in, first, columns),
      {static_cast<const Element*>(live_e), in.d, static_cast<int>(in.n)},
      static_cast<int>(in.d),
      static_cast<int>(ceil_div(in.d, kLogitsDepth)),
      plan.stages,
      schedule,
      live};
  kernel<<<blocks, kLogitsThreads, plan.shared_bytes, static_cast<cudaStream_t>(stream)>>>(operands,
                                                                                           arguments);
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
