#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/centroids.cuh"
#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/logits_sm90.cuh"
#include "kernels/lse.cuh"
#include "kernels/visit_queue.cuh"
#include "kernels/visit_scan_sm90.cuh"
#include "kernels/visit_slots_sm90.cuh"
#include "kernels/visits_arguments.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

namespace cce {

// Two warpgroups: dz of the visits, dE, dC, and the end of dE.
template <typename Element>
class VisitConsumer {
 public:
  __device__ __forceinline__ VisitConsumer(const VisitsArguments<Element>& a,
                                           VisitsSm90Shared<Element>& shared, const Ring& ring)
      : a_(a), shared_(shared), slots_{ring.base}, ring_(ring) {}

  __device__ __forceinline__ void run() {
    const VisitQueue queue(a_.queue);
    for (VisitSlotPlace place;; place.advance()) {
      ptx::mbarrier_wait(slots_.found(place.slot), place.parity);
      const VisitSlot<Element>& slot = shared_.slots[place.slot];
      if (!slot.more) break;
      if (slot.item.work == VisitWork::kGradC) {
        grad_c_rows(slot.item, slot.rows);
      } else if (slot.item.work == VisitWork::kRound) {
        finish_rows(rounded_by(slot.item, a_.layout));
      } else {
        visit_rows(slot);
      }
      // What threads wrote, other blocks' copy engine reads.
      ptx::fence_async();
      ptx::wait_at_barrier<1, VisitsSm90::kConsumerThreads>();
      if (thread() == 0) queue.finish(slot.item);
      if (lane() == 0) ptx::mbarrier_arrive(slots_.done(place.slot));
    }
  }

 private:
  static constexpr int kDepth = LogitsSm90::kDepth;
  static constexpr int kBox = kRowElements * kRowBytes;
  using Logits = WarpgroupProduct<Element, 1>;
  using LogitSums = decltype(Logits::sums);

  // ---- dz and dE ----

