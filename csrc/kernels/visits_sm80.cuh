#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "kernels/copy_rows.cuh"
#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/tile_map.cuh"
#include "kernels/visits_arguments.cuh"
#include "kernels/visits_config.h"
#include "ptx/copy.cuh"
#include "tile/block_scan.cuh"
#include "tile/gradient_row.cuh"
#include "tile/ring.cuh"
#include "tile/warp_product.cuh"

// The gradient of the visited pairs. An item of dz gathers up to 128 of a tile's visiting tokens, recomputes
// their logits (K = D), leaves dz in shared memory and in a scratch ring, and adds dz C_tile to their rows of
// dE. An item of dC multiplies all of a tile's dz with the tokens' rows of E: the tile owns its rows of dC,
// which are written once. Items of rounding end dE. Blocks take the items in the plan's order.
namespace cce {

template <typename Element>
class Visits {
 public:
  using Arguments = VisitsArguments<Element>;
  using Shared = VisitsShared;

  __device__ __forceinline__ Visits(const Arguments& a, unsigned char* shared)
      : a_(a),
        shared_(*reinterpret_cast<Shared*>(shared + a.stages * kVisitStageBytes)),
        ring_(shared_address(shared)),
        scale_(a.queue.control->largest),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % kWarpLanes),
        first_m_(thread_ / kWarpLanes / kVisitWarpsN * (kVisitRows / kVisitWarpsM)),
        first_n_(thread_ / kWarpLanes % kVisitWarpsN * (kTileColumns / kVisitWarpsN)) {}

  __device__ __forceinline__ void run() {
    VisitQueue queue(a_.queue, shared_.queue);
    while (queue.take()) {
      const VisitItem item = queue.item();
      if (item.work == VisitWork::kGradC) {
        grad_c_rows(item);
      } else if (item.work == VisitWork::kRound) {
        round_rows(tokens_of(item, a_.e.count));
      } else {
        visit_rows(item);
      }
      queue.finish();
    }
  }

 private:
  static constexpr int kDepth = kLogitsDepth;
  using Logits = WarpProduct<Element, 4, 4, Major::kK, Major::kK>;
  using GradE = WarpProduct<Element, 4, 4, Major::kK, Major::kMN>;
  using GradC = WarpProduct<Element, 4, 4, Major::kMN, Major::kMN>;

  // ---- dz and dE ----

  __device__ __forceinline__ void visit_rows(const VisitItem& item) {
    const int count = find_tokens(item);
    const int column0 = item.tile * kTileColumns;
    const Element* e_rows[kVisitRows / kPass];
    bool e_inside[kVisitRows / kPass];
#pragma unroll
    for (int p = 0; p < kVisitRows / kPass; ++p) {
      const int token = shared_.tokens[Lane::row() + p * kPass];
      e_inside[p] = token >= 0;
      e_rows[p] = a_.e.data + max(token, 0) * a_.e.stride + Lane::column();
    }
    const int depth_steps = (a_.d + kDepth - 1) / kDepth;
    const int slices = adds_to_e(item.work) ? (a_.d + kVisitSlice - 1) / kVisitSlice : 0;
    const int m_tiles = min(max((count - first_m_ + 15) / 16, 0), 4);

    int sent = 0;
    const auto send = [&](uint32_t stage) {
      const int step = sent++;
      if (step < depth_steps) {
        const int k = step * kDepth;
#pragma unroll
        for (int p = 0; p < kVisitRows / kPass; ++p) {
          ptx::cp_async_16(Lane::destination(stage, p), e_rows[p] + k,
                           e_inside[p] && k + Lane::column() < a_.d);
        }
        copy_rows_of_mn<kTileColumns>(stage + kVisitTileBytes, a_.c, column0, k, a_.d);
      } else if (step < depth_steps + slices) {
        copy_slice(stage, column0, (step - depth_steps) * kVisitSlice);
      }
    };
    StageStream<kVisitStageBytes, decltype(send)> stream(ring_, a_.stages, send);
    write_dz_of(stream, depth_steps, item, count, m_tiles);
    for (int slice = 0; slice < slices; ++slice) {
      stream.next();
      stream.fill();
      const uint32_t stage = stream.stage();
      add_slice(stage, slice * kVisitSlice, m_tiles);
    }
    stream.close();
  }

