#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/visit_queue.cuh"
#include "kernels/visit_slots_sm90.cuh"
#include "kernels/visits_arguments.cuh"
#include "ptx/hopper.cuh"
#include "tile/tile_map.h"
#include "tile/warp.cuh"

namespace cce {

// One warp: takes items from the list, waits for their gates and finds their tokens.
template <typename Element>
class VisitScout {
 public:
  __device__ __forceinline__ VisitScout(const VisitsArguments<Element>& a, VisitsSm90Shared<Element>& shared,
                                        const VisitSlots& slots)
      : a_(a), shared_(shared), slots_(slots), lane_(static_cast<int>(threadIdx.x) % kWarpLanes) {}

  __device__ __forceinline__ void run() {
    const VisitQueue queue(a_.queue);
    VisitSlotPlace place;
    for (bool more = true; more; place.advance()) {
      ptx::mbarrier_wait(slots_.done(place.slot), place.parity ^ 1);
      VisitSlot<Element>& slot = shared_.slots[place.slot];
      if (lane_ == 0) slot.more = queue.take(slot.item);
      __syncwarp();
      more = slot.more;
      if (more && slot.item.work == VisitWork::kGradC) {
        if (lane_ == 0) slot.rows = static_cast<int>(a_.layout.rows_of(a_.counts, slot.item.strip));
      } else if (more && slot.item.work != VisitWork::kRound) {
        find_tokens(slot);
      }
      // Each lane for what it wrote itself.
      ptx::mbarrier_arrive(slots_.found(place.slot));
    }
  }

 private:
  // The item's tokens, with what their dz needs. Behind the tile's last comes the control variate's row.
  __device__ __forceinline__ void find_tokens(VisitSlot<Element>& slot) {
    const VisitItem item = slot.item;
    const int words = mask_words(a_.e.count);
    const uint32_t* mask = a_.mask + static_cast<int64_t>(item.strip) * words;
    const int share = (words + kWarpLanes - 1) / kWarpLanes;
    const int first = min(lane_ * share, words), end = min(first + share, words);
    uint32_t mine = 0;
    for (int w = first; w < end; ++w) mine += __popc(mask[w]);
    const uint32_t inclusive = warp_inclusive_sum(mine, lane_);
    const int total = static_cast<int>(__shfl_sync(0xffffffffu, inclusive, kWarpLanes - 1));
    const int first_rank = static_cast<int>(visits_of(item, 0xffffffffu).begin);
    int rank = static_cast<int>(inclusive - mine) - first_rank;
    for (int w = first; w < end && rank < kVisitRows; ++w) {
      for (uint32_t bits = mask[w]; bits != 0; bits &= bits - 1, ++rank) {
        if (rank >= 0 && rank < kVisitRows) slot.token[rank] = w * kMaskBits + __ffs(bits) - 1;
      }
    }
    __syncwarp();
    const int visits = min(total - first_rank, kVisitRows);
    const int rows = min(total - first_rank + a_.layout.centroids, kVisitRows);
#pragma unroll
    for (int m = lane_; m < kVisitRows; m += kWarpLanes) {
      VisitRow row = {0.0f, 0.0f, INFINITY, -1};
      VisitScore logit = {kLog2E, 0.0f};
      int token = -1;
      if (m < visits) {
        token = slot.token[m];
        const GradientRow g = a_.rows[token];
        const bool own = g.label >= 0 && g.label / kTileColumns == item.strip;
        float q = 1.0f;
        TokenScore score = {kLog2E, 0.0f, 0.0f, 1.0f, 0.0f};
        if (a_.scores != nullptr) score = a_.scores[token];
        const bool of_scan = item.work == VisitWork::kVisitsOfScan;
        TileShare share{};
        if (!own || of_scan) {
          const uint16_t code = a_.tile_map[static_cast<int64_t>(item.strip) * a_.e.count + token];
          share = decode_tile(code, a_.nll[token] * kLog2E);
        }
        if (!own) q = a_.rate.probability(share, a_.scores == nullptr ? 1.0f : score.factor(share));
        const float weight = __fdividef(1.0f, q);
        row = {g.a * weight, own ? g.b : weight, g.lse2, own ? g.label % kTileColumns : -1};
        // What the sum of its p is to be less: what the scan has of it.
        if (of_scan) row = {weight, tile_mass(share), g.lse2, -1};
        logit = {score.scale2, score.h * weight};
      } else if (m < rows) {
        token = a_.e.count;
        row.label = kCentroidRow;
      }
      if (leaves_dz(item.work) && token >= 0) a_.tokens[item.first_row + first_rank + m] = token;
      slot.token[m] = token;
      slot.row[m] = row;
      if (a_.scores != nullptr) slot.score[m] = logit;
      slot.e[m] = m < visits ? a_.e.data + token * a_.e.stride : a_.mean;
    }
    if (lane_ == 0) {
      slot.visits = visits;
      slot.rows = rows;
    }
  }

  const VisitsArguments<Element>& a_;
  VisitsSm90Shared<Element>& shared_;
  const VisitSlots slots_;
  const int lane_;
};

}  // namespace cce