  __device__ __forceinline__ void visit_rows(const VisitSlot<Element>& slot) {
    const int row0 = warpgroup() * LogitsSm90::kConsumerRows;
    const int steps = (a_.d + kDepth - 1) / kDepth;
    const int slices = adds_to_e(slot.item.work) ? (a_.d + VisitsSm90::kSlice - 1) / VisitsSm90::kSlice : 0;
    if (slot.rows <= row0) {
      // The other warpgroup alone has rows.
      for (int stage = 0; stage < steps + slices; ++stage) skip_stage();
      return;
    }
    uint32_t dz[kTileColumns / 16][4];
    {
      Logits logits;
      logits.sums.clear();
      logits.template multiply<true>(ring_, place_, steps, warpgroup());
      if (slot.item.work == VisitWork::kVisitsOfScan) {
        correct_scan(a_, slot, logits.sums, first_m(), lane());
        return;
      }
      write_dz(logits.sums, slot, dz);
    }
    int tokens[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) tokens[r] = slot.token[row0 + warp() * 16 + lane() / 4 + 8 * r];
    for (int slice = slices - 1; slice >= 0; --slice) {
      float sums[VisitsSm90::kSlice / 8][4];
      clear(sums);
      ptx::mbarrier_wait(ring_.full(place_.slot), place_.parity);
      const uint64_t c = ptx::wgmma_operand_mn(ring_.tile_c(place_.slot), kRowBytes);
      ptx::wgmma_hold(sums);
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kTileColumns / 16; ++part) {
        ptx::wgmma_m64n64k16_rows<Element>(sums, dz[part], c + part * ptx::kWgmmaNextRows, part > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(sums);
      release();
      add_slice(sums, tokens, slot.item.strip, slice * VisitsSm90::kSlice);
    }
  }

  // From the logits: dz as an operand, and in the ring. Step by step in the same registers: there are none
  // for two steps at once.
  __device__ __forceinline__ void write_dz(LogitSums& sums, const VisitSlot<Element>& slot,
                                           uint32_t (&dz)[kTileColumns / 16][4]) {
    const int column0 = slot.item.strip * kTileColumns;
    finish_logits(sums, column0 + LogitSums::first_column(lane()), a_.bias, a_.bias_stride, a_.softcap,
                  a_.c.count);
    ptx::wgmma_hold(sums.tiles[0]);
    const float factor = scale().factor;
    const int first_m = this->first_m();
    const auto row_of = [&](int r) -> const VisitRow& {
      return slot.row[first_m + LogitSums::row_offset(r)];
    };
#pragma unroll
    for (int r = 0; r < LogitSums::kRows; ++r) {
      if (__any_sync(0xffffffffu, row_of(r).label == kCentroidRow)) weigh_mean_row(sums, r, row_of(r));
    }
#pragma unroll
    for (int r = 0; r < LogitSums::kRows; ++r) {
      const VisitRow row = row_of(r);
      const GradientRow g = {row.weight, row.b, row.lse2, row.label - LogitSums::first_column(lane())};
      if (row.label == kCentroidRow) continue;
      const auto write = [&](const auto& weighed) {
#pragma unroll
        for (int c = 0; c < LogitSums::kColumns; ++c) {
          const float z = sums.at(r, c);
          float value = weighed(z);
          if (g.label == LogitSums::column_offset(c)) value -= g.b;
          if (a_.softcap.present()) value *= a_.softcap.slope(z);
          sums.at(r, c) = value * factor;
        }
      };
      if (a_.scores == nullptr) {
        write([&](float z) { return g.a * g.probability(z); });
      } else {
        const VisitScore visit = slot.score[first_m + LogitSums::row_offset(r)];
        const LogitScore score = {visit.scale2, visit.h};
        write([&](float z) { return score.weighed(z, g.lse2, g.a); });
      }
    }
    ptx::wgmma_hold(sums.tiles[0]);
    const int padded = static_cast<int>(a_.layout.padded(static_cast<uint32_t>(slot.rows)));
    Element* out =
        a_.dz +
        (static_cast<int64_t>(slot.item.first_row) + slot.item.part * kVisitRows + first_m) * kTileColumns;
#pragma unroll
    for (int r = 0; r < LogitSums::kRows; ++r) {
      const int down = LogitSums::row_offset(r);
      const bool leaves = leaves_dz(slot.item.work) && first_m + down < padded;
#pragma unroll
      for (int group = 0; group < kTileColumns / 32; ++group) {
        const auto pair = [&](int k) {
          const int tile = 4 * group + k;
          return dz[tile / 2][tile % 2 * 2 + r] =
                     pack(sums.at(r, 2 * tile), sums.at(r, 2 * tile + 1), Element());
        };
        store_32_columns(pair, leaves, out + down * kTileColumns + 32 * group, lane());
      }
    }
  }

  // The weights of the tile's columns: the mean token's softmax over the tile. Where all columns are masked,
  // nothing has a weight. All lanes of a warp take part, of which a quad has the row.
  __device__ __forceinline__ void weigh_mean_row(LogitSums& sums, int r, const VisitRow& row) {
    float highest = MaxSum::kLowest, total = 0.0f;
#pragma unroll
    for (int c = 0; c < LogitSums::kColumns; ++c) highest = fmaxf(highest, sums.at(r, c));
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
    }
#pragma unroll
    for (int c = 0; c < LogitSums::kColumns; ++c) {
      total += ptx::exp2_approx((sums.at(r, c) - highest) * kLog2E);
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, distance);
    }
    if (row.label != kCentroidRow) return;
    const float weight =
        total > 0.0f ? centroid_weight_scale<Element>() * ptx::reciprocal_approx(total) : 0.0f;
#pragma unroll
    for (int c = 0; c < LogitSums::kColumns; ++c) {
      sums.at(r, c) = weight * ptx::exp2_approx((sums.at(r, c) - highest) * kLog2E);
    }
  }

