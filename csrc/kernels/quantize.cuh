#pragma once

#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>

#include "kernels/live_rows.h"
#include "tile/constants.h"
#include "tile/element.cuh"
#include "tile/rows.h"
#include "tile/swizzle.h"
#include "tile/warp.cuh"

// E and C in 8 bits, e4m3, for a scan of the logits: with a scale a token and a scale a vocab tile, by which
// a scanned product is multiplied. e4m3 has three bits of mantissa from 2^-6 to 448, so that a scale has
// little to do: it keeps what matters away from both ends.
namespace cce {

using Fp8 = __nv_fp8_e4m3;
constexpr float kFp8Largest = 448.0f;

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarpLanes;

// Eight elements times a factor; what is too large becomes the largest. What is not finite becomes NaN.
template <typename Element>
__device__ __forceinline__ uint2 quantize_chunk(const Vector<Element, kChunkElements>& chunk, float factor) {
  uint32_t packed[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    packed[half] = 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int k = 4 * half + 2 * pair;
      const auto scaled = [&](Element element) {
        const float x = widen<float>(element);
        return isfinite(x) ? x * factor : NAN;
      };
      const float2 values = make_float2(scaled(chunk.values[k]), scaled(chunk.values[k + 1]));
      packed[half] |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3))
                      << (16 * pair);
    }
  }
  return make_uint2(packed[0], packed[1]);
}

template <typename Element>
struct QuantizeRowsArguments {
  Rows<Element> e;  // its count: all tokens
  LiveRows live;
  int d, stride;
  unsigned char* out;  // [n, stride]: the rows of the tokens that count, in their order
  float* scale;        // [n], of these rows
};

// A warp a row. Rows up to the next multiple of the padding are zeros, as in the copy of live rows.
template <typename Element>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsArguments<Element> a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int row = static_cast<int>(blockIdx.x) * kQuantizeWarps + static_cast<int>(threadIdx.x) / kWarpLanes;
  const int rows = a.live.count->rows;
  const int padded = (rows + kLiveRowsPadding - 1) / kLiveRowsPadding * kLiveRowsPadding;
  if (row >= min(padded, a.e.count)) return;
  using Chunk = Vector<Element, kChunkElements>;
  const int chunks = a.d / kChunkElements;
  auto* to = reinterpret_cast<uint2*>(a.out + static_cast<int64_t>(row) * a.stride);
  if (row >= rows) {
    for (int k = lane; k < chunks; k += kWarpLanes) to[k] = make_uint2(0, 0);
    if (lane == 0) a.scale[row] = 1.0f;
    return;
  }
  const Element* from = a.e.data + a.live.tokens[row] * a.e.stride;
  float largest = 0.0f;
  for (int k = lane; k < chunks; k += kWarpLanes) {
    const Chunk chunk = Chunk::load(from + k * kChunkElements);
#pragma unroll
    for (const Element x : chunk.values) {
      // A NaN stays, whatever comes after it.
      const float magnitude = fabsf(widen<float>(x));
      largest = magnitude <= largest ? largest : magnitude;
    }
  }
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, largest, distance);
    largest = other <= largest || isnan(largest) ? largest : other;
  }
  const float factor = largest > 0.0f ? kFp8Largest / largest : 1.0f;
  for (int k = lane; k < chunks; k += kWarpLanes) {
    to[k] = quantize_chunk(Chunk::load(from + k * kChunkElements), factor);
  }
  // A row that is not finite is to show in its logits.
  if (lane == 0) a.scale[row] = isfinite(largest) ? 1.0f / factor : NAN;
}

template <typename Element>
struct QuantizeTilesArguments {
  Rows<Element> c;
  int d, stride;
  unsigned char* out;  // [v, stride]
  float* scale;        // [tiles]
};

// A block a vocab tile, in one pass over it: the scale is that of a sample, a few chunks of each row, whose
// root of the mean square becomes 1. That is 448 times below the largest, and 64 times above the smallest
// number that has all bits.
template <typename Element>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_tiles_kernel(const __grid_constant__ QuantizeTilesArguments<Element> a) {
  static_assert(kQuantizeThreads == kTileColumns, "a thread samples a row");
  constexpr int kSamples = 4;
  __shared__ float parts[kQuantizeWarps];
  using Chunk = Vector<Element, kChunkElements>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const int tile = static_cast<int>(blockIdx.x);
  const int row0 = tile * kTileColumns;
  const int rows = min(kTileColumns, a.c.count - row0);
  const int chunks = a.d / kChunkElements;

  float squares = 0.0f;
  if (static_cast<int>(threadIdx.x) < rows) {
    const int row = row0 + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int sample = 0; sample < kSamples; ++sample) {
      // Other places in other rows.
      const int k = (static_cast<int>(threadIdx.x) * 7 + sample * max(1, chunks / kSamples)) % chunks;
      const Chunk chunk = Chunk::load(a.c.data + row * a.c.stride + k * kChunkElements);
#pragma unroll
      for (const Element x : chunk.values) squares = fmaf(widen<float>(x), widen<float>(x), squares);
    }
  }
  squares = warp_sum(squares);
  if (lane == 0) parts[warp] = squares;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (const float part : parts) total += part;
  const float mean = total / static_cast<float>(rows * kSamples * kChunkElements);
  const bool usable = mean > 0.0f && isfinite(mean);
  const float factor = usable ? rsqrtf(mean) : 1.0f;
  if (threadIdx.x == 0) a.scale[tile] = 1.0f / factor;

  constexpr int kInFlight = 4;
  for (int r = warp; r < rows; r += kQuantizeWarps) {
    const Element* from = a.c.data + (row0 + r) * a.c.stride;
    auto* to = reinterpret_cast<uint2*>(a.out + static_cast<int64_t>(row0 + r) * a.stride);
#pragma unroll kInFlight
    for (int k = lane; k < chunks; k += kWarpLanes) {
      to[k] = quantize_chunk(Chunk::load(from + k * kChunkElements), factor);
    }
  }
}

}  // namespace cce
