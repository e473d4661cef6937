#pragma once

#include <cstdint>

#include "kernels/copy_rows.cuh"
#include "kernels/live_rows.h"
#include "kernels/logits_sm80_config.h"
#include "tile/ring.cuh"
#include "tile/schedule.h"
#include "tile/warp_product.cuh"

// The product E C^T on cp.async, ldmatrix and mma.sync, block by block and never written: an epilogue takes
// each block of logits from the registers. For every GPU from sm_80 on.
namespace cce {

template <typename Element>
struct LogitsOperands {
  Rows<Element> e, c;
  Rows<Element> live_e;
  int d;
  int steps;  // stages that D takes, counted on the host: the kernel has no register left to keep them
  int stages;
  LogitsSchedule schedule;  // of all rows of E
  LiveRows live;
};

// The stream of stages that a block consumes, across all its units: while an epilogue runs, the first stages
// of the next block of columns are already on their way.
template <typename Element>
class LogitsLoader {
 public:
  // e: the rows that `work` is of. Both are in shared memory: there are no registers left for them.
  __device__ __forceinline__ LogitsLoader(const LogitsOperands<Element>& operands, const LogitsWork& work,
                                          const Rows<Element>& e)
      : operands_(operands), work_(work), e_(e), unit_index_(blockIdx.x) {
    begin_unit();
  }

  // Starts the copies of the next stage, or none after the last.
  __device__ __forceinline__ void operator()(uint32_t stage) {
    if (unit_index_ >= work_.units) return;
    copy_rows_of_mn<kLogitsRows>(stage, e_, row_, depth_, operands_.d);
    copy_rows_of_mn<kLogitsColumns>(stage + kLogitsTileE, operands_.c, column_, depth_, operands_.d);
    depth_ += kLogitsDepth;
    if (depth_ >= operands_.d) begin_next_block();
  }

 private:
  __device__ __forceinline__ void begin_next_block() {
    depth_ = 0;
    column_ += kLogitsColumns;
    if (column_ < end_column_) return;
    unit_index_ += gridDim.x;
    begin_unit();
  }

  __device__ __forceinline__ void begin_unit() {
    if (unit_index_ >= work_.units) return;
    const LogitsUnit unit = work_.schedule.unit(unit_index_);
    row_ = unit.row_block * kLogitsRows;
    column_ = unit.first_column_block * kLogitsColumns;
    end_column_ = unit.end_column_block * kLogitsColumns;
  }

  const LogitsOperands<Element>& operands_;
  const LogitsWork& work_;
  const Rows<Element>& e_;
  int unit_index_;
  int row_, column_;  // first rows of e and of c
  int end_column_;
  int depth_ = 0;
};

template <typename Element>
using LogitsProduct = WarpProduct<Element, kLogitsRows / kLogitsWarpsM / 16,
                                  kLogitsColumns / kLogitsWarpsN / 8, Major::kK, Major::kK>;

// Epilogue: begin(unit), then for each block of columns block(sums, column_block), then finish(unit); it
// may use its exchange memory and block-wide barriers.
template <typename Element, typename Epilogue>
__global__ void __launch_bounds__(kLogitsThreads, 1)
    logits_sm80_kernel(const __grid_constant__ LogitsOperands<Element> operands,
                       const __grid_constant__ typename Epilogue::Arguments arguments) {
  // Setup
  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpLanes;
  const uint32_t ring = shared_address(shared);
  Epilogue epilogue(arguments, shared + operands.stages * kLogitsStageBytes);
  __shared__ LogitsWork work;
  __shared__ Rows<Element> e;
  if (thread == 0) {
    work.find(operands.schedule, operands.live, operands.e.count, kLogitsRows);
    e = work.compact ? operands.live_e : operands.e;
  }
  __syncthreads();

  // Load
  LogitsLoader<Element> loader(operands, work, e);
  StageStream<kLogitsStageBytes, LogitsLoader<Element>> stream(ring, operands.stages, loader);

  // Compute
  LogitsProduct<Element> product(thread % kWarpLanes, warp / kLogitsWarpsN * (kLogitsRows / kLogitsWarpsM),
                                 warp % kLogitsWarpsN * (kLogitsColumns / kLogitsWarpsN));
  for (int index = blockIdx.x; index < work.units; index += gridDim.x) {
    const LogitsUnit unit = work.schedule.unit(index);
    epilogue.begin(unit);
    for (int block = unit.first_column_block; block < unit.end_column_block; ++block) {
      product.clear();
      multiply_stages<kLogitsTileE>(product, stream, operands.steps);
      epilogue.block(product.sums, unit, block, shared + (stream.stage() - ring));
    }
    // Finish
    epilogue.finish(unit);
  }
}

}  // namespace cce
