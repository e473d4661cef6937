#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "kernels/centroids.cuh"
#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/logits_sm90.cuh"
#include "kernels/visits_arguments.cuh"
#include "kernels/visits_sm90_config.h"

// As visits_sm80.cuh, on Hopper's copy engine and wgmma, a whole vocab tile at a time. A scout takes items from
// the list, waits for their gates and finds their tokens, an item ahead of the others; two warps of loaders
// gather the rows of E that visit and have the copy engine fetch C's and the ring's; two warpgroups consume. dz
// never leaves the registers on its way to dE: there it is the first operand of wgmma.
#ifndef CCE_ABLATE
#define CCE_ABLATE 0
#endif
namespace cce {

struct VisitsSm90Maps {
  CUtensorMap c;   // boxes of 256 rows by 64 elements
  CUtensorMap dz;  // the ring, in boxes of 64 rows by 64 elements
};

// The barriers of the slots for items, by their shared addresses.
struct VisitSlots {
  uint32_t base;  // of a VisitsSm90Shared

  __device__ __forceinline__ uint32_t found(int slot) const {
    return base + offsetof(VisitsSm90Shared, found) + slot * sizeof(uint64_t);
  }
  __device__ __forceinline__ uint32_t done(int slot) const {
    return base + offsetof(VisitsSm90Shared, done) + slot * sizeof(uint64_t);
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
  __device__ __forceinline__ VisitScout(const VisitsArguments<Element>& a, VisitsSm90Shared& shared,
                                        const VisitSlots& slots)
      : a_(a), shared_(shared), slots_(slots), lane_(static_cast<int>(threadIdx.x) % kWarpLanes) {}

  __device__ __forceinline__ void run() {
    const VisitQueue queue(a_.queue);
    VisitSlotPlace place;
    for (bool more = true; more; place.advance()) {
      ptx::mbarrier_wait(slots_.done(place.slot), place.parity ^ 1);
      VisitSlot& slot = shared_.slots[place.slot];
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
  __device__ __forceinline__ void find_tokens(VisitSlot& slot) {
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
          weight /= a_.rate.probability(decode_tile(code, a_.nll[token] * kLog2E));
        }
        row = {weight, g.b, g.lse2, own ? g.label % kTileColumns : -1};
      } else if (m < rows) {
        token = a_.e.count;
        row.label = kCentroidRow;
      }
      if (leaves_dz(item.work) && token >= 0) a_.tokens[item.first_row + first_rank + m] = token;
      slot.token[m] = token;
      slot.row[m] = row;
    }
    if (lane_ == 0) {
      slot.visits = visits;
      slot.rows = rows;
    }
  }

  const VisitsArguments<Element>& a_;
  VisitsSm90Shared& shared_;
  const VisitSlots slots_;
  const int lane_;
};

// ---- The loaders: two warps ----

template <typename Element>
class VisitLoader {
 public:
  __device__ __forceinline__ VisitLoader(const VisitsSm90Maps& maps, const VisitsArguments<Element>& a,
                                         VisitsSm90Shared& shared, const VisitSlots& slots, const Ring& ring)
      : maps_(maps),
        a_(a),
        shared_(shared),
        slots_(slots),
        ring_(ring),
        thread_(static_cast<int>(threadIdx.x) - VisitsSm90::kFirstLoaderWarp * kWarpLanes),
        policy_(ptx::policy_evict_normal()) {}

  __device__ __forceinline__ void run() {
    for (VisitSlotPlace place;; place.advance()) {
      ptx::mbarrier_wait(slots_.found(place.slot), place.parity);
      const VisitSlot& slot = shared_.slots[place.slot];
      if (!slot.more) break;
      // What other blocks' threads wrote, the copy engine reads.
      ptx::fence_async();
      if (slot.item.work == VisitWork::kGradC) {
        load_grad_c(slot);
      } else if (slot.item.work != VisitWork::kRound && slot.visits > 0) {
        load_visits(slot);
      }
      __syncwarp();
      if (thread_ % kWarpLanes == 0) ptx::mbarrier_arrive(slots_.done(place.slot));
    }
  }