  template <typename Stages>
  __device__ __forceinline__ void write_dz_of(Stages& stream, int steps, const VisitItem& item, int count,
                                              int m_tiles) {
    Logits logits(lane_, first_m_, first_n_);
    logits.clear();
    for (int step = 0; step < steps; ++step) {
      stream.next();
      stream.fill();
      const uint32_t stage = stream.stage();
#pragma unroll
      for (int part = 0; part < kDepth / 16; ++part) {
        typename Logits::Fragments f;
        logits.load(f, stage, stage + kVisitTileBytes, part, m_tiles);
        logits.multiply(f, m_tiles);
      }
    }
    write_dz(logits, item, item.tile * kTileColumns, count);
  }

  // The item's tokens, with what their dz needs, in shared memory; returns how many there are.
  __device__ __forceinline__ int find_tokens(const VisitItem& item) {
    const int words = mask_words(a_.e.count);
    const uint32_t* mask = a_.mask + static_cast<int64_t>(item.tile) * words;
    const int share = (words + kVisitThreads - 1) / kVisitThreads;
    const int first = min(thread_ * share, words), end = min(first + share, words);
    uint32_t mine = 0;
    for (int w = first; w < end; ++w) mine += __popc(mask[w]);
    uint32_t total;
    const int first_rank = static_cast<int>(visits_of(item, 0xffffffffu).begin);
    int rank = static_cast<int>(block_exclusive_sum<kVisitThreads>(mine, shared_.scan, total)) - first_rank;
    for (int w = first; w < end && rank < kVisitRows; ++w) {
      for (uint32_t bits = mask[w]; bits != 0; bits &= bits - 1, ++rank) {
        if (rank >= 0 && rank < kVisitRows) shared_.tokens[rank] = w * kMaskBits + __ffs(bits) - 1;
      }
    }
    __syncthreads();
    const int count = min(static_cast<int>(total) - first_rank, kVisitRows);
    if (thread_ < kVisitRows) {
      VisitRow row = {0.0f, 0.0f, INFINITY, -1};
      if (thread_ < count) {
        const int token = shared_.tokens[thread_];
        const GradientRow g = a_.rows[token];
        const bool own = g.label >= 0 && g.label / kTileColumns == item.tile;
        float weight = g.a;
        if (!own) {
          const __nv_bfloat16 map = a_.tile_map[static_cast<int64_t>(item.tile) * a_.e.count + token];
          weight /= probability_of_visit(map, a_.nll[token], a_.log_rate);
        }
        row = {weight, g.b, g.lse2, own ? g.label % kTileColumns : -1};
        if (leaves_dz(item.work)) a_.tokens[item.first_row + first_rank + thread_] = token;
      } else {
        shared_.tokens[thread_] = -1;
      }
      shared_.rows[thread_] = row;
    }
    __syncthreads();
    return count;
  }