  // dE[tokens, slice] += the product; the mean token's row of it is the tile's centroid.
  __device__ __forceinline__ void add_slice(const float (&sums)[VisitsSm90::kSlice / 8][4],
                                            const int (&tokens)[2], int strip, int d0) {
    // Neighbours exchange pairs of columns, so that each has four in a row: even lanes of the first of two
    // groups of eight, odd lanes of the second.
    const bool odd = lane() % 2 != 0;
    const int column = d0 + lane() % 4 / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Nowhere past the last row.
      const bool is_token = tokens[r] >= 0 && tokens[r] < a_.e.count, is_centroid = tokens[r] == a_.e.count;
      float* into = a_.sum_e + static_cast<int64_t>(is_token ? tokens[r] : 0) * a_.d + column;
#pragma unroll
      for (int tile = 0; tile < VisitsSm90::kSlice / 8; tile += 2) {
        float received[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const float given = odd ? sums[tile][2 * r + side] : sums[tile + 1][2 * r + side];
          received[side] = __shfl_xor_sync(0xffffffffu, given, 1);
        }
        const float own[2] = {odd ? sums[tile + 1][2 * r] : sums[tile][2 * r],
                              odd ? sums[tile + 1][2 * r + 1] : sums[tile][2 * r + 1]};
        const float4 four = odd ? make_float4(received[0], received[1], own[0], own[1])
                                : make_float4(own[0], own[1], received[0], received[1]);
        if (column + 8 * tile >= a_.d) continue;
        if (is_token) ptx::reduce_add_4(into + 8 * tile, four.x, four.y, four.z, four.w);
        if (is_centroid) {
          Element* centroid = a_.centroids + static_cast<int64_t>(strip) * a_.d + column + 8 * tile;
          store_rounded(centroid, four, 1.0f / centroid_weight_scale<Element>());
        }
      }
    }
  }

  // ---- dC ----

  __device__ __forceinline__ void grad_c_rows(const VisitItem& item, int rows) {
    const VisitRange slices = slices_of(item, static_cast<uint32_t>(rows), a_.layout.slices);
    if (slices.begin == 0 && a_.grad_bias != nullptr) sum_bias(item, rows);
    if (a_.grad_c == nullptr) return;
    const int end = static_cast<int>(slices.end);
    for (int slice = static_cast<int>(slices.begin); slice < end; ++slice) {
      BlockSums sums;
      multiply_transposed<true>(sums, rows);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row0 = static_cast<int64_t>(item.strip) * kTileColumns + first_row(half);
        store_block(sums.half[half], a_.grad_c, row0, a_.c.count, slice * kVisitSlice, a_.d, scale().inverse,
                    lane());
      }
    }
  }

  // A warp's part of 256 rows by 128 of D: 16 rows in each half of its warpgroup's 128.
  struct BlockSums {
    MmaSums<1, kVisitSlice / 8> half[2];
  };
  __device__ __forceinline__ int first_row(int half) const {
    return warpgroup() * 128 + half * 64 + warp() * 16;
  }

  // The product of two operands whose rows are k: 256 columns of the one, transposed, with 128 of D. kFence:
  // threads have brought a part of them.
  template <bool kFence>
  __device__ __forceinline__ void multiply_transposed(BlockSums& sums, int depth) {
    int previous = -1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums.half[half].clear();
      ptx::wgmma_hold(sums.half[half].tiles[0]);
    }
    for (int k0 = 0; k0 < depth; k0 += kDepth) {
      ptx::mbarrier_wait(ring_.full(place_.slot), place_.parity);
      if constexpr (kFence) ptx::fence_async();
      const uint64_t b = ptx::wgmma_operand_mn(ring_.tile_e(place_.slot), kBox);
      const uint64_t a = ptx::wgmma_operand_mn(ring_.tile_c(place_.slot) + 2 * warpgroup() * kBox, kBox);
      const int parts = min((depth - k0 + 15) / 16, kDepth / 16);
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kDepth / 16; ++part) {
        if (part >= parts) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ptx::wgmma_m64n128k16_mn<Element>(sums.half[half].tiles[0],
                                            a + half * (kBox / 16) + part * ptx::kWgmmaNextRows,
                                            b + part * ptx::kWgmmaNextRows, k0 > 0 || part > 0);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = place_.slot;
      place_.advance();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) ptx::wgmma_hold(sums.half[half].tiles[0]);
    release(previous);
  }

  // dbias of the strip: the sums of dz's columns, in the order of the tokens, and the control variate's.
  __device__ __forceinline__ void sum_bias(const VisitItem& item, int rows) {
    static_assert(VisitsSm90::kConsumerThreads == kTileColumns, "a thread a column");
    const Element* dz = a_.dz + static_cast<int64_t>(item.first_row) * kTileColumns + thread();
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < rows - 1; ++k) sum += widen<float>(dz[static_cast<int64_t>(k) * kTileColumns]);
    const float weight =
        widen<float>(dz[static_cast<int64_t>(rows - 1) * kTileColumns]) / centroid_weight_scale<Element>();
    sum += weight * a_.residual_sums[item.strip];
    const int64_t v = static_cast<int64_t>(item.strip) * kTileColumns + thread();
    if (v < a_.c.count) a_.grad_bias[v] = narrow<Element>(sum * scale().inverse);
  }

  // ---- dE from its sums ----

  // With what the control variate gives: the residual masses times the centroids.
  __device__ __forceinline__ void finish_rows(const RoundedPart& part) {
    BlockSums sums;
    multiply_transposed<false>(sums, a_.layout.strips);
    const int d0 = static_cast<int>(part.slices.begin) * kVisitSlice;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      using Sums = MmaSums<1, kVisitSlice / 8>;
      Sums& own = sums.half[half];
      const int64_t row0 = part.tokens.begin + first_row(half);
#pragma unroll
      for (int r = 0; r < Sums::kRows; ++r) {
        const int64_t token = row0 + Sums::row_offset(r) + Sums::first_row(lane());
        if (token >= part.tokens.end) continue;
#pragma unroll
        for (int c = 0; c < Sums::kColumns; c += 2) {
          const int column = d0 + Sums::first_column(lane()) + Sums::column_offset(c);
          if (column >= a_.d) continue;
          // From L2, where the sums were made.
          const float2 x = __ldcg(reinterpret_cast<const float2*>(a_.sum_e + token * a_.d + column));
          own.at(r, c) += x.x;
          own.at(r, c + 1) += x.y;
          // A few loads at a time: there are no registers for all.
          if (c % 8 == 6) asm volatile("" ::: "memory");
        }
      }
      store_block(own, a_.grad_e, row0, a_.e.count, d0, a_.d, scale().inverse, lane());
    }
  }

  // ---- The ring ----

  __device__ __forceinline__ void release(int slot) {
    if (lane() == 0) ptx::mbarrier_arrive(ring_.empty(slot));
  }
  // Of the present stage, which is done with.
  __device__ __forceinline__ void release() {
    release(place_.slot);
    place_.advance();
  }
  __device__ __forceinline__ void skip_stage() {
    ptx::mbarrier_wait(ring_.full(place_.slot), place_.parity);
    release();
  }

  template <int kTiles>
  __device__ __forceinline__ static void clear(float (&sums)[kTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (float& sum : sums[tile]) sum = 0.0f;
    }
  }

  // The lane's first row of an item.
  __device__ __forceinline__ static int first_m() {
    return warpgroup() * LogitsSm90::kConsumerRows + warp() * 16 + lane() / 4;
  }
  // Where the thread is, computed where it is wanted: the products take the registers.
  __device__ __forceinline__ static int thread() { return ptx::thread_number(); }
  __device__ __forceinline__ static int lane() { return thread() % kWarpLanes; }
  __device__ __forceinline__ GradientScale<Element> scale() const {
    return GradientScale<Element>(a_.queue.control->largest);
  }
  // The same for all lanes of a warp, and the compiler is to know it.
  __device__ __forceinline__ static int warpgroup() {
    return __shfl_sync(0xffffffffu, thread() / LogitsSm90::kWarpgroupThreads, 0);
  }
  // The warp's number in its warpgroup.
  __device__ __forceinline__ static int warp() {
    return thread() / kWarpLanes % (LogitsSm90::kWarpgroupThreads / kWarpLanes);
  }

  const VisitsArguments<Element>& a_;
  VisitsSm90Shared<Element>& shared_;
  const VisitSlots slots_;
  const Ring ring_;
  RingPlace place_;
};

}  // namespace cce