 private:
  static constexpr int kDepth = LogitsSm90::kDepth;
  static constexpr int kBox = kRowElements * kRowBytes;  // 64 rows
  // A thread copies one chunk of every eighth row.
  static constexpr int kPass = VisitsSm90::kLoaderThreads / 8;
  static_assert(kPass == 8, "the swizzle repeats every 8 rows");

  // Rows of E and C by 64 of D, and then C's again for dE.
  __device__ __forceinline__ void load_visits(const VisitSlot& slot) {
    const int column0 = slot.item.strip * kTileColumns;
    const int steps = (a_.d + kDepth - 1) / kDepth;
    const int slices = adds_to_e(slot.item.work) && !(CCE_ABLATE & 8) ? (a_.d + VisitsSm90::kSlice - 1) / VisitsSm90::kSlice : 0;
    // Whole warpgroups of rows; those past the last are zeros.
    const int rows = slot.rows > LogitsSm90::kConsumerRows ? kVisitRows : LogitsSm90::kConsumerRows;
    for (int step = 0; step < steps; ++step) {
      begin_stage(LogitsSm90::kTileC);
      if (thread_ == 0) load_c(step * kDepth, column0);
      const int depth = step * kDepth + column();
      const uint32_t to = destination(0);
      // Their numbers stay in shared memory: there are no registers for them.
#pragma unroll 4
      for (int m = row(); m < rows; m += kPass) {
        const int token = m < slot.visits ? slot.token[m] : -1;
        ptx::cp_async_16(to + m / kPass * (kPass * kRowBytes), a_.e.data + max(token, 0) * a_.e.stride + depth,
                         token >= 0 && depth < a_.d);
      }
      end_stage();
    }
    for (int slice = 0; slice < slices; ++slice) {
      begin_stage(LogitsSm90::kTileC);
      if (thread_ == 0) load_c(slice * VisitsSm90::kSlice, column0);
      end_stage();
    }
  }

  // 64 rows of the strip's dz, and their tokens' rows of E by 128 of D.
  __device__ __forceinline__ void load_grad_c(const VisitSlot& slot) {
    if (a_.grad_c == nullptr || (CCE_ABLATE & 4)) return;
    const VisitItem item = slot.item;
    const VisitRange slices = slices_of(item, static_cast<uint32_t>(slot.rows), a_.layout.slices);
    const int* tokens = a_.tokens + item.first_row;
    const Element* residual_e = a_.residual_e + static_cast<int64_t>(item.strip) * a_.d;
    constexpr int kPasses = kDepth / kPass;
    // Fetched a stage ahead of their rows.
    int token[kPasses];
    const auto fetch_tokens = [&](int k0) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        const int k = k0 + p * kPass + row();
        token[p] = k < slot.rows ? __ldcg(tokens + k) : -1;
      }
    };
    fetch_tokens(0);
    for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
      const int d0 = static_cast<int>(slice) * kVisitSlice + column();
      for (int k0 = 0; k0 < slot.rows; k0 += kDepth) {
        begin_stage(4 * kBox);
        if (thread_ < 4) {
          ptx::tma_load(ring_.tile_c(place_.slot) + thread_ * kBox, &maps_.dz, ring_.full(place_.slot),
                        thread_ * kRowElements, static_cast<int>(item.first_row) + k0, policy_);
        }
        // Whole k of wgmma: the rows past the last are zeros.
        const int passes = min((slot.rows - k0 + 15) / 16 * 16, kDepth) / kPass;
#pragma unroll
        for (int p = 0; p < kPasses; ++p) {
          if (p >= passes) continue;
          const Element* from =
              token[p] < a_.e.count ? a_.e.data + max(token[p], 0) * a_.e.stride : residual_e;
#pragma unroll
          for (int box = 0; box < 2; ++box) {
            const int d = d0 + box * kRowElements;
            ptx::cp_async_16(destination(p) + box * kBox, from + d, token[p] >= 0 && d < a_.d);
          }
        }
        end_stage();
        fetch_tokens(k0 + kDepth < slot.rows ? k0 + kDepth : 0);
      }
    }
  }

  __device__ __forceinline__ void load_c(int depth, int column0) {
    ptx::tma_load(ring_.tile_c(place_.slot), &maps_.c, ring_.full(place_.slot), depth, column0, policy_);
  }

  // Waits until the next stage's slot is free, and has it expect so many bytes of the copy engine.
  __device__ __forceinline__ void begin_stage(int bytes) {
    ptx::mbarrier_wait(ring_.empty(place_.slot), place_.parity ^ 1);
    if (thread_ == 0) ptx::mbarrier_arrive_expect(ring_.full(place_.slot), static_cast<uint32_t>(bytes));
    // Before other threads' copies arrive: their bytes would be more than expected.
    __syncwarp();
  }
  __device__ __forceinline__ void end_stage() {
    ptx::mbarrier_arrive_after_copies(ring_.full(place_.slot));
    place_.advance();
  }

  // The thread's first row of a stage's E, its chunk there, and where pass p puts it.
  __device__ __forceinline__ int row() const { return thread_ / 8; }
  __device__ __forceinline__ int column() const { return thread_ % 8 * kChunkElements; }
  __device__ __forceinline__ uint32_t destination(int p) const {
    return ring_.tile_e(place_.slot) + swizzled_offset(row(), thread_ % 8) + p * kPass * kRowBytes;
  }

  const VisitsSm90Maps& maps_;
  const VisitsArguments<Element>& a_;
  VisitsSm90Shared& shared_;
  const VisitSlots slots_;
  const Ring ring_;
  const int thread_;
  const uint64_t policy_;
  RingPlace place_;
};

