#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "kernels/live_rows.h"
#include "kernels/logits_sm90_config.h"
#include "ptx/hopper.cuh"
#include "ptx/wgmma.cuh"
#include "tile/mma_sums.cuh"
#include "tile/schedule.h"

// The product E C^T on Hopper's copy engine and wgmma, block by block and never written: an epilogue takes
// each block of logits from the registers. A producer fills a ring of stages, two consumers empty it; the
// producer runs ahead across blocks of columns and units, so that the ring is full again when an epilogue
// ends.
//
// In a cluster of two, the blocks take neighbouring blocks of rows and the same columns: each fetches half of
// C's tile and sends it to both, which halves what L2 has to deliver of C.
namespace cce {

struct LogitsSm90Operands {
  CUtensorMap e, c;  // boxes of [box_rows or 256 / cluster rows][64 elements]
  CUtensorMap live_e;
  LiveRows live;
  LogitsSchedule schedule;  // of all n rows of E: kCluster blocks of rows each
  int n;
  int box_rows;  // of E in a stage: no more than there are
  int steps;     // stages that D takes
  int depth;     // elements of D in each
};

// The next stage of the ring. A barrier's phases alternate in parity from round to round.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == LogitsSm90::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The ring in shared memory: addresses of stages and of their barriers.
struct Ring {
  uint32_t base;  // of a LogitsSm90Shared

  __device__ __forceinline__ uint32_t stage(int slot) const {
    return base + offsetof(LogitsSm90Shared, stages) + slot * sizeof(LogitsSm90Shared::Stage);
  }
  __device__ __forceinline__ uint32_t tile_e(int slot) const {
    return stage(slot) + offsetof(LogitsSm90Shared::Stage, e);
  }
  __device__ __forceinline__ uint32_t tile_c(int slot) const {
    return stage(slot) + offsetof(LogitsSm90Shared::Stage, c);
  }
  __device__ __forceinline__ uint32_t full(int slot) const {
    return base + offsetof(LogitsSm90Shared, full) + slot * sizeof(uint64_t);
  }
  __device__ __forceinline__ uint32_t empty(int slot) const {
    return base + offsetof(LogitsSm90Shared, empty) + slot * sizeof(uint64_t);
  }
};

// The producer: one thread, which sends for all stages of all the block's units.
template <int kCluster>
__device__ __forceinline__ void produce_logits_stages(const LogitsSm90Operands& operands,
                                                      const LogitsWork& work, const Ring& ring) {
  constexpr int kColumnsOfBlock = LogitsSm90::kColumnsOfBlock<kCluster>;
  constexpr auto kAllBlocks = static_cast<uint16_t>((1 << kCluster) - 1);
  const int rank = kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const uint64_t policy = ptx::policy_evict_normal();
  const auto stage_bytes = static_cast<uint32_t>(operands.box_rows * kRowBytes + LogitsSm90::kTileC);
  const CUtensorMap* e = work.compact ? &operands.live_e : &operands.e;
  ptx::prefetch_tensor_map(e);
  ptx::prefetch_tensor_map(&operands.c);

  RingPlace place;
  for (int index = blockIdx.x / kCluster; index < work.units; index += gridDim.x / kCluster) {
    const LogitsUnit unit = work.schedule.unit(index);
    // A block that has no rows computes on some that there are: the copy engine takes longer for a box
    // outside of E than for one inside.
    int row = (unit.row_block * kCluster + rank) * LogitsSm90::kRows;
    if (row >= operands.n) row = operands.n - operands.box_rows;
    for (int block = unit.first_column_block; block < unit.end_column_block; ++block) {
      const int column = block * LogitsSm90::kColumns + rank * kColumnsOfBlock;
      for (int step = 0; step < operands.steps; ++step) {
        const uint32_t full = ring.full(place.slot);
        const uint32_t tile_e = ring.tile_e(place.slot);
        const uint32_t tile_c = ring.tile_c(place.slot) + rank * kColumnsOfBlock * kRowBytes;
        const int depth = step * operands.depth;
        // Waits until the slot is free in all blocks of the cluster. The first round waits for nobody: on a
        // new barrier the phase of the other parity counts as ended.
        ptx::mbarrier_wait(ring.empty(place.slot), place.parity ^ 1);
        // The other block's part may arrive sooner: the phase does not end without this arrival.
        ptx::mbarrier_arrive_expect(full, stage_bytes);
        ptx::tma_load(tile_e, e, full, depth, row, policy);
        if constexpr (kCluster == 1) {
          ptx::tma_load(tile_c, &operands.c, full, depth, column, policy);
        } else {
          ptx::tma_load_multicast(tile_c, &operands.c, full, depth, column, kAllBlocks, policy);
        }
        place.advance();
      }
    }
  }
}

// A consumer warp's part of a block's product: 16 rows of all the block's columns.
template <typename Element, int kCluster>
struct WarpgroupProduct {
  MmaSums<1, LogitsSm90::kColumns / 8> sums;

