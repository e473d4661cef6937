#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/live_rows.cuh"
#include "kernels/lse.cuh"
#include "kernels/lse_epilogue.cuh"
#include "kernels/score_epilogue.cuh"
#include "launch/arguments.cuh"
#include "launch/launch.h"
#include "launch/launch_forward_sm90.h"
#include "launch/launch_logits_sm80.cuh"

namespace cce {
namespace {

// The log-sum-exps of each unit, and the tile map.
LaunchError launch_lse(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
#if CCE_HAS_SM90
  if (p.scan.on()) return launch_scan_sm90(p, plan, stream);
  if (plan.logits.kernel == LogitsKernel::kSm90) return launch_lse_sm90(p, plan, stream);
#endif
  return dispatch_16bit(p.in.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto launch = [&](auto epilogue, const auto& arguments) {
      using Epilogue = typename decltype(epilogue)::type;
      return launch_logits_sm80<Element, Epilogue>(p.in, 0, p.in.v, plan.logits,
                                                   plan.logits.schedule(p.in.n, p.in.v), live_rows_of(p),
                                                   p.live_e, plan.blocks, arguments, stream);
    };
    if (p.codes != nullptr) {
      return launch(Type<LseEpilogue<Element, true>>{}, codes_arguments<Element>(p));
    }
    return p.scored() ? launch(Type<ScoreEpilogue<Element>>{}, score_arguments<Element>(p))
                      : launch(Type<LseEpilogue<Element>>{}, lse_arguments<Element>(p));
  });
}

// What one block copies in less time than a second kernel takes to begin.
constexpr int64_t kFewRows = 128, kFewElements = 1 << 15;

// Lists the rows that count and copies them, where there is room for it: a scan has its own copy, and where
// all tokens count none is needed.
LaunchError find_live_rows(const LceForwardParams& p, const LceForwardPlan& plan, cudaStream_t on) {
  static_assert(kLiveRowsPadding % (2 * LogitsSm90::kRows) == 0 && kLiveRowsPadding % kLogitsRows == 0,
                "whole units of rows");
  const auto n = static_cast<int>(p.in.n);
  CopyLiveRows rows{};
  rows.e = static_cast<const uint4*>(p.in.e);
  rows.stride = p.in.e_row_stride / kChunkElements;
  rows.vectors = static_cast<int>(p.in.d / kChunkElements);
  rows.n = n;
  const bool few = n <= kFewRows && p.in.n * p.in.d <= kFewElements;
  if (few) rows.out = static_cast<uint4*>(p.live_e);
  const LiveRowsArguments r = {targets_of(p.in),
                               p.in.ignore_index,
                               p.in.all_count(),
                               n,
                               plan.splits,
                               p.live_tokens,
                               static_cast<LiveCount*>(p.live_count),
                               rows};
  live_rows_kernel<<<1, kLiveThreads, 0, on>>>(r);
  if (!few && p.live_e != nullptr) {
    rows.out = static_cast<uint4*>(p.live_e);
    const auto blocks = static_cast<unsigned>(ceil_div(p.in.n, kCopyLiveThreads / kWarpLanes));
    copy_live_rows_kernel<<<blocks, kCopyLiveThreads, 0, on>>>(rows, live_rows_of(p));
  }
  return cuda_error(cudaGetLastError());
}

}  // namespace

LaunchError launch_lce_forward(const LceForwardParams& p, const LceForwardPlan& plan, int device,
                               void* stream) {
  if (p.in.n == 0) return {};
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);
  const auto on = static_cast<cudaStream_t>(stream);
  if (const LaunchError failed = find_live_rows(p, plan, on)) return failed;
  // An empty vocabulary, such as a shard may have, has no product: its log-sum-exp is -inf.
  if (p.in.v > 0) {
    if (const LaunchError failed = launch_lse(p, plan, stream)) return failed;
  }

  LseFinishArguments f;
  f.live = live_rows_of(p);
  f.partial_lse = p.partial_lse;
  f.label_logits = p.label_logits;
  f.targets = targets_of(p.in);
  f.ignore_index = p.in.ignore_index;
  f.nll = p.nll;
  f.lse = p.lse;
  f.tile_map = static_cast<uint16_t*>(p.tile_map);
  f.n = static_cast<int>(p.in.n);
  f.tiles = static_cast<int>(ceil_div(p.in.v, kTileColumns));
  f.codes = codes_of(p.codes, p.in);
  const auto blocks = static_cast<unsigned>(ceil_div(p.in.n, kLseFinishThreads));
  constexpr int kMostRows = 1024;
  const auto rows = f.codes.kept() ? static_cast<unsigned>(std::clamp(f.tiles, 1, kMostRows)) : 1u;
  lse_finish_kernel<<<dim3(blocks, rows), kLseFinishThreads, 0, on>>>(f);
  if (p.statistics != 0) {
    ScoreFinishArguments s;
    s.live = f.live;
    s.partial = partial_scores_of(p);
    s.partial_lse = p.partial_lse;
    s.lse = p.lse;
    s.targets = f.targets;
    s.ignore_index = f.ignore_index;
    s.stats = p.stats;
    s.argmax = p.argmax;
    s.n = p.in.n;
    s.v = static_cast<int>(p.in.v);
    score_finish_kernel<<<blocks, kLseFinishThreads, 0, on>>>(s);
  }
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
