#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/centroids.cuh"
#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/logits_sm90.cuh"
#include "kernels/lse.cuh"
#include "kernels/visits_arguments.cuh"
#include "kernels/visits_sm90_config.h"

// As visits_sm80.cuh, on Hopper's copy engine and wgmma, a whole vocab tile at a time. A scout takes items from
// the list, waits for their gates and finds their tokens, an item ahead of the others; three warps of loaders
// gather the rows of E that visit and have the copy engine fetch C's and the ring's; two warpgroups consume. dz
// never leaves the registers on its way to dE: there it is the first operand of wgmma.
#ifndef CCE_ABLATE
#define CCE_ABLATE 0
#endif
namespace cce {

struct VisitsSm90Maps {
  CUtensorMap c;  // boxes of 256 rows by 64 elements
  // Boxes of 64 rows by 64 elements: the ring, and the residual masses and centroids, whose rows are tiles.
  CUtensorMap dz, residual, centroids;
};

// The barriers of the slots for items, by their shared addresses.
struct VisitSlots {
  uint32_t base;  // of a VisitsSm90Shared

  __device__ __forceinline__ uint32_t found(int slot) const {
    return base + offsetof(VisitsSm90Shared<uint16_t>, found) + slot * sizeof(uint64_t);
  }
  __device__ __forceinline__ uint32_t done(int slot) const {
    return base + offsetof(VisitsSm90Shared<uint16_t>, done) + slot * sizeof(uint64_t);
  }
};

struct VisitSlotPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == VisitsSm90::kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// ---- The scout: one warp ----

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
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(slots_.found(place.slot));
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
    uint32_t inclusive = mine;
#pragma unroll
    for (int distance = 1; distance < kWarpLanes; distance *= 2) {
      const uint32_t before = __shfl_up_sync(0xffffffffu, inclusive, distance);
      if (lane_ >= distance) inclusive += before;
    }
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
      int token = -1;
      if (m < visits) {
        token = slot.token[m];
        const GradientRow g = a_.rows[token];
        float weight = g.a;
        const bool own = g.label >= 0 && g.label / kTileColumns == item.strip;
        if (!own) {
          const uint16_t code = a_.tile_map[static_cast<int64_t>(item.strip) * a_.e.count + token];
          weight = __fdividef(weight, a_.rate.probability(decode_tile(code, a_.nll[token] * kLog2E)));
        }
        row = {weight, g.b, g.lse2, own ? g.label % kTileColumns : -1};
      } else if (m < rows) {
        token = a_.e.count;
        row.label = kCentroidRow;
      }
      if (leaves_dz(item.work) && token >= 0) a_.tokens[item.first_row + first_rank + m] = token;
      slot.token[m] = token;
      slot.row[m] = row;
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

// ---- The loaders: three warps ----

template <typename Element>
class VisitLoader {
 public:
  __device__ __forceinline__ VisitLoader(const VisitsSm90Maps& maps, const VisitsArguments<Element>& a,
                                         VisitsSm90Shared<Element>& shared, const Ring& ring)
      : maps_(maps),
        a_(a),
        shared_(shared),
        slots_{ring.base},
        ring_(ring) {}

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
      __syncwarp();
      if (thread() % kWarpLanes == 0) ptx::mbarrier_arrive(slots_.done(place.slot));
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
    const int slices = adds_to_e(slot.item.work) && !(CCE_ABLATE & 8) ? (a_.d + VisitsSm90::kSlice - 1) / VisitsSm90::kSlice : 0;
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
    for (int slice = 0; slice < slices; ++slice) {
      begin_stage(LogitsSm90::kTileC);
      if (thread() == 0) load_c(slice * VisitsSm90::kSlice, column0);
      end_stage();
    }
  }

