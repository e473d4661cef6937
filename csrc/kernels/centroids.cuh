#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/centroids_config.h"
#include "kernels/copy_rows.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "tile/element.cuh"
#include "tile/gradient_row.cuh"
#include "tile/ring.cuh"
#include "tile/softcap.cuh"
#include "tile/token_score.cuh"

// The control variate's part of each vocab tile: the weights that a mean token gives to its columns, and
// their centroid, the mean of its rows of C by these weights. Any weights would do: they cost variance, never
// bias (docs/design.md).
namespace cce {

// ---- The mean of e over the tokens that count ----

// A token that counts and whose row of e is finite, as its log-sum-exp tells.
__device__ __forceinline__ bool in_mean(const GradientRow& row) {
  return row.live() && static_cast<bool>(isfinite(row.lse2));
}

constexpr int kMeanThreads = 256;
constexpr int kMeanColumns = kWarpLanes * kChunkElements;  // of a block

template <typename Element>
struct MeanRowsArguments {
  Rows<Element> e;
  const GradientRow* rows;   // [n]
  const TokenScore* scores;  // [n], or null: no token's logits are scaled
  int d;
  float* sums;    // [kMeanSplits, d], or not used
  Element* mean;  // [d]
};

// Sums of a run of tokens (blockIdx.y) in 256 columns, in a fixed order.
template <typename Element>
__global__ void __launch_bounds__(kMeanThreads)
    mean_rows_sums_kernel(const __grid_constant__ MeanRowsArguments<Element> a) {
  constexpr int kWarps = kMeanThreads / kWarpLanes;
  __shared__ float partial[kWarps][kMeanColumns];
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int column0 = static_cast<int>(blockIdx.x) * kMeanColumns;
  const int column = column0 + lane * kChunkElements;
  const int64_t n = a.e.count;
  const int64_t begin = n * blockIdx.y / kMeanSplits, end = n * (blockIdx.y + 1) / kMeanSplits;
  float sums[kChunkElements] = {};
  // Lanes ask for 32 tokens at once which of them count, so that the loads of their rows can overlap.
  for (int64_t token0 = begin + warp; token0 < end; token0 += kWarps * kWarpLanes) {
    const int64_t asked = token0 + lane * kWarps;
    const uint32_t counts = __ballot_sync(0xffffffffu, asked < end && in_mean(a.rows[asked]));
    if (column >= a.d || counts == 0) continue;
    const int stand_in = __ffs(counts) - 1;
    constexpr int kInFlight = 8;
    for (int k0 = 0; k0 < kWarpLanes; k0 += kInFlight) {
      using Chunk = Vector<Element, kChunkElements>;
      Chunk chunks[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int from = (counts >> (k0 + k) & 1) != 0 ? k0 + k : stand_in;
        chunks[k] = Chunk::load(a.e.data + (token0 + from * kWarps) * a.e.stride + column);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        // What the row of a token that does not count holds may be anything.
        if ((counts >> (k0 + k) & 1) == 0) continue;
        // Scaled as the token's logits are, so that the mean token's are their mean.
        const float scale = a.scores == nullptr ? 1.0f : a.scores[token0 + (k0 + k) * kWarps].scale2 / kLog2E;
#pragma unroll
        for (int c = 0; c < kChunkElements; ++c)
          sums[c] = fmaf(scale, widen<float>(chunks[k].values[c]), sums[c]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kChunkElements; ++k) partial[warp][lane * kChunkElements + k] = sums[k];
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x);
  static_assert(kMeanThreads == kMeanColumns, "a thread ends a column");
  float total = 0.0f;
  for (int other = 0; other < kWarps; ++other) total += partial[other][own];
  if (column0 + own < a.d) a.sums[static_cast<int64_t>(blockIdx.y) * a.d + column0 + own] = total;
}

// The mean, of kMeanThreads columns a block. kFewTokens: no more than there are runs, so that no run has more
// than one: then there are no sums, and the tokens are added here, in the same order.
template <typename Element, bool kFewTokens>
__global__ void __launch_bounds__(kMeanThreads)
    mean_rows_kernel(const __grid_constant__ MeanRowsArguments<Element> a) {
  int live = 0;
  for (int token = static_cast<int>(threadIdx.x); token < a.e.count; token += kMeanThreads) {
    live += in_mean(a.rows[token]);
  }
  // Each thread has counted its own tokens.
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  live = __reduce_add_sync(0xffffffffu, live);
  if (threadIdx.x % kWarpLanes == 0) atomicAdd(&count, live);
  __syncthreads();
  const int column = static_cast<int>(blockIdx.x) * kMeanThreads + static_cast<int>(threadIdx.x);
  if (column >= a.d) return;
  float total = 0.0f;
  if constexpr (kFewTokens) {
#pragma unroll 8
    for (int token = 0; token < a.e.count; ++token) {
      const float value = widen<float>(a.e.data[token * a.e.stride + column]);
      const float scale = a.scores == nullptr ? 1.0f : a.scores[token].scale2 / kLog2E;
      // What the row of a token that does not count holds may be anything.
      if (in_mean(a.rows[token])) total = __fadd_rn(total, __fmul_rn(scale, value));
    }
  } else {
#pragma unroll 16
    for (int split = 0; split < kMeanSplits; ++split)
      total += a.sums[static_cast<int64_t>(split) * a.d + column];
  }
  a.mean[column] = narrow<Element>(total / static_cast<float>(max(count, 1)));
}

// ---- Weights and centroids ----

// In 16 bits, weights and what they multiply share the range: in fp16 a weight is 2^14 larger, and the sums
// of residuals that meet it so much smaller.
template <typename Element>
CCE_HOST_DEVICE constexpr float centroid_weight_scale();
template <>
CCE_HOST_DEVICE constexpr float centroid_weight_scale<__nv_bfloat16>() {
  return 1.0f;
}
template <>
CCE_HOST_DEVICE constexpr float centroid_weight_scale<__half>() {
  return 16384.0f;
}

template <typename Element>
struct CentroidsArguments {
  Rows<Element> c;
  const Element* mean;  // [d]
  const Element* bias;  // [v] or null
  int64_t bias_stride;
  Softcap softcap;
  int d;
  int group;           // rows at a time; 0: one row of C has no place in shared memory
  Element* weights;    // [tiles, kTileColumns], times centroid_weight_scale(); 0 past the vocabulary
  Element* centroids;  // [tiles, d]
};

template <typename Element>
__device__ __forceinline__ Vector<Element, kChunkElements> load_chunk(const Element* row, int chunk) {
  // In shared or in global memory.
  const uint4 bits = *(reinterpret_cast<const uint4*>(row) + chunk);
  Vector<Element, kChunkElements> values;
  memcpy(&values, &bits, sizeof(bits));
  return values;
}

// A block takes a tile and reads it once, by groups of rows: the softmax over its columns goes along, as in
// online softmax (Milakov and Gimelshein, 2018).
template <typename Element>
__global__ void __launch_bounds__(kCentroidThreads)
    centroids_kernel(const __grid_constant__ CentroidsArguments<Element> a) {
  // Setup
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float logits[kTileColumns];   // of the mean token, in bits
  __shared__ float weights[kTileColumns];  // of a group's rows, not yet normalised
  static_assert(sizeof(logits) + sizeof(weights) == kCentroidStaticBytes, "as planned");
  auto* sums = reinterpret_cast<float*>(shared);  // [d], relative to `highest`
  auto* stage = reinterpret_cast<Element*>(shared + centroid_sums_bytes(a.d));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpLanes, warp = thread / kWarpLanes;
  const int row0 = static_cast<int>(blockIdx.x) * kTileColumns;
  const int rows = min(kTileColumns, a.c.count - row0);
  const int chunks = a.d / kChunkElements;
  const int group = a.group == 0 ? kCentroidWarps : a.group;
  const Element* tile = a.c.data + static_cast<int64_t>(row0) * a.c.stride;
  float highest = -INFINITY, total = 0.0f;
  for (int first = 0; first < rows; first += group) {
    // Load
    const int count = min(group, rows - first);
    const Element* from = tile + first * a.c.stride;
    int64_t stride = a.c.stride;
    if (a.group != 0) {
      __syncthreads();
      for (int row = warp; row < count; row += kCentroidWarps) {
        for (int chunk = lane; chunk < chunks; chunk += kWarpLanes) {
          const int at = chunk * kChunkElements;
          ptx::cp_async_16(shared_address(stage + row * a.d + at), from + row * stride + at, true);
        }
      }
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      from = stage;
      stride = a.d;
    }

    // Compute
    for (int row = warp; row < count; row += kCentroidWarps) {
      float z = 0.0f;
#pragma unroll 2
      for (int chunk = lane; chunk < chunks; chunk += kWarpLanes) {
        const auto mean = load_chunk(a.mean, chunk);
        const auto values = load_chunk(from + row * stride, chunk);
#pragma unroll
        for (int k = 0; k < kChunkElements; ++k) {
          z = fmaf(widen<float>(values.values[k]), widen<float>(mean.values[k]), z);
        }
      }
#pragma unroll
      for (int distance = 1; distance < kWarpLanes; distance *= 2) {
        z += __shfl_xor_sync(0xffffffffu, z, distance);
      }
      if (lane != 0) continue;
      if (a.bias != nullptr) z += widen<float>(a.bias[(row0 + first + row) * a.bias_stride]);
      if (a.softcap.present()) z = a.softcap.apply(z);
      logits[first + row] = z * kLog2E;
    }
    __syncthreads();
    float now = highest;
    for (int row = 0; row < count; ++row) now = fmaxf(now, logits[first + row]);
    // Where all columns so far are masked, nothing has a weight.
    const float offset = now == -INFINITY ? 0.0f : now;
    const float kept = ptx::exp2_approx(highest - offset);
    highest = now;
    if (thread < count) weights[thread] = ptx::exp2_approx(logits[first + thread] - offset);
    __syncthreads();
    total *= kept;
    for (int row = 0; row < count; ++row) total += weights[row];
    for (int chunk = thread; chunk < chunks; chunk += kCentroidThreads) {
      float sum[kChunkElements];
#pragma unroll
      for (int k = 0; k < kChunkElements; ++k) {
        sum[k] = first == 0 ? 0.0f : sums[chunk * kChunkElements + k] * kept;
      }
#pragma unroll 4
      for (int row = 0; row < count; ++row) {
        const auto values = load_chunk(from + row * stride, chunk);
#pragma unroll
        for (int k = 0; k < kChunkElements; ++k) {
          sum[k] = fmaf(weights[row], widen<float>(values.values[k]), sum[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kChunkElements; ++k) sums[chunk * kChunkElements + k] = sum[k];
    }
  }

  // Finish
  const float inverse = total > 0.0f ? ptx::reciprocal_approx(total) : 0.0f;
  static_assert(kCentroidThreads == kTileColumns, "a thread a column");
  const bool weighs = thread < rows && inverse != 0.0f;
  const float weight = weighs ? ptx::exp2_approx(logits[thread] - highest) * inverse : 0.0f;
  a.weights[static_cast<int64_t>(row0) + thread] = narrow<Element>(weight * centroid_weight_scale<Element>());
  // A thread ends the columns that it has summed.
  for (int chunk = thread; chunk < chunks; chunk += kCentroidThreads) {
    uint32_t packed[kChunkElements / 2];
#pragma unroll
    for (int k = 0; k < kChunkElements; k += 2) {
      const float* pair = sums + chunk * kChunkElements + k;
      packed[k / 2] = pack(pair[0] * inverse, pair[1] * inverse, Element());
    }
    *(reinterpret_cast<uint4*>(a.centroids + static_cast<int64_t>(blockIdx.x) * a.d) + chunk) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// ---- What a tile's residual masses add up to, for dbias ----

constexpr int kResidualSumsThreads = 256;

// A warp a tile, in a fixed order.
template <typename Element>
__global__ void __launch_bounds__(kResidualSumsThreads)
    residual_sums_kernel(const Element* residual, int stride, int n, int tiles, float* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int tile = static_cast<int>(blockIdx.x) * (kResidualSumsThreads / kWarpLanes) +
                   static_cast<int>(threadIdx.x) / kWarpLanes;
  if (tile >= tiles) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int token = lane; token < n; token += kWarpLanes) {
    sum += widen<float>(residual[static_cast<int64_t>(tile) * stride + token]);
  }
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (lane == 0) sums[tile] = sum;
}

}  // namespace cce
