#pragma once

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/logits_sm80.cuh"
#include "tile/gradient_row.cuh"

namespace cce {

// Writes the gradient of a chunk of the logits, dz in Element, scaled: what the exact method multiplies by C
// and E. Columns count from the chunk's first.
template <typename Element>
class GradientEpilogue {
 public:
  struct Arguments {
    const Element* bias;  // of the chunk, or null
    int64_t bias_stride;
    Softcap softcap;
    const GradientRow* rows;  // [n]
    const uint32_t* largest;
    Element* dz;  // [n, stride]
    int64_t stride;
    int n;
    int first_column, columns;  // of the chunk
  };

  __device__ __forceinline__ GradientEpilogue(const Arguments& a, unsigned char*) : a_(a) {}

  __device__ __forceinline__ void begin(const ForwardUnit&) {}
  __device__ __forceinline__ void finish(const ForwardUnit&) {}

  template <typename Product>
  __device__ __forceinline__ void block(Product& product, const ForwardUnit& unit, int column_block,
                                        unsigned char*) {
    constexpr int kMTiles = Product::kRows, kNTiles = Product::kColumns;
    const GradientScale<Element> scale(*a_.largest);
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
    const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    const int first_row = warp / kLogitsWarpsN * (kLogitsRows / kLogitsWarpsM);
    const int first = column_block * kLogitsColumns + warp % kLogitsWarpsN * (kLogitsColumns / kLogitsWarpsN);
    const int column0 = first + lane % 4 * 2;
    const int row0 = unit.row_block * kLogitsRows + first_row + lane / 4;
    Element* out = a_.dz + row0 * a_.stride + first + 8 * (lane % 4);
    finish_logits(product, column0, a_.bias, a_.bias_stride, a_.softcap, a_.columns);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * i + 8 * half;
        GradientRow g = {0.0f, 0.0f, INFINITY, -1};
        if (row < a_.n) g = a_.rows[row];
        const int label = g.label - a_.first_column - column0;
#pragma unroll
        for (int j = 0; j < kNTiles; j += 4) {
          uint32_t packed[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            float dz[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              const float z = product.sums[i][j + k][2 * half + side];
              dz[side] = g.a * g.probability(z);
              if (label == 8 * (j + k) + side) dz[side] -= g.b;
              if (a_.softcap.present()) dz[side] *= a_.softcap.slope(z);
              dz[side] *= scale.factor;
            }
            packed[k] = pack(dz[0], dz[1], Element());
          }
          transpose_quad(packed, lane);
          // Lane q of a quad now has the eight columns of tile j + q.
          if (row < a_.n) {
            *reinterpret_cast<uint4*>(out + 8 * j) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
          }
        }
        out += 8 * a_.stride;
      }
    }
  }

 private:
  const Arguments& a_;
};

}  // namespace cce
