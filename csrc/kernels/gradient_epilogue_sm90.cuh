#pragma once

#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/gradient.cuh"
#include "kernels/logits_sm90_config.h"
#include "ptx/sync.cuh"

namespace cce {

// As GradientEpilogue, from the registers of wgmma: a warp has 16 rows of two of the filter's blocks, a lane
// two of the rows. The filter's block is both consumers', who meet to judge it.
template <typename Element, bool kFilter>
class GradientEpilogueSm90 {
 public:
  using Arguments = GradientArguments<Element>;

  __device__ __forceinline__ explicit GradientEpilogueSm90(const Arguments& a) : a_(a) {}

  __device__ __forceinline__ void begin(int row_block) {
    row0_ = row_block * LogitsSm90::kRows + static_cast<int>(threadIdx.x) / kWarpLanes * 16;
  }
  __device__ __forceinline__ void finish(int) {}

  template <typename Sums>
  __device__ __forceinline__ void block(Sums& sums, int column_block) {
    const int column0 = column_block * LogitsSm90::kColumns;
    finish_logits(sums, column0 + Sums::first_column(lane()), a_.bias, a_.bias_stride, a_.softcap,
                  a_.columns);
    if (a_.scores != nullptr) {
      write<GradientKind::kScored>(sums, column0);
    } else if (a_.softcap.present()) {
      write<GradientKind::kSoftcap>(sums, column0);
    } else {
      write<GradientKind::kPlain>(sums, column0);
    }
  }

 private:
  template <GradientKind kKind, typename Sums>
  __device__ __forceinline__ void write(const Sums& sums, int column0) const {
    constexpr int kCount = Sums::kColumns / 2;  // of a block of the filter
    static_assert(LogitsSm90::kRows == kFilterBlockRows && LogitsSm90::kColumns == 2 * kFilterColumns,
                  "two blocks of the filter");
#pragma unroll
    for (int first = 0; first < 2 * kCount; first += kCount) {
      const bool keep = !kFilter || keeps<kCount>(sums, first, column0);
#pragma unroll
      for (int r = 0; r < Sums::kRows; ++r) {
        const bool inside = row(r) < a_.n;
        Element* out = a_.dz + row(r) * a_.stride + column0;
        if (keep) {
          const GradientRow g = load_gradient_row(a_, row(r));
          write_gradient<kCount, kKind>(sums, r, first, row(r), g, label(g, column0), inside, out, a_);
        } else {
          write_zeros<kCount, Sums>(first, inside, out);
        }
      }
    }
  }

  // Whether the filter keeps the block whose first column is given.
  template <int kCount, typename Sums>
  __device__ __forceinline__ bool keeps(const Sums& sums, int first, int column0) const {
    bool passes = false;
#pragma unroll
    for (int r = 0; r < Sums::kRows; ++r) {
      const GradientRow g = load_gradient_row(a_, row(r));
      passes |= passes_filter<kCount>(sums, r, first, row(r), g, label(g, column0), a_);
    }
    return ptx::any_at_barrier<1, LogitsSm90::kConsumers * LogitsSm90::kWarpgroupThreads>(passes);
  }

  // One of the lane's two rows, and where its label is, counted from the lane's first column. Computed where
  // they are wanted: the product takes all registers.
  __device__ __forceinline__ int row(int r) const { return row0_ + lane() / 4 + 8 * r; }
  __device__ __forceinline__ int label(const GradientRow& g, int column0) const {
    return g.label - a_.first_column - column0 - lane() % 4 * 2;
  }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

  const Arguments& a_;
  int row0_ = 0;  // the warp's first
};

}  // namespace cce
