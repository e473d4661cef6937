#pragma once

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/gradient_block.cuh"
#include "kernels/logits_sm80.cuh"
#include "ptx/barrier.cuh"

namespace cce {

// Writes the gradient of a chunk of the logits, dz in Element, scaled: what the exact method multiplies by C
// and E. With a filter, blocks of small entries are zeros.
template <typename Element, bool kFilter>
class GradientEpilogue {
 public:
  using Arguments = GradientArguments<Element>;

  __device__ __forceinline__ GradientEpilogue(const Arguments& a, unsigned char*) : a_(a) {}

  __device__ __forceinline__ void begin(const ForwardUnit&) {}
  __device__ __forceinline__ void finish(const ForwardUnit&) {}

  template <typename Product>
  __device__ __forceinline__ void block(Product& product, const ForwardUnit& unit, int column_block,
                                        unsigned char*) {
    int row0 = unit.row_block * kLogitsRows + warp() / kLogitsWarpsN * (kLogitsRows / kLogitsWarpsM);
    int column0 = column_block * kLogitsColumns + warp_n() * (kLogitsColumns / kLogitsWarpsN);
    finish_logits(product, column0 + lane() % 4 * 2, a_.bias, a_.bias_stride, a_.softcap, a_.columns);
    const bool keep = !kFilter || keeps(product, row0, column0);
    // What was computed of these for the filter is to be computed again, not kept: there is no register left.
    asm volatile("" : "+r"(row0), "+r"(column0));
    if (!keep) {
      each_row(product, row0, column0, [&](int, int, int row, const GradientRow&, int) {
        write_zeros<Product::kColumns>(0, row < a_.n, a_.dz + row * a_.stride + column0);
      });
    } else if (a_.softcap.present()) {
      write<true>(product, row0, column0);
    } else {
      write<false>(product, row0, column0);
    }
  }

 private:
  template <bool kSoftcap, typename Product>
  __device__ __forceinline__ void write(const Product& product, int row0, int column0) const {
    each_row(product, row0, column0, [&](int i, int half, int row, const GradientRow& g, int label) {
      write_gradient<Product::kColumns, kSoftcap>(product, i, half, 0, g, label, row < a_.n,
                                                  a_.dz + row * a_.stride + column0, a_);
    });
  }

  // Whether the filter keeps the block that the warp has a part of.
  template <typename Product>
  __device__ __forceinline__ bool keeps(const Product& product, int row0, int column0) const {
    static_assert(kLogitsRows == kFilterBlockRows && kLogitsColumns == 2 * kTileColumns, "two of its blocks");
    bool passes = false;
    each_row(product, row0, column0, [&](int i, int half, int, const GradientRow& g, int label) {
      passes |= passes_filter<Product::kColumns>(product, i, half, 0, g, label, a_);
    });
    // Half of the warps have one, half the other: each vocab tile has a barrier of its own.
    return warp_n() < kLogitsWarpsN / 2 ? ptx::any_at_barrier<1, kLogitsThreads / 2>(passes)
                                        : ptx::any_at_barrier<2, kLogitsThreads / 2>(passes);
  }

  // Calls use(i, half, row, its token, its label's column counted from the lane's first) for each of the
  // lane's rows.
  template <typename Product, typename Use>
  __device__ __forceinline__ void each_row(const Product&, int row0, int column0, const Use& use) const {
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + lane() / 4 + 16 * i + 8 * half;
        const GradientRow g = gradient_row(a_, row);
        use(i, half, row, g, g.label - a_.first_column - column0 - lane() % 4 * 2);
      }
    }
  }

  // Where the thread and its warp are, computed where it is wanted: the product takes all registers.
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / kWarpLanes; }
  __device__ __forceinline__ static int warp_n() { return warp() % kLogitsWarpsN; }

  const Arguments& a_;
};

}  // namespace cce
