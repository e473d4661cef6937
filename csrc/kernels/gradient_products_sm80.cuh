#pragma once

#include <cstdint>

#include "kernels/copy_rows.cuh"
#include "kernels/logits_sm80_config.h"
#include "tile/gradient_row.cuh"
#include "tile/ring.cuh"
#include "tile/warp_product.cuh"

// The exact method's two further products over a chunk of the vocabulary: dC = dz^T E, and dE += dz C. One
// persistent grid takes both kinds of blocks, so that the last wave of neither stands idle. Block and warp
// shapes are those of the logits.
namespace cce {

template <typename Element>
struct GradientProductsArguments {
  Rows<Element> e;   // [n, d]
  Rows<Element> c;   // [columns, d]: the chunk's rows
  Rows<Element> dz;  // [n, columns], scaled; rows padded with zeros to a multiple of 8 columns
  int d;
  int stages;
  const uint32_t* largest;
  Element* grad_c;  // [columns, d] contiguous: the chunk's rows; or null
  Element* grad_e;  // [n, d] contiguous; or null
  float* sum_e;     // [n, d]: dE so far, scaled
  bool first_chunk, last_chunk;

  // Counted on the host: a kernel has no register left to keep what it could compute.
  int blocks_d;  // of 256 columns of D
  int blocks_c;  // of dC
  int blocks;    // of dC and dE

  void count_blocks() {
    blocks_d = (d + kLogitsColumns - 1) / kLogitsColumns;
    blocks_c = grad_c == nullptr ? 0 : (c.count + kLogitsRows - 1) / kLogitsRows * blocks_d;
    blocks = blocks_c + (grad_e == nullptr ? 0 : (e.count + kLogitsRows - 1) / kLogitsRows * blocks_d);
  }
};

// Rows of a finished block in Element, 16 bytes a lane.
template <typename Product, typename Element>
__device__ __forceinline__ void store_block(const Product& product, Element* out, int64_t row0, int64_t rows,
                                            int column0, int columns, float factor, int lane) {
  constexpr int kMTiles = Product::kRows, kNTiles = Product::kColumns;
  static_assert(kNTiles % 4 == 0, "a quad transposes four tiles at a time");
#pragma unroll
  for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + 16 * i + 8 * half + lane / 4;
#pragma unroll
      for (int j = 0; j < kNTiles; j += 4) {
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          packed[k] = pack(product.sums[i][j + k][2 * half] * factor,
                           product.sums[i][j + k][2 * half + 1] * factor, Element());
        }
        transpose_quad(packed, lane);
        const int column = column0 + 8 * (j + lane % 4);
        if (row < rows && column < columns) {
          *reinterpret_cast<uint4*>(out + row * columns + column) =
              make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
      }
    }
  }
}

template <typename Element>
class GradientProducts {
 public:
  using Arguments = GradientProductsArguments<Element>;

  __device__ __forceinline__ GradientProducts(const Arguments& a, unsigned char* shared)
      : a_(a), ring_(shared_address(shared)) {}

  // Rows of dC: m is the chunk's columns, n is D, k the tokens.
  __device__ __forceinline__ void classifier_block(int index) {
    const int m0 = index / a_.blocks_d * kLogitsRows;
    const int n0 = index % a_.blocks_d * kLogitsColumns;
    Product<Major::kMN, Major::kMN> product(lane(), first_m(), first_n());
    product.clear();
    multiply(product, a_.e.count, [&](uint32_t stage, int k0) {
      copy_rows_of_k<kLogitsRows / kRowElements>(stage, a_.dz, k0, m0, a_.c.count);
      copy_rows_of_k<kLogitsColumns / kRowElements>(stage + kLogitsTileE, a_.e, k0, n0, a_.d);
    });
    store_block(product, a_.grad_c, m0 + first_m(), a_.c.count, n0 + first_n(), a_.d,
                GradientScale<Element>(*a_.largest).inverse, lane());
  }