  // The sums over the next `steps` stages, whatever they held before. One stage's products are under way
  // while the next stage's are sent after them; a stage is given back one step later. kFence: threads' copies
  // have brought a part of the stages, not the copy engine.
  template <bool kFence = false>
  __device__ __forceinline__ void multiply(const Ring& ring, RingPlace& place, int steps, int consumer) {
    int previous = 0;
    ptx::wgmma_hold(sums.tiles[0]);
    for (int step = 0; step < steps; ++step) {
      ptx::mbarrier_wait(ring.full(place.slot), place.parity);
      if constexpr (kFence) ptx::fence_async();
      const uint64_t e =
          ptx::wgmma_operand(ring.tile_e(place.slot) + consumer * LogitsSm90::kConsumerRows * kRowBytes);
      const uint64_t c = ptx::wgmma_operand(ring.tile_c(place.slot));
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kRowBytes / 32; ++part) {
        ptx::wgmma_m64n256<Element>(sums.tiles[0], e + part * ptx::kWgmmaNextK, c + part * ptx::kWgmmaNextK,
                                    step > 0 || part > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0) release(ring, previous);
      previous = place.slot;
      place.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(sums.tiles[0]);
    release(ring, previous);
  }

 private:
  // Once a warp, at each block of the cluster: all of them send to this one.
  __device__ __forceinline__ static void release(const Ring& ring, int slot) {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    if constexpr (kCluster == 1) {
      if (lane == 0) ptx::mbarrier_arrive(ring.empty(slot));
    } else {
      if (lane < kCluster) ptx::mbarrier_arrive_in_cluster(ptx::cluster_address(ring.empty(slot), lane));
    }
  }
};

// Epilogue: begin(row block), then for each block of columns block(sums, column block), then finish(split).
// Each consumer warp has its own; where they meet, as the filter's do, it is at a barrier of all consumers.
template <typename Element, typename Epilogue, int kCluster>
__global__ void __launch_bounds__(LogitsSm90::kThreads, 1)
    logits_sm90_kernel(const __grid_constant__ LogitsSm90Operands operands,
                       const __grid_constant__ typename Epilogue::Arguments arguments) {
  // Setup
  extern __shared__ unsigned char memory[];
  constexpr uint32_t kAlignment = LogitsSm90Shared::kAlignment;
  const auto begin = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const Ring ring = {(begin + kAlignment - 1) / kAlignment * kAlignment};
  __shared__ LogitsWork work;
  if (threadIdx.x == 0) {
    work.find(operands.schedule, operands.live, operands.n, kCluster * LogitsSm90::kRows);
    for (int slot = 0; slot < LogitsSm90::kStages; ++slot) {
      ptx::mbarrier_init(ring.full(slot), 1);
      ptx::mbarrier_init(ring.empty(slot), kCluster * LogitsSm90::kConsumerWarps);
    }
    ptx::mbarrier_init_fence();
  }
  if constexpr (kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }

  // The same for all lanes of a warp, and the compiler is to know it.
  const int warpgroup =
      __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / LogitsSm90::kWarpgroupThreads, 0);
  if (warpgroup == LogitsSm90::kConsumers) {
    // Load
    ptx::keep_registers<LogitsSm90::kProducerRegisters>();
    if (threadIdx.x % LogitsSm90::kWarpgroupThreads == 0) {
      produce_logits_stages<kCluster>(operands, work, ring);
    }
  } else {
    // Compute
    ptx::take_registers<LogitsSm90::kConsumerRegisters>();
    const int rank = kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
    Epilogue epilogue(arguments);
    WarpgroupProduct<Element, kCluster> product;
    // The first product of a block overwrites the sums; but registers that hold nothing yet must not be an
    // operand of wgmma.
    product.sums.clear();
    RingPlace place;
    for (int index = blockIdx.x / kCluster; index < work.units; index += gridDim.x / kCluster) {
      const LogitsUnit unit = work.schedule.unit(index);
      epilogue.begin(unit.row_block * kCluster + rank);
      for (int block = unit.first_column_block; block < unit.end_column_block; ++block) {
        product.multiply(ring, place, operands.steps, warpgroup);
        epilogue.block(product.sums, block);
      }
      // Finish
      epilogue.finish(unit.split);
    }
  }
  // The other block sends to this one's memory and arrives at its barriers until it is done.
  if constexpr (kCluster > 1) ptx::cluster_sync();
}

}  // namespace cce
