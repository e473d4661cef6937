#pragma once

#include <cstdint>

#include "kernels/forward_splits.h"
#include "kernels/live_rows.h"
#include "tile/block_scan.cuh"
#include "tile/constants.h"
#include "tile/target.cuh"

// The kernels that find the tokens that count, and copy their rows.
namespace cce {

// Copies the rows that count, of 16 bits. Vectors have 16 bytes.
struct CopyLiveRows {
  const uint4* e;  // [n], rows of `vectors`
  int64_t stride;  // in vectors
  int vectors;
  int n;
  uint4* out;  // [n, vectors], of which the rows that count are written, in their order; or null: nothing is

  // One of them, or of the zeros behind them. A warp calls it. kAhead: loads that do not wait for each other.
  template <int kAhead>
  __device__ __forceinline__ void copy(int row, int rows, const int* tokens) const {
    const int padded = (rows + kLiveRowsPadding - 1) / kLiveRowsPadding * kLiveRowsPadding;
    if (row >= min(padded, n)) return;
    const bool counts = row < rows;
    const int token = counts ? tokens[row] : 0;
    // Two pointers that do not meet, so that loads need not wait for stores.
    const uint4* __restrict__ from = e + token * stride;
    uint4* __restrict__ to = out + static_cast<int64_t>(row) * vectors;
#pragma unroll kAhead
    for (int k = static_cast<int>(threadIdx.x) % kWarpLanes; k < vectors; k += kWarpLanes) {
      to[k] = counts ? __ldg(from + k) : uint4{0, 0, 0, 0};
    }
  }
};

struct LiveRowsArguments {
  Targets targets;  // [n]
  int64_t ignore_index;
  bool all;  // all count, whatever their targets: these are not looked at
  int n;
  ForwardSplits splits;
  int* tokens;        // [n]
  LiveCount* count;   // one
  CopyLiveRows rows;  // where they are so few that one block copies them
};

constexpr int kLiveThreads = 1024;

// One block: lists the tokens that count, and chooses the runs of columns for so many.
static __global__ void __launch_bounds__(kLiveThreads) live_rows_kernel(LiveRowsArguments a) {
  // A warp looks at so many tokens at a time, 32 by 32.
  constexpr int kWords = 8;
  constexpr int kWarps = kLiveThreads / kWarpLanes;
  constexpr int kRound = kWarps * kWords * kWarpLanes;
  __shared__ int before_warp[kWarps];
  __shared__ unsigned long long best;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  if (threadIdx.x == 0) best = ~0ull;
  int rows = 0;
  for (int64_t round = 0; round < a.n; round += kRound) {
    const int64_t first = round + warp * kWords * kWarpLanes + lane;
    uint32_t live[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int64_t token = first + k * kWarpLanes;
      live[k] = __ballot_sync(0xffffffffu, token < a.n && (a.all || a.targets[token] != a.ignore_index));
    }
    int own = 0;
#pragma unroll
    for (const uint32_t word : live) own += __popc(word);
    int total;
    int at = rows + block_exclusive_sum<kLiveThreads>(lane == 0 ? own : 0, before_warp, total);
    at = __shfl_sync(0xffffffffu, at, 0);
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const uint32_t earlier = live[k] & ((1u << lane) - 1);
      if ((live[k] >> lane & 1) != 0) {
        a.tokens[at + __popc(earlier)] = static_cast<int>(first + k * kWarpLanes);
      }
      at += __popc(live[k]);
    }
    rows += total;
  }
  __syncthreads();
  const int most = a.splits.most(rows);
  for (int splits = a.splits.least() + static_cast<int>(threadIdx.x); splits <= most;
       splits += kLiveThreads) {
    atomicMin(&best, static_cast<unsigned long long>(a.splits.rank(rows, splits)));
  }
  __syncthreads();
  if (threadIdx.x == 0) *a.count = {rows, most == 0 ? 0 : ForwardSplits::splits_of(best)};
  if (a.rows.out == nullptr || rows == a.n) return;
  for (int row = warp; row < a.n; row += kWarps) a.rows.copy<2>(row, rows, a.tokens);
}

constexpr int kCopyLiveThreads = 256;

// The same by many blocks, a warp a row; where all count, nothing.
static __global__ void __launch_bounds__(kCopyLiveThreads)
    copy_live_rows_kernel(CopyLiveRows rows, LiveRows live) {
  const int count = live.count->rows;
  if (count == rows.n) return;
  constexpr int kWarps = kCopyLiveThreads / kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  rows.copy<4>(static_cast<int>(blockIdx.x) * kWarps + warp, count, live.tokens);
}

}  // namespace cce