// ---- The consumers: two warpgroups ----

template <typename Element>
class VisitConsumer {
 public:
  __device__ __forceinline__ VisitConsumer(const VisitsArguments<Element>& a, VisitsSm90Shared& shared,
                                           const VisitSlots& slots, const Ring& ring, int warpgroup)
      : a_(a),
        shared_(shared),
        slots_(slots),
        ring_(ring),
        scale_(a.queue.control->largest),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarpLanes),
        warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    const VisitQueue queue(a_.queue);
    for (VisitSlotPlace place;; place.advance()) {
      ptx::mbarrier_wait(slots_.found(place.slot), place.parity);
      const VisitSlot& slot = shared_.slots[place.slot];
      if (!slot.more) break;
      const VisitItem item = slot.item;
      if (item.work == VisitWork::kGradC) {
        grad_c_rows(item, slot.rows);
      } else if (item.work == VisitWork::kRound) {
        round_rows(tokens_of(item, a_.e.count));
      } else {
        visit_rows(slot);
      }
      // What threads wrote, other blocks' copy engine reads.
      ptx::fence_async();
      ptx::wait_at_barrier<1, VisitsSm90::kConsumerThreads>();
      if (thread_ == 0) queue.finish(item);
      if (lane_ == 0) ptx::mbarrier_arrive(slots_.done(place.slot));
    }
  }

 private:
  static constexpr int kDepth = LogitsSm90::kDepth;
  static constexpr int kBox = kRowElements * kRowBytes;
  using Logits = WarpgroupProduct<Element, 1>;
  using LogitSums = decltype(Logits::sums);

  // ---- dz and dE ----

  __device__ __forceinline__ void visit_rows(const VisitSlot& slot) {
    const int row0 = warpgroup_ * LogitsSm90::kConsumerRows;
    const bool busy = slot.rows > row0;  // else the other warpgroup alone has rows
    const bool visited = slot.visits > 0;  // else there is the control variate's row alone
    const int steps = visited ? (a_.d + kDepth - 1) / kDepth : 0;
    const int slices =
        visited && adds_to_e(slot.item.work) && !(CCE_ABLATE & 8) ? (a_.d + VisitsSm90::kSlice - 1) / VisitsSm90::kSlice : 0;
    if (!busy) {
      for (int stage = 0; stage < steps + slices; ++stage) skip_stage();
      return;
    }
    uint32_t dz[kTileColumns / 16][4];
    {
      Logits logits;
      logits.sums.clear();
      if (steps > 0) logits.template multiply<true>(ring_, place_, steps, warpgroup_);
      write_dz(logits.sums, slot, dz);
    }
    const int m = row0 + warp() * 16 + lane_ / 4;
    float* into[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool token = m + 8 * r < slot.visits;
      into[r] = token ? a_.sum_e + static_cast<int64_t>(slot.token[m + 8 * r]) * a_.d : nullptr;
    }
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
      if (!(CCE_ABLATE & 1)) add_slice(sums, into, slice * VisitsSm90::kSlice);
    }
  }

  // From the finished logits: dz as an operand, and in the ring.
  __device__ __forceinline__ void write_dz(LogitSums& sums, const VisitSlot& slot,
                                           uint32_t (&dz)[kTileColumns / 16][4]) {
    const VisitItem item = slot.item;
    const int64_t column0 = static_cast<int64_t>(item.strip) * kTileColumns;
    finish_logits(sums, static_cast<int>(column0) + LogitSums::first_column(lane_), a_.bias, a_.bias_stride,
                  a_.softcap, a_.c.count);
    const int padded = static_cast<int>(a_.layout.padded(static_cast<uint32_t>(slot.rows)));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = warpgroup_ * LogitsSm90::kConsumerRows + warp() * 16 + lane_ / 4 + 8 * r;
      const VisitRow row = slot.row[m];
      const GradientRow g = {row.weight, row.b, row.lse2, row.label};
      Element* out = a_.dz + (static_cast<int64_t>(item.first_row) + item.part * kVisitRows + m) * kTileColumns;
      const Element* weights = a_.weights + column0 + LogitSums::first_column(lane_);
      const bool leaves = leaves_dz(item.work) && m < padded;
#pragma unroll
      for (int group = 0; group < kTileColumns / 32; ++group) {
        const auto pair = [&](int k) {
          const int tile = 4 * group + k;
          float value[2];
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const float z = sums.at(r, 2 * tile + side);
            value[side] = g.a * g.probability(z);
            if (g.label == 8 * tile + LogitSums::first_column(lane_) + side) value[side] -= g.b;
            if (a_.softcap.present()) value[side] *= a_.softcap.slope(z);
            value[side] *= scale_.factor;
          }
          uint32_t packed = pack(value[0], value[1], Element());
          if (row.label == kCentroidRow) packed = *reinterpret_cast<const uint32_t*>(weights + 8 * tile);
          dz[tile / 2][tile % 2 * 2 + r] = packed;
          return packed;
        };
        store_32_columns(pair, leaves, out + 32 * group, lane_);
      }
    }
  }

  // dE[tokens, slice] += the product.
  __device__ __forceinline__ void add_slice(const float (&sums)[VisitsSm90::kSlice / 8][4],
                                            float* const (&into)[2], int d0) {
    const int column = d0 + lane_ % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (into[r] == nullptr) continue;
#pragma unroll
      for (int tile = 0; tile < VisitsSm90::kSlice / 8; ++tile) {
        if (column + 8 * tile >= a_.d) continue;
        ptx::reduce_add_2(into[r] + column + 8 * tile, sums[tile][2 * r], sums[tile][2 * r + 1]);
      }
    }
  }

  // ---- dC ----

  __device__ __forceinline__ void grad_c_rows(const VisitItem& item, int rows) {
    const VisitRange slices = slices_of(item, static_cast<uint32_t>(rows), a_.layout.slices);
    if (slices.begin == 0 && a_.grad_bias != nullptr) sum_bias(item, rows);
    if (a_.grad_c == nullptr || (CCE_ABLATE & 4)) return;
    for (int64_t slice = slices.begin; slice < slices.end; ++slice) {
      // The warpgroup's 128 columns of the strip, in two halves.
      MmaSums<1, kVisitSlice / 8> sums[2];
      int previous = -1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums[half].clear();
        ptx::wgmma_hold(sums[half].tiles[0]);
      }
      for (int k0 = 0; k0 < rows; k0 += kDepth) {
        ptx::mbarrier_wait(ring_.full(place_.slot), place_.parity);
        ptx::fence_async();
        const uint64_t e = ptx::wgmma_operand_mn(ring_.tile_e(place_.slot), kBox);
        const uint64_t dz =
            ptx::wgmma_operand_mn(ring_.tile_c(place_.slot) + 2 * warpgroup_ * kBox, kBox);
        const int parts = min((rows - k0 + 15) / 16, kDepth / 16);
        ptx::wgmma_fence();
#pragma unroll
        for (int part = 0; part < kDepth / 16; ++part) {
          if (part >= parts) continue;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ptx::wgmma_m64n128k16_mn<Element>(
                sums[half].tiles[0], dz + half * (kBox / 16) + part * ptx::kWgmmaNextRows,
                e + part * ptx::kWgmmaNextRows, k0 > 0 || part > 0);
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
      for (int half = 0; half < 2; ++half) ptx::wgmma_hold(sums[half].tiles[0]);
      release(previous);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row0 = static_cast<int64_t>(item.strip) * kTileColumns + warpgroup_ * 128 + half * 64;
        if (!(CCE_ABLATE & 2)) store_block(sums[half], a_.grad_c, row0 + warp() * 16, a_.c.count,
                    static_cast<int>(slice) * kVisitSlice, a_.d, scale_.inverse, lane_);
      }
    }
  }

  // dbias of the strip: the sums of dz's columns, in the order of the tokens, and the control variate's.
  __device__ __forceinline__ void sum_bias(const VisitItem& item, int rows) {
    static_assert(VisitsSm90::kConsumerThreads == kTileColumns, "a thread a column");
    const Element* dz = a_.dz + static_cast<int64_t>(item.first_row) * kTileColumns + thread_;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = 0; k < rows - 1; ++k) sum += widen<float>(dz[static_cast<int64_t>(k) * kTileColumns]);
    const float weight =
        widen<float>(dz[static_cast<int64_t>(rows - 1) * kTileColumns]) / centroid_weight_scale<Element>();
    sum += weight * a_.residual_sums[item.strip];
    const int64_t v = static_cast<int64_t>(item.strip) * kTileColumns + thread_;
    if (v < a_.c.count) a_.grad_bias[v] = narrow<Element>(sum * scale_.inverse);
  }

  // ---- dE from its sums ----

  __device__ __forceinline__ void round_rows(const VisitRange& tokens) {
    const int64_t begin = tokens.begin * a_.d, end = tokens.end * a_.d;
    for (int64_t i = begin + thread_ * 4; i < end; i += VisitsSm90::kConsumerThreads * 4) {
      // From L2, where the sums were made.
      const float4 x = __ldcg(reinterpret_cast<const float4*>(a_.sum_e + i));
      store_rounded(a_.grad_e + i, x, scale_.inverse);
    }
  }

  // ---- The ring ----

  __device__ __forceinline__ void release(int slot) {
    if (lane_ == 0) ptx::mbarrier_arrive(ring_.empty(slot));
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

  // The warp's number in its warpgroup.
  __device__ __forceinline__ int warp() const {
    return thread_ / kWarpLanes % (LogitsSm90::kWarpgroupThreads / kWarpLanes);
  }

  const VisitsArguments<Element>& a_;
  VisitsSm90Shared& shared_;
  const VisitSlots slots_;
  const Ring ring_;
  const GradientScale<Element> scale_;
  const int thread_, lane_, warpgroup_;
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
  static_assert(offsetof(VisitsSm90Shared, ring) == 0, "the ring's addresses count from there");
  auto& shared = *reinterpret_cast<VisitsSm90Shared*>(memory + (begin - unaligned));
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
      VisitLoader<Element>(maps, a, shared, slots, ring).run();
    } else if (warp == VisitsSm90::kScoutWarp) {
      VisitScout<Element>(a, shared, slots).run();
    }
  } else {
    ptx::take_registers<VisitsSm90::kConsumerRegisters>();
    VisitConsumer<Element>(a, shared, slots, ring, warp / 4).run();
  }
}

}  // namespace cce