  // Rows of dE: m is the tokens, n is D, k the chunk's columns. The sum continues from chunk to chunk in
  // fp32.
  __device__ __forceinline__ void embedding_block(int index) {
    const int m0 = index / a_.blocks_d * kLogitsRows;
    const int n0 = index % a_.blocks_d * kLogitsColumns;
    Product<Major::kK, Major::kMN> product(lane(), first_m(), first_n());
    product.clear();
    if (!a_.first_chunk) {
      each_pair(product, m0, n0, [](float& x, float& y, const float2& total) {
        x = total.x;
        y = total.y;
      });
    }
    multiply(product, a_.c.count, [&](uint32_t stage, int k0) {
      copy_rows_of_mn<kLogitsRows>(stage, a_.dz, m0, k0, a_.c.count);
      copy_rows_of_k<kLogitsColumns / kRowElements>(stage + kLogitsTileE, a_.c, k0, n0, a_.d);
    });
    if (a_.last_chunk) {
      store_block(product, a_.grad_e, m0 + first_m(), a_.e.count, n0 + first_n(), a_.d,
                  GradientScale<Element>(*a_.largest).inverse, lane());
    } else {
      each_pair(product, m0, n0, [](float x, float y, float2& total) { total = make_float2(x, y); });
    }
  }

 private:
  template <Major kMajorA, Major kMajorB>
  using Product = WarpProduct<Element, kLogitsRows / kLogitsWarpsM / 16, kLogitsColumns / kLogitsWarpsN / 8,
                              kMajorA, kMajorB>;

  // product += A B over k in [0, depth); copy(stage, k0) starts the copies of a stage.
  template <typename P, typename Copy>
  __device__ __forceinline__ void multiply(P& product, int depth, const Copy& copy) {
    int sent = 0;
    const auto send = [&](uint32_t stage) {
      if (sent < depth) copy(stage, sent);
      sent += kLogitsDepth;
    };
    StageStream<kLogitsStageBytes, decltype(send)> stream(ring_, a_.stages, send);
    multiply_stages<kLogitsTileE>(product, stream, (depth + kLogitsDepth - 1) / kLogitsDepth);
    stream.close();
  }

  // Calls use(sums of two neighbouring columns, their place in sum_e) for all of the warp's that exist.
  template <typename P, typename Use>
  __device__ __forceinline__ void each_pair(P& product, int m0, int n0, const Use& use) {
    constexpr int kMTiles = P::kRows, kNTiles = P::kColumns;
    const int row0 = m0 + first_m() + lane() / 4;
    const int column0 = n0 + first_n() + lane() % 4 * 2;
    float* total = a_.sum_e + static_cast<int64_t>(row0) * a_.d + column0;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) {
          if (row0 + 16 * i + 8 * half >= a_.e.count || column0 + 8 * j >= a_.d) continue;
          use(product.sums[i][j][2 * half], product.sums[i][j][2 * half + 1],
              *reinterpret_cast<float2*>(total + 8 * j));
        }
        total += 8 * static_cast<int64_t>(a_.d);
      }
    }
  }

  // Where the thread and its warp are. Computed again where it is wanted: all registers are taken in between.
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / kWarpLanes; }
  __device__ __forceinline__ static int first_m() {
    return warp() / kLogitsWarpsN * (kLogitsRows / kLogitsWarpsM);
  }
  __device__ __forceinline__ static int first_n() {
    return warp() % kLogitsWarpsN * (kLogitsColumns / kLogitsWarpsN);
  }

  const Arguments& a_;
  const uint32_t ring_;
};

template <typename Element>
__global__ void __launch_bounds__(kLogitsThreads, 1)
    gradient_products_sm80_kernel(const __grid_constant__ GradientProductsArguments<Element> a) {
  extern __shared__ __align__(128) unsigned char shared[];
  GradientProducts<Element> products(a, shared);
  int index = blockIdx.x;
  for (; index < a.blocks_c; index += gridDim.x) products.classifier_block(index);
  for (; index < a.blocks; index += gridDim.x) products.embedding_block(index - a.blocks_c);
}

}  // namespace cce