  // From the finished logits: dz to shared memory and to the ring.
  __device__ __forceinline__ void write_dz(Logits& logits, const VisitItem& item, int column0, int count) {
    using Sums = typename Logits::Sums;
    Sums& sums = logits.sums;
    finish_logits(sums, column0 + first_n_ + Sums::first_column(lane_), a_.bias, a_.bias_stride, a_.softcap,
                  a_.c.count);
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      const int m = first_m_ + Sums::row_offset(r) + Sums::first_row(lane_);
      const VisitRow row = shared_.rows[m];
      const GradientRow g = {row.weight, row.b, row.lse2, row.label};
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += 2) {
        float dz[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int n = first_n_ + Sums::column_offset(c + side) + Sums::first_column(lane_);
          const float z = sums.at(r, c + side);
          dz[side] = g.a * g.probability(z);
          if (n == g.label) dz[side] -= g.b;
          if (a_.softcap.present()) dz[side] *= a_.softcap.slope(z);
          dz[side] *= scale_.factor;
        }
        const int n = first_n_ + Sums::column_offset(c);
        *reinterpret_cast<uint32_t*>(shared_.dz + n / kRowElements * kVisitTileBytes +
                                     swizzled_offset(m, n % kRowElements / kChunkElements) +
                                     Sums::first_column(lane_) * 2) = pack(dz[0], dz[1], Element());
      }
    }
    __syncthreads();
    if (leaves_dz(item.work)) {
      Element* out = a_.dz + (static_cast<int64_t>(item.first_row) + item.part * kVisitRows) * kTileColumns;
      for (int index = thread_; index < count * (kTileColumns / kChunkElements); index += kVisitThreads) {
        const int m = index / (kTileColumns / kChunkElements);
        const int chunk = index % (kTileColumns / kChunkElements);
        const unsigned char* from = shared_.dz + chunk / 8 * kVisitTileBytes + swizzled_offset(m, chunk % 8);
        *reinterpret_cast<uint4*>(out + index * kChunkElements) = *reinterpret_cast<const uint4*>(from);
      }
    }
  }

  // dE[tokens, slice] += dz C_tile[:, slice].
  __device__ __forceinline__ void add_slice(uint32_t stage, int d0, int m_tiles) {
    GradE product(lane_, first_m_, first_n_);
    product.clear();
    const uint32_t dz = shared_address(shared_.dz);
#pragma unroll
    for (int part = 0; part < kTileColumns / 16; ++part) {
      const int half = part / 4 * kVisitTileBytes;
      typename GradE::Fragments f;
      product.load(f, dz + half, stage + half, part % 4, m_tiles);
      product.multiply(f, m_tiles);
    }
    using Sums = typename GradE::Sums;
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      if (r / 2 >= m_tiles) continue;
      const int token = shared_.tokens[first_m_ + Sums::row_offset(r) + Sums::first_row(lane_)];
      float* into = a_.sum_e + static_cast<int64_t>(max(token, 0)) * a_.d;
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += 2) {
        const int column = d0 + first_n_ + Sums::column_offset(c) + Sums::first_column(lane_);
        if (token < 0 || column >= a_.d) continue;
        ptx::reduce_add_2(into + column, product.sums.at(r, c), product.sums.at(r, c + 1));
      }
    }
  }

  // ---- dC ----

  __device__ __forceinline__ void grad_c_rows(const VisitItem& item) {
    const int count = static_cast<int>(a_.counts[item.tile]);
    const int slices = (a_.d + kVisitSlice - 1) / kVisitSlice;
    const VisitRange range = slices_of(item, a_.counts[item.tile], slices);
    const int first = static_cast<int>(range.begin), end = static_cast<int>(range.end);
    if (first == 0 && a_.grad_bias != nullptr) sum_bias(item, count);
    if (a_.grad_c == nullptr) return;

    // Tokens of the stage that is sent for next, fetched a stage ahead of their rows.
    const int* tokens = a_.tokens + item.first_row;
    const int stages_per_slice = max((count + kDepth - 1) / kDepth, 1);
    int next_tokens[2];
    const auto fetch_tokens = [&](int k0) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int k = k0 + p * kPass + Lane::row();
        next_tokens[p] = k < count ? __ldcg(tokens + k) : -1;
      }
    };
    fetch_tokens(0);
    int next_depth = 0, next_slice = first;
    const auto send = [&](uint32_t stage) {
      if (next_slice == end) return;
      const int k0 = next_depth * kDepth;
      const int d0 = next_slice * kVisitSlice;
      const Element* dz =
          a_.dz + (static_cast<int64_t>(item.first_row) + k0 + Lane::row()) * kTileColumns + Lane::column();
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int down = p % 2 * kPass, right = p / 2 * kRowElements;
        const int column = d0 + Lane::column() + right;
        const int token = next_tokens[p % 2];
        ptx::cp_async_16(Lane::destination(stage, p), dz + down * kTileColumns + right, token >= 0);
        ptx::cp_async_16(Lane::destination(stage + kVisitTileBytes, p),
                         a_.e.data + max(token, 0) * a_.e.stride + column, token >= 0 && column < a_.d);
      }
      if (++next_depth == stages_per_slice) {
        next_depth = 0;
        ++next_slice;
      }
      fetch_tokens(next_depth * kDepth);
    };
    GradC product(lane_, first_m_, first_n_);
    StageStream<kVisitStageBytes, decltype(send)> stream(ring_, a_.stages, send);
    for (int slice = first; slice < end; ++slice) {
      product.clear();
      for (int depth = 0; depth < stages_per_slice; ++depth) {
        stream.next();
        stream.fill();
        const uint32_t stage = stream.stage();
        const int parts = min((count - depth * kDepth + 15) / 16, kDepth / 16);
#pragma unroll
        for (int part = 0; part < kDepth / 16; ++part) {
          if (part >= parts) continue;
          typename GradC::Fragments f;
          product.load(f, stage, stage + kVisitTileBytes, part);
          product.multiply(f);
        }
      }
      store_block(product.sums, a_.grad_c, static_cast<int64_t>(item.tile) * kTileColumns + first_m_,
                  a_.c.count, slice * kVisitSlice + first_n_, a_.d, scale_.inverse, lane_);
    }
    stream.close();
  }

  // dbias of the tile: the sums of dz's columns, in the order of the tokens.
  __device__ __forceinline__ void sum_bias(const VisitItem& item, int count) {
    constexpr int kParts = kVisitThreads / kTileColumns;
    const int column = thread_ % kTileColumns;
    const int part = thread_ / kTileColumns;
    const Element* dz = a_.dz + static_cast<int64_t>(item.first_row) * kTileColumns + column;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = part; k < count; k += kParts) sum += widen<float>(dz[k * kTileColumns]);
    float* sums = reinterpret_cast<float*>(shared_.rows);
    static_assert(sizeof(shared_.rows) >= kVisitThreads * sizeof(float), "a sum for each thread");
    sums[thread_] = sum;
    __syncthreads();
    const int64_t v = static_cast<int64_t>(item.tile) * kTileColumns + column;
    if (part == 0 && v < a_.c.count) {
      for (int other = 1; other < kParts; ++other) sum += sums[other * kTileColumns + column];
      a_.grad_bias[v] = narrow<Element>(sum * scale_.inverse);
    }
    __syncthreads();
  }

  // ---- dE from its sums ----

  __device__ __forceinline__ void round_rows(const VisitRange& tokens) {
    const int64_t begin = tokens.begin * a_.d, end = tokens.end * a_.d;
    for (int64_t i = begin + thread_ * 4; i < end; i += kVisitThreads * 4) {
      // From L2, where the sums were made.
      const float4 x = __ldcg(reinterpret_cast<const float4*>(a_.sum_e + i));
      store_rounded(a_.grad_e + i, x, scale_.inverse);
    }
  }

  // ---- Copies that several products share ----

  // The tile's rows of C by one slice of D: two tiles of [64 rows][128 of D], rows being k.
  __device__ __forceinline__ void copy_slice(uint32_t stage, int column0, int d0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy_rows_of_k<kVisitSlice / kRowElements>(stage + half * kVisitTileBytes, a_.c,
                                                 column0 + half * kDepth, d0, a_.d);
    }
  }

  static_assert(kVisitRows / kVisitWarpsM == 64 && kTileColumns / kVisitWarpsN == 32, "a warp's part");
  static_assert(kVisitThreads == kLogitsThreads, "the copies are shared");
  using Lane = CopyLane<kVisitThreads>;
  static constexpr int kPass = Lane::kRowsPerPass;

  const Arguments& a_;
  Shared& shared_;
  const uint32_t ring_;
  const GradientScale<Element> scale_;
  const int thread_, lane_;
  const int first_m_, first_n_;
};

template <typename Element>
__global__ void __launch_bounds__(kVisitThreads, 1)
    visits_sm80_kernel(const __grid_constant__ VisitsArguments<Element> a) {
  extern __shared__ __align__(128) unsigned char shared[];
  Visits<Element>(a, shared).run();
}

}  // namespace cce