  // 64 rows of the strip's dz, and their tokens' rows of E by 128 of D.
  __device__ __forceinline__ void load_grad_c(const VisitSlot<Element>& slot) {
    if (a_.grad_c == nullptr || (CCE_ABLATE & 4)) return;
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
          const Element* from =
              token[p] < a_.e.count ? a_.e.data + max(token[p], 0) * a_.e.stride
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
        ptx::tma_load(ring_.tile_e(place_.slot) + box * kBox, &maps_.centroids, full,
                      d0 + box * kRowElements, tile, ptx::policy_evict_normal());
      }
      end_stage();
    }
  }

  __device__ __forceinline__ void load_c(int depth, int column0) {
    // C streams; what comes again and again, E and the sums of dE, is to stay in L2.
    ptx::tma_load(ring_.tile_c(place_.slot), &maps_.c, ring_.full(place_.slot), depth, column0,
                  (CCE_ABLATE & 64) ? ptx::policy_evict_normal() : ptx::policy_evict_first());
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

// ---- The consumers: two warpgroups ----

template <typename Element>
class VisitConsumer {
 public:
  __device__ __forceinline__ VisitConsumer(const VisitsArguments<Element>& a, VisitsSm90Shared<Element>& shared,
                                           const Ring& ring)
      : a_(a),
        shared_(shared),
        slots_{ring.base},
        ring_(ring) {}

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
    const int slices = adds_to_e(slot.item.work) && !(CCE_ABLATE & 8) ? (a_.d + VisitsSm90::kSlice - 1) / VisitsSm90::kSlice : 0;
    if (slot.rows <= row0) {
      // The other warpgroup alone has rows.
      for (int stage = 0; stage < steps + slices; ++stage) skip_stage();
      return;
    }
    uint32_t dz[kTileColumns / 16][4];
    {
      Logits logits;
      logits.sums.clear();
      logits.template multiply<!(CCE_ABLATE & 16)>(ring_, place_, steps, warpgroup());
      write_dz(logits.sums, slot, dz);
    }
    int tokens[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) tokens[r] = slot.token[row0 + warp() * 16 + lane() / 4 + 8 * r];
    for (int slice = 0; slice < slices; ++slice) {
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
      if (!(CCE_ABLATE & 1)) add_slice(sums, tokens, slot.item.strip, slice * VisitsSm90::kSlice);
    }
  }

  // From the logits: dz as an operand, and in the ring. Step by step in the same registers: there are none for
  // two steps at once.
  __device__ __forceinline__ void write_dz(LogitSums& sums, const VisitSlot<Element>& slot,
                                           uint32_t (&dz)[kTileColumns / 16][4]) {
    const int column0 = slot.item.strip * kTileColumns;
    finish_logits(sums, column0 + LogitSums::first_column(lane()), a_.bias, a_.bias_stride, a_.softcap,
                  a_.c.count);
    ptx::wgmma_hold(sums.tiles[0]);
    const float factor = scale().factor;
    const int first_m = warpgroup() * LogitsSm90::kConsumerRows + warp() * 16 + lane() / 4;
    const auto row_of = [&](int r) -> const VisitRow& { return slot.row[first_m + LogitSums::row_offset(r)]; };
#pragma unroll
    for (int r = 0; r < LogitSums::kRows; ++r) {
      if (__any_sync(0xffffffffu, row_of(r).label == kCentroidRow)) weigh_mean_row(sums, r, row_of(r));
    }
#pragma unroll
    for (int r = 0; r < LogitSums::kRows; ++r) {
      const VisitRow row = row_of(r);
      const GradientRow g = {row.weight, row.b, row.lse2, row.label - LogitSums::first_column(lane())};
      if (row.label == kCentroidRow) continue;
#pragma unroll
      for (int c = 0; c < LogitSums::kColumns; ++c) {
        const float z = sums.at(r, c);
        float value = g.a * g.probability(z);
        if (g.label == LogitSums::column_offset(c)) value -= g.b;
        if (a_.softcap.present()) value *= a_.softcap.slope(z);
        sums.at(r, c) = value * factor;
      }
    }
    ptx::wgmma_hold(sums.tiles[0]);
    const int padded = static_cast<int>(a_.layout.padded(static_cast<uint32_t>(slot.rows)));
    Element* out = a_.dz + (static_cast<int64_t>(slot.item.first_row) + slot.item.part * kVisitRows + first_m) *
                               kTileColumns;
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
    if (a_.grad_c == nullptr || (CCE_ABLATE & 4)) return;
    const int end = static_cast<int>(slices.end);
    for (int slice = static_cast<int>(slices.begin); slice < end; ++slice) {
      BlockSums sums;
      multiply_transposed<true>(sums, rows);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row0 = static_cast<int64_t>(item.strip) * kTileColumns + first_row(half);
        store_block(sums.half[half], a_.grad_c, row0, a_.c.count, slice * kVisitSlice, a_.d, scale().inverse, lane());
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

template <typename Element>
__global__ void __launch_bounds__(VisitsSm90::kThreads, 1)
    visits_sm90_kernel(const __grid_constant__ VisitsSm90Maps maps,
                       const __grid_constant__ VisitsArguments<Element> a) {
  // Setup
  extern __shared__ unsigned char memory[];
  constexpr uint32_t kAlignment = LogitsSm90Shared::kAlignment;
  const auto unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t begin = (unaligned + kAlignment - 1) / kAlignment * kAlignment;
  static_assert(offsetof(VisitsSm90Shared<Element>, ring) == 0, "the ring's addresses count from there");
  auto& shared = *reinterpret_cast<VisitsSm90Shared<Element>*>(memory + (begin - unaligned));
  const Ring ring = {begin};
  const VisitSlots slots = {begin};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < LogitsSm90::kStages; ++slot) {
      ptx::mbarrier_init(ring.full(slot), 1 + VisitsSm90::kLoaderThreads);
      ptx::mbarrier_init(ring.empty(slot), LogitsSm90::kConsumerWarps);
    }
    for (int slot = 0; slot < VisitsSm90::kSlots; ++slot) {
      ptx::mbarrier_init(slots.found(slot), 1);
      ptx::mbarrier_init(slots.done(slot), LogitsSm90::kConsumerWarps + VisitsSm90::kLoaderWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  // The same for all lanes of a warp, and the compiler is to know it.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
  if (warp >= VisitsSm90::kFirstLoaderWarp) {
    ptx::keep_registers<VisitsSm90::kProducerRegisters>();
    if (warp < VisitsSm90::kScoutWarp) {
      VisitLoader<Element>(maps, a, shared, ring).run();
    } else if (warp == VisitsSm90::kScoutWarp) {
      VisitScout<Element>(a, shared, slots).run();
    }
  } else {
    ptx::take_registers<VisitsSm90::kConsumerRegisters>();
    VisitConsumer<Element>(a, shared, ring).run();
  }
}

}  // namespace cce
