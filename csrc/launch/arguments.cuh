#pragma once

#include <cuda_runtime.h>

#include "kernels/live_rows.h"
#include "kernels/logits_sm80.cuh"
#include "kernels/lse.cuh"
#include "kernels/scores.cuh"
#include "launch/dtype.cuh"
#include "launch/launch_error.h"
#include "launch/params.h"
#include "tile/softcap.cuh"
#include "tile/target.cuh"

// Parameters as the kernels' arguments.
namespace cce {

template <typename Element>
Rows<Element> rows_of_e(const LossInputs& in) {
  return {static_cast<const Element*>(in.e), in.e_row_stride, static_cast<int>(in.n)};
}

// Rows [first, first + count) of C.
template <typename Element>
Rows<Element> rows_of_c(const LossInputs& in, int64_t first, int64_t count) {
  return {static_cast<const Element*>(in.c) + first * in.c_row_stride, in.c_row_stride,
          static_cast<int>(count)};
}

template <typename Element>
const Element* bias_from(const LossInputs& in, int64_t first) {
  return in.bias == nullptr ? nullptr : static_cast<const Element*>(in.bias) + first * in.bias_stride;
}

inline Softcap softcap_of(const LossInputs& in) {
  return {static_cast<float>(in.softcap), in.softcap == 0 ? 0.0f : static_cast<float>(1.0 / in.softcap)};
}

inline Targets targets_of(const LossInputs& in) {
  return {in.targets, in.target_stride, in.targets_are_int64};
}

inline LiveRows live_rows_of(const LceForwardParams& p) {
  static_assert(sizeof(LiveCount) == kLiveCountBytes, "what the operator allocates");
  return {p.live_tokens, static_cast<const LiveCount*>(p.live_count)};
}

template <typename Element>
LseArguments<Element> lse_arguments(const LceForwardParams& p) {
  LseArguments<Element> a;
  a.bias = bias_from<Element>(p.in, 0);
  a.bias_stride = p.in.bias_stride;
  a.softcap = softcap_of(p.in);
  a.live = live_rows_of(p);
  a.label_logits = p.label_logits;
  a.tile_map = static_cast<uint16_t*>(p.tile_map);
  a.partial_lse = p.partial_lse;
  a.n = static_cast<int>(p.in.n);
  a.v = static_cast<int>(p.in.v);
  return a;
}

inline LogitCodes codes_of(void* codes, const LossInputs& in) {
  return {static_cast<uint16_t*>(codes), (in.v + kTileColumns - 1) / kTileColumns * in.n};
}

template <typename Element>
CodesArguments<Element> codes_arguments(const LceForwardParams& p) {
  return {lse_arguments<Element>(p), codes_of(p.codes, p.in)};
}

// Each of the statistics that are asked for has a part of the memory.
inline PartialScores partial_scores_of(const LceForwardParams& p) {
  float* next = p.partial_statistics;
  const auto part = [&](Statistic statistic) -> float* {
    if ((p.statistics & statistic) == 0) return nullptr;
    float* const begin = next;
    next += p.partials;
    return begin;
  };
  PartialScores scores;
  scores.entropy = part(kEntropy);
  scores.log_squares = part(kLogSumSquares);
  scores.total = part(kMeanLogit);
  scores.max = part(kArgmax);
  scores.argmax = reinterpret_cast<int*>(part(kArgmax));
  return scores;
}

template <typename Element>
ScoreArguments<Element> score_arguments(const LceForwardParams& p) {
  return {lse_arguments<Element>(p), p.scale, partial_scores_of(p)};
}

// A type as a value.
template <typename T>
struct Type {
  using type = T;
};

// Lets a kernel have more shared memory than every GPU gives without being asked, on the current device. CUDA
// is asked once for as much: it takes half as long as a launch.
cudaError_t allow_shared_memory(const void* kernel, int bytes);

template <typename... Arguments>
cudaError_t allow_shared_memory(void (*kernel)(Arguments...), int bytes) {
  return allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

inline LaunchError cuda_error(cudaError_t error) {
  if (error == cudaSuccess) return {};
  const bool no_kernel = error == cudaErrorNoKernelImageForDevice ||
                         error == cudaErrorInvalidDeviceFunction || error == cudaErrorUnsupportedPtxVersion;
  return {"CUDA", cudaGetErrorString(error), no_kernel};
}

}  // namespace cce
