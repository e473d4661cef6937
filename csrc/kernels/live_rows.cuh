#pragma once

#include <cstdint>

#include "tile/block_scan.cuh"
#include "tile/constants.h"
#include "tile/schedule.h"
#include "tile/target.cuh"

// Which tokens the forward has to look at. Prompts and padding are ignored: the product takes the rows of the
// others alone, and only the device knows how many there are.
namespace cce {

struct LiveCount {
  int rows;
  int splits;  // of the columns, as for so many rows alone
};

struct LiveRows {
  const int* tokens;  // [n], of which the first `rows` are those that count, in their order; or null: all do
  const LiveCount* count;  // one; or null

  __device__ __forceinline__ int token(int row) const { return tokens == nullptr ? row : tokens[row]; }
};

// What the blocks of a product E C^T do: of all tokens, or of those that count. In shared memory: the
// products take the registers.
struct LogitsWork {
  LogitsSchedule schedule;
  int units;
  int rows;      // of E
  bool gathers;  // these rows are not neighbours: LiveRows says where they are

  // rows_of_unit: of a row block of the schedule, whose row blocks and splits are for all n.
  __device__ __forceinline__ void find(const LogitsSchedule& of_all, const LiveRows& live, int n,
                                       int rows_of_unit) {
    schedule = of_all;
    rows = n;
    if (live.count != nullptr) {
      rows = live.count->rows;
      schedule.row_blocks = (rows + rows_of_unit - 1) / rows_of_unit;
      schedule.splits = live.count->splits;
    }
    units = schedule.units();
    gathers = rows < n;
  }
};

struct LiveRowsArguments {
  Targets targets;  // [n]
  int64_t ignore_index;
  int n;
  ForwardSplits splits;
  int* tokens;       // [n]
  LiveCount* count;  // one
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
      live[k] = __ballot_sync(0xffffffffu, token < a.n && a.targets[token] != a.ignore_index);
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
  // The least time, and among equals the fewest runs.
  const int most = a.splits.most(rows);
  for (int splits = 1 + static_cast<int>(threadIdx.x); splits <= most; splits += kLiveThreads) {
    const auto time = static_cast<unsigned long long>(a.splits.time(rows, splits));
    atomicMin(&best, time << 24 | static_cast<unsigned long long>(splits));
  }
  __syncthreads();
  if (threadIdx.x == 0) *a.count = {rows, most == 0 ? 0 : static_cast<int>(best & 0xffffff)};
}

}  // namespace cce
