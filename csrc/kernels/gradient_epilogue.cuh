#pragma once

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/logits_sm80.cuh"
#include "ptx/sync.cuh"

namespace cce {

// Writes the gradient of a chunk of the logits, dz in Element, scaled: what the exact method multiplies by C
// and E. With a filter, blocks of small entries are zeros.
template <typename Element, bool kFilter>
class GradientEpilogue {
 public:
  using Arguments = GradientArguments<Element>;

  __device__ __forceinline__ GradientEpilogue(const Arguments& a, unsigned char*) : a_(a) {}

  __device__ __forceinline__ void begin(const LogitsUnit&) {}
  __device__ __forceinline__ void finish(const LogitsUnit&) {}

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, const LogitsUnit& unit, int column_block,
                                        unsigned char*) {
    int row0 = unit.row_block * kLogitsRows + warp() / kLogitsWarpsN * (kLogitsRows / kLogitsWarpsM);
    int column0 = column_block * kLogitsColumns + warp_n() * (kLogitsColumns / kLogitsWarpsN);
    finish_logits(sums, column0 + Sums::first_column(lane()), a_.bias, a_.bias_stride, a_.softcap,
                  a_.columns);
    const bool keep = !kFilter || keeps(sums, row0, column0);
    // What was computed of these for the filter is to be computed again, not kept: there is no register left.
    asm volatile("" : "+r"(row0), "+r"(column0));
    if (!keep) {
      each_row(sums, row0, column0, [&](int, int row, const GradientRow&, int) {
        write_zeros<Sums::kColumns, Sums>(0, row < a_.n, a_.dz + row * a_.stride + column0);
      });
    } else if (a_.scores != nullptr) {
      write<GradientKind::kScored>(sums, row0, column0);
    } else if (a_.softcap.present()) {
      write<GradientKind::kSoftcap>(sums, row0, column0);
    } else {
      write<GradientKind::kPlain>(sums, row0, column0);
    }
  }

 private:
  template <GradientKind kKind, typename Sums>
  __device__ __forceinline__ void write(const Sums& sums, int row0, int column0) const {
    each_row(sums, row0, column0, [&](int r, int row, const GradientRow& g, int label) {
      write_gradient<Sums::kColumns, kKind>(sums, r, 0, row, g, label, row < a_.n,
                                            a_.dz + row * a_.stride + column0, a_);
    });
  }

  // Whether the filter keeps the block that the warp has a part of.
  template <typename Sums>
  __device__ __forceinline__ bool keeps(const Sums& sums, int row0, int column0) const {
    static_assert(kLogitsRows == kFilterBlockRows && kLogitsColumns == 2 * kFilterColumns,
                  "two of its blocks");
    bool passes = false;
    each_row(sums, row0, column0, [&](int r, int row, const GradientRow& g, int label) {
      passes |= passes_filter<Sums::kColumns>(sums, r, 0, row, g, label, a_);
    });
    // Half of the warps have one, half the other: each block has a barrier of its own.
    return warp_n() < kLogitsWarpsN / 2 ? ptx::any_at_barrier<1, kLogitsThreads / 2>(passes)
                                        : ptx::any_at_barrier<2, kLogitsThreads / 2>(passes);
  }

  // Calls use(r, row, its token, its label's column counted from the lane's first) for each of the lane's
  // rows.
  template <typename Sums, typename Use>
  __device__ __forceinline__ void each_row(const Sums&, int row0, int column0, const Use& use) const {
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      const int row = row0 + Sums::first_row(lane()) + Sums::row_offset(r);
      const GradientRow g = load_gradient_row(a_, row);
      use(r, row, g, g.label - a_.first_column - column0 - Sums::first_column(lane()));
    }
  }

  // Where the thread and its warp are, computed where it is wanted: the product takes all registers.
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x) / kWarpLanes; }
  __device__ __forceinline__ static int warp_n() { return warp() % kLogitsWarpsN; }

  const Arguments& a_;
};

}  // namespace cce
