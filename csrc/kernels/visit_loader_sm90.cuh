#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/logits_sm90.cuh"
#include "kernels/visit_slots_sm90.cuh"
#include "kernels/visits_arguments.cuh"
#include "ptx/copy.cuh"
#include "ptx/hopper.cuh"
#include "ptx/sync.cuh"

namespace cce {

struct VisitsSm90Maps {
  CUtensorMap c;  // boxes of 256 rows by 64 elements
  // Boxes of 64 rows by 64 elements: the ring, and the residual masses and centroids, whose rows are tiles.
  CUtensorMap dz, residual, centroids;
};

// Three warps: gather the rows of E, and have the copy engine fetch C's and the ring's.
template <typename Element>
class VisitLoader {
 public:
  __device__ __forceinline__ VisitLoader(const VisitsSm90Maps& maps, const VisitsArguments<Element>& a,
                                         VisitsSm90Shared<Element>& shared, const Ring& ring)
      : maps_(maps), a_(a), shared_(shared), slots_{ring.base}, ring_(ring) {}

  __device__ __forceinline__ void run() {
    for (VisitSlotPlace place;; place.advance()) {
      ptx::mbarrier_wait(slots_.found(place.slot), place.parity);
      const VisitSlot<Element>& slot = shared_.slots[place.slot];
      if (!slot.more) break;
      // What other blocks' threads wrote, the copy engine reads.
      ptx::fence_async();
      if (slot.item.work == VisitWork::kGradC) {
        load_grad_c(slot);
      } else if (slot.item.work == VisitWork::kRound) {
        if (a_.layout.finds_centroids) load_centroids(rounded_by(slot.item, a_.layout));
      } else {
        load_visits(slot);
      }
      ptx::mbarrier_arrive(slots_.done(place.slot));
    }
  }

 private:
  static constexpr int kDepth = LogitsSm90::kDepth;
  static constexpr int kBox = kRowElements * kRowBytes;  // 64 rows
  // A thread copies one chunk of every so many rows.
  static constexpr int kPass = VisitsSm90::kLoaderThreads / 8;

  // Rows of E and C by 64 of D, and then C's again for dE.
  __device__ __forceinline__ void load_visits(const VisitSlot<Element>& slot) {
    const int column0 = slot.item.strip * kTileColumns;
    const int steps = (a_.d + kDepth - 1) / kDepth;
    const int slices = adds_to_e(slot.item.work) ? (a_.d + VisitsSm90::kSlice - 1) / VisitsSm90::kSlice : 0;
    // Whole warpgroups of rows; those past the last are zeros.
    const int rows = slot.rows > LogitsSm90::kConsumerRows ? kVisitRows : LogitsSm90::kConsumerRows;
    for (int step = 0; step < steps; ++step) {
      begin_stage(LogitsSm90::kTileC);
      if (thread() == 0) load_c(step * kDepth, column0);
      const int depth = step * kDepth + column();
      const bool inside = depth < a_.d;
#pragma unroll 4
      for (int m = row(); m < rows; m += kPass) {
        ptx::cp_async_16(destination(m), slot.e[m] + depth, inside && m < slot.rows);
      }
      end_stage();
    }
    // Backwards: what was read last may still be in L2.
    for (int slice = slices - 1; slice >= 0; --slice) {
      begin_stage(LogitsSm90::kTileC);
      if (thread() == 0) load_c(slice * VisitsSm90::kSlice, column0);
      end_stage();
    }
  }

