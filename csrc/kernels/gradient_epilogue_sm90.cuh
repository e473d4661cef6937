#pragma once

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/gradient_block.cuh"
#include "kernels/logits_sm90_config.h"
#include "ptx/barrier.cuh"

namespace cce {

// As GradientEpilogue, from the registers of wgmma: a warp has 16 rows of two vocab tiles, a lane two of the
// rows. The filter's block is both consumers', who meet to judge it.
template <typename Element, bool kFilter>
class GradientEpilogueSm90 {
 public:
  using Arguments = GradientArguments<Element>;

  __device__ __forceinline__ explicit GradientEpilogueSm90(const Arguments& a) : a_(a) {}

  __device__ __forceinline__ void begin(int row_block) {
    row0_ = row_block * LogitsSm90::kRows + static_cast<int>(threadIdx.x) / kWarpLanes * 16;
  }
  __device__ __forceinline__ void finish(int) {}

  template <typename Product>
  __device__ __forceinline__ void block(Product& product, int column_block) {
    const int column0 = column_block * LogitsSm90::kColumns;
    finish_logits(product, column0 + lane() % 4 * 2, a_.bias, a_.bias_stride, a_.softcap, a_.columns);
    if (a_.softcap.present()) {
      write<true>(product, column0);
    } else {
      write<false>(product, column0);
    }
  }

 private:
  template <bool kSoftcap, typename Product>
  __device__ __forceinline__ void write(const Product& product, int column0) const {
    constexpr int kTiles = Product::kColumns / 2;
    static_assert(LogitsSm90::kRows == kFilterBlockRows && LogitsSm90::kColumns == 2 * kTileColumns,
                  "two blocks of the filter");
#pragma unroll
    for (int first = 0; first < 2 * kTiles; first += kTiles) {
      const bool keep = !kFilter || keeps<kTiles>(product, first, column0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = row(half) < a_.n;
        Element* out = a_.dz + row(half) * a_.stride + column0;
        if (keep) {
          const GradientRow g = gradient_row(a_, row(half));
          write_gradient<kTiles, kSoftcap>(product, 0, half, first, g, label(g, column0), inside, out, a_);
        } else {
          write_zeros<kTiles>(first, inside, out);
        }
      }
    }
  }

  // Whether the filter keeps the vocab tile whose first tile is given.
  template <int kTiles, typename Product>
  __device__ __forceinline__ bool keeps(const Product& product, int first, int column0) const {
    bool passes = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const GradientRow g = gradient_row(a_, row(half));
      passes |= passes_filter<kTiles>(product, 0, half, first, g, label(g, column0), a_);
    }
    return ptx::any_at_barrier<1, LogitsSm90::kConsumers * LogitsSm90::kWarpgroupThreads>(passes);
  }

  // One of the lane's two rows, and where its label is, counted from the lane's first column. Computed where
  // they are wanted: the product takes all registers.
  __device__ __forceinline__ int row(int half) const { return row0_ + lane() / 4 + 8 * half; }
  __device__ __forceinline__ int label(const GradientRow& g, int column0) const {
    return g.label - a_.first_column - column0 - lane() % 4 * 2;
  }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

  const Arguments& a_;
  int row0_ = 0;  // the warp's first
};

}  // namespace cce
