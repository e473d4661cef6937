#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/centroids.cuh"
#include "kernels/copy_rows.cuh"
#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/gradient_small.cuh"
#include "kernels/visits_arguments.cuh"
#include "kernels/visits_config.h"
#include "ptx/copy.cuh"
#include "tile/block_scan.cuh"
#include "tile/gradient_row.cuh"
#include "tile/ring.cuh"
#include "tile/warp_product.cuh"

// The gradient of the visited pairs, a strip of 128 columns at a time. An item of dz gathers up to 128 of the
// tokens that visit its tile, recomputes their logits (K = D), leaves dz in shared memory and in a scratch
// ring, and adds dz C_strip to their rows of dE. An item of dC multiplies all of a strip's dz with the
// tokens' rows of E, and the tile's weights with the sum of E by residual masses, which is the control
// variate; the strip owns its rows of dC, which are written once. Items of rounding end dE. Blocks take the
// items in the plan's order.
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
        first_n_(thread_ / kWarpLanes % kVisitWarpsN * (kVisitColumns / kVisitWarpsN)) {}

  __device__ __forceinline__ void run() {
    const VisitQueue queue(a_.queue);
    for (;;) {
      if (thread_ == 0) shared_.queue.more = queue.take(shared_.queue.item);
      __syncthreads();
      if (!shared_.queue.more) break;
      const VisitItem item = shared_.queue.item;
      if (item.work == VisitWork::kGradC) {
        grad_c_rows(item);
      } else if (item.work == VisitWork::kRound) {
        round_rows(rounded_by(item, a_.layout).tokens);
      } else {
        visit_rows(item);
      }
      __syncthreads();
      if (thread_ == 0) queue.finish(item);
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
    const int column0 = item.strip * kVisitColumns;
    const Element* e_rows[kVisitRows / kPass];
    bool e_inside[kVisitRows / kPass];
#pragma unroll
    for (int p = 0; p < kVisitRows / kPass; ++p) {
      const int token = shared_.tokens[Lane::row() + p * kPass];
      e_inside[p] = is_token(token);
      e_rows[p] = a_.e.data + (e_inside[p] ? token : 0) * a_.e.stride + Lane::column();
    }
    // The control variate's row alone has neither logits nor dE.
    const bool visited = is_token(shared_.tokens[0]);
    const int depth_steps = visited ? (a_.d + kDepth - 1) / kDepth : 0;
    const int slices = visited && adds_to_e(item.work) ? (a_.d + kVisitSlice - 1) / kVisitSlice : 0;
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
        copy_rows_of_mn<kVisitColumns>(stage + kVisitTileBytes, a_.c, column0, k, a_.d);
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
    write_dz(logits, item, item.strip * kVisitColumns, count);
  }

  // The item's tokens, with what their dz needs, in shared memory; returns how many there are. Behind the
  // tile's last comes the control variate's row, number n.
  __device__ __forceinline__ int find_tokens(const VisitItem& item) {
    const int tile = a_.layout.tile_of(item.strip);
    const int words = mask_words(a_.e.count);
    const uint32_t* mask = a_.mask + static_cast<int64_t>(tile) * words;
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
    const int visits = static_cast<int>(total) - first_rank;
    const int count = min(visits + a_.layout.centroids, kVisitRows);
    if (thread_ < kVisitRows) {
      VisitRow row = {0.0f, 0.0f, INFINITY, -1};
      int token = -1;
      if (thread_ < min(visits, kVisitRows)) {
        token = shared_.tokens[thread_];
        const GradientRow g = a_.rows[token];
        float q = 1.0f;
        if (g.label < 0 || g.label / kTileColumns != tile) {
          const uint16_t code = a_.tile_map[static_cast<int64_t>(tile) * a_.e.count + token];
          const TileShare share = decode_tile(code, a_.nll[token] * kLog2E);
          q = a_.rate.probability(share, a_.scores == nullptr ? 1.0f : a_.scores[token].factor(share));
        }
        const int label = g.label - item.strip * kVisitColumns;
        const bool own = label >= 0 && label < kVisitColumns;
        row = {g.a / q, own ? g.b : 1.0f / q, g.lse2, own ? label : -1};
      } else if (thread_ < count) {
        token = a_.e.count;
        row.label = kCentroidRow;
      }
      if (leaves_dz(item.work) && token >= 0) a_.tokens[item.first_row + first_rank + thread_] = token;
      shared_.tokens[thread_] = token;
      shared_.rows[thread_] = row;
    }
    __syncthreads();
    return count;
  }

  // Of a row's scaled logits; of no token's, any.
  __device__ __forceinline__ LogitScore score_of(const VisitRow& row, int token) const {
    if (a_.scores == nullptr || !is_token(token)) return {kLog2E, 0.0f};
    return {a_.scores[token].scale2, a_.scores[token].h * (row.label < 0 ? row.b : 1.0f)};
  }

  // Whether the row of an item is a token's.
  __device__ __forceinline__ bool is_token(int token) const { return token >= 0 && token < a_.e.count; }

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
      const LogitScore score = score_of(row, shared_.tokens[m]);
#pragma unroll
      for (int c = 0; c < Sums::kColumns; c += 2) {
        float dz[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int n = first_n_ + Sums::column_offset(c + side) + Sums::first_column(lane_);
          const float z = sums.at(r, c + side);
          dz[side] = a_.scores == nullptr ? g.a * g.probability(z) : score.weighed(z, g.lse2, g.a);
          if (n == g.label) dz[side] -= g.b;
          if (a_.softcap.present()) dz[side] *= a_.softcap.slope(z);
          dz[side] *= scale_.factor;
        }
        const int n = first_n_ + Sums::column_offset(c);
        uint32_t pair = pack(dz[0], dz[1], Element());
        if (row.label == kCentroidRow) {
          const int column = n + Sums::first_column(lane_);
          pair = *reinterpret_cast<const uint32_t*>(
              a_.weights + static_cast<int64_t>(item.strip) * kVisitColumns + column);
        }
        *reinterpret_cast<uint32_t*>(shared_.dz + n / kRowElements * kVisitTileBytes +
                                     swizzled_offset(m, n % kRowElements / kChunkElements) +
                                     Sums::first_column(lane_) * 2) = pair;
      }
    }
    __syncthreads();
    if (leaves_dz(item.work)) {
      Element* out = a_.dz + (static_cast<int64_t>(item.first_row) + item.part * kVisitRows) * kVisitColumns;
      for (int index = thread_; index < count * (kVisitColumns / kChunkElements); index += kVisitThreads) {
        const int m = index / (kVisitColumns / kChunkElements);
        const int chunk = index % (kVisitColumns / kChunkElements);
        const unsigned char* from = shared_.dz + chunk / 8 * kVisitTileBytes + swizzled_offset(m, chunk % 8);
        *reinterpret_cast<uint4*>(out + index * kChunkElements) = *reinterpret_cast<const uint4*>(from);
      }
    }
  }

  // dE[tokens, slice] += dz C_strip[:, slice].
  __device__ __forceinline__ void add_slice(uint32_t stage, int d0, int m_tiles) {
    GradE product(lane_, first_m_, first_n_);
    product.clear();
    const uint32_t dz = shared_address(shared_.dz);
#pragma unroll
    for (int part = 0; part < kVisitColumns / 16; ++part) {
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
        if (!is_token(token) || column >= a_.d) continue;
        ptx::reduce_add_2(into + column, product.sums.at(r, c), product.sums.at(r, c + 1));
      }
    }
  }

  // ---- dC ----

  __device__ __forceinline__ void grad_c_rows(const VisitItem& item) {
    const uint32_t rows = a_.layout.rows_of(a_.counts, item.strip);
    const int count = static_cast<int>(rows);
    const int slices = (a_.d + kVisitSlice - 1) / kVisitSlice;
    const VisitRange range = slices_of(item, rows, slices);
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
    const Element* residual_e = a_.residual_e + static_cast<int64_t>(a_.layout.tile_of(item.strip)) * a_.d;
    int next_depth = 0, next_slice = first;
    const auto send = [&](uint32_t stage) {
      if (next_slice == end) return;
      const int k0 = next_depth * kDepth;
      const int d0 = next_slice * kVisitSlice;
      const Element* dz =
          a_.dz + (static_cast<int64_t>(item.first_row) + k0 + Lane::row()) * kVisitColumns + Lane::column();
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const int down = p % 2 * kPass, right = p / 2 * kRowElements;
        const int column = d0 + Lane::column() + right;
        const int token = next_tokens[p % 2];
        ptx::cp_async_16(Lane::destination(stage, p), dz + down * kVisitColumns + right, token >= 0);
        const Element* e = token < a_.e.count ? a_.e.data + max(token, 0) * a_.e.stride : residual_e;
        ptx::cp_async_16(Lane::destination(stage + kVisitTileBytes, p), e + column,
                         token >= 0 && column < a_.d);
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
      store_block(product.sums, a_.grad_c, static_cast<int64_t>(item.strip) * kVisitColumns + first_m_,
                  a_.c.count, slice * kVisitSlice + first_n_, a_.d, scale_.inverse, lane_);
    }
    stream.close();
  }

  // dbias of the strip: the sums of dz's columns, in the order of the tokens, and the control variate's.
  __device__ __forceinline__ void sum_bias(const VisitItem& item, int count) {
    constexpr int kParts = kVisitThreads / kVisitColumns;
    const int column = thread_ % kVisitColumns;
    const int part = thread_ / kVisitColumns;
    const Element* dz = a_.dz + static_cast<int64_t>(item.first_row) * kVisitColumns + column;
    float sum = 0.0f;
#pragma unroll 8
    for (int k = part; k < count - 1; k += kParts) sum += widen<float>(dz[k * kVisitColumns]);
    float* sums = reinterpret_cast<float*>(shared_.rows);
    static_assert(sizeof(shared_.rows) >= kVisitThreads * sizeof(float), "a sum for each thread");
    sums[thread_] = sum;
    __syncthreads();
    const int64_t v = static_cast<int64_t>(item.strip) * kVisitColumns + column;
    if (part == 0 && v < a_.c.count) {
      for (int other = 1; other < kParts; ++other) sum += sums[other * kVisitColumns + column];
      const float weight = widen<float>(dz[(count - 1) * kVisitColumns]) / centroid_weight_scale<Element>();
      sum += weight * a_.residual_sums[a_.layout.tile_of(item.strip)];
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

  // The strip's rows of C by one slice of D: two tiles of [64 rows][128 of D], rows being k.
  __device__ __forceinline__ void copy_slice(uint32_t stage, int column0, int d0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy_rows_of_k<kVisitSlice / kRowElements>(stage + half * kVisitTileBytes, a_.c,
                                                 column0 + half * kDepth, d0, a_.d);
    }
  }

  static_assert(kVisitRows / kVisitWarpsM == 64 && kVisitColumns / kVisitWarpsN == 32, "a warp's part");
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