  // 64 rows of the strip's dz, and their tokens' rows of E by 128 of D.
  __device__ __forceinline__ void load_grad_c(const VisitSlot<Element>& slot) {
    if (a_.grad_c == nullptr) return;
    const VisitRange slices = slices_of(slot.item, static_cast<uint32_t>(slot.rows), a_.layout.slices);
    const int end = static_cast<int>(slices.end);
    const int first_row = static_cast<int>(slot.item.first_row);
    const int* tokens = a_.tokens + first_row;
    constexpr int kPasses = (kDepth + kPass - 1) / kPass;
    // Fetched a stage ahead of their rows.
    int token[kPasses];
    const auto fetch_tokens = [&](int k0) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int k = p * kPass + row();
        token[p] = k < kDepth && k0 + k < slot.rows ? __ldcg(tokens + k0 + k) : -1;
      }
    };
    fetch_tokens(0);
    for (int slice = static_cast<int>(slices.begin); slice < end; ++slice) {
      const int d0 = slice * kVisitSlice + column();
      for (int k0 = 0; k0 < slot.rows; k0 += kDepth) {
        begin_stage(4 * kBox);
        if (thread() < 4) {
          ptx::tma_load(ring_.tile_c(place_.slot) + thread() * kBox, &maps_.dz, ring_.full(place_.slot),
                        thread() * kRowElements, first_row + k0, ptx::policy_evict_normal());
        }
        // Whole k of wgmma: the rows past the last are zeros.
        const int rows = min((slot.rows - k0 + 15) / 16 * 16, kDepth);
#pragma unroll
        for (int p = 0; p < kPasses; ++p) {
          const int k = p * kPass + row();
          if (k >= rows) continue;
          const Element* from = token[p] < a_.e.count
                                    ? a_.e.data + max(token[p], 0) * a_.e.stride
                                    : a_.residual_e + static_cast<int64_t>(slot.item.strip) * a_.d;
#pragma unroll
          for (int box = 0; box < 2; ++box) {
            const int d = d0 + box * kRowElements;
            ptx::cp_async_16(destination(k) + box * kBox, from + d, token[p] >= 0 && d < a_.d);
          }
        }
        end_stage();
        fetch_tokens(k0 + kDepth < slot.rows ? k0 + kDepth : 0);
      }
    }
  }

  // 64 tiles' residual masses of 256 tokens, and these tiles' centroids in 128 of D.
  __device__ __forceinline__ void load_centroids(const RoundedPart& part) {
    const int token0 = static_cast<int>(part.tokens.begin);
    const int d0 = static_cast<int>(part.slices.begin) * kVisitSlice;
    for (int tile = 0; tile < a_.layout.strips; tile += kDepth) {
      begin_stage(6 * kBox);
      const uint32_t full = ring_.full(place_.slot);
      if (thread() < 4) {
        ptx::tma_load(ring_.tile_c(place_.slot) + thread() * kBox, &maps_.residual, full,
                      token0 + thread() * kRowElements, tile, ptx::policy_evict_normal());
      } else if (thread() < 6) {
        const int box = thread() - 4;
        ptx::tma_load(ring_.tile_e(place_.slot) + box * kBox, &maps_.centroids, full, d0 + box * kRowElements,
                      tile, ptx::policy_evict_normal());
      }
      end_stage();
    }
  }

  __device__ __forceinline__ void load_c(int depth, int column0) {
    // C streams; what comes again and again, E and the sums of dE, is to stay in L2.
    ptx::tma_load(ring_.tile_c(place_.slot), &maps_.c, ring_.full(place_.slot), depth, column0,
                  ptx::policy_evict_first());
  }

  // Waits until the next stage's slot is free, and has it expect so many bytes of the copy engine.
  __device__ __forceinline__ void begin_stage(int bytes) {
    ptx::mbarrier_wait(ring_.empty(place_.slot), place_.parity ^ 1);
    if (thread() == 0) ptx::mbarrier_arrive_expect(ring_.full(place_.slot), static_cast<uint32_t>(bytes));
    // Before other threads' copies arrive: their bytes would be more than expected.
    __syncwarp();
  }
  __device__ __forceinline__ void end_stage() {
    ptx::mbarrier_arrive_after_copies(ring_.full(place_.slot));
    place_.advance();
  }

  __device__ __forceinline__ static int thread() {
    return ptx::thread_number() - VisitsSm90::kFirstLoaderWarp * kWarpLanes;
  }
  // The thread's first row of a stage's E, its chunk there, and where row m has it.
  __device__ __forceinline__ int row() const { return thread() / 8; }
  __device__ __forceinline__ int column() const { return thread() % 8 * kChunkElements; }
  __device__ __forceinline__ uint32_t destination(int m) const {
    return ring_.tile_e(place_.slot) + swizzled_offset(m, thread() % 8);
  }

  const VisitsSm90Maps& maps_;
  const VisitsArguments<Element>& a_;
  VisitsSm90Shared<Element>& shared_;
  const VisitSlots slots_;
  const Ring ring_;
  RingPlace place_;
};

}  // namespace cce
