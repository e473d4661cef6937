#pragma once

#include <cstdint>

#include "kernels/visits_config.h"
#include "tile/block_scan.cuh"

namespace cce {

struct VisitPlanArguments {
  const uint32_t* counts;  // [tiles]
  int tiles;
  int slices;         // of D, for items of dC; 0: none are needed
  uint32_t capacity;  // rows of dz after which a new chunk begins; at least n
  uint32_t buffer;    // rows of one of the ring's two buffers: capacity + n
  VisitControl* control;
  int* order;              // scratch: [tiles]
  uint32_t* chunk_begins;  // scratch: [chunks + 1, 2]: items of dz and of dC before each chunk
  VisitItem* items;
};

// Tiles in order of falling size are cut into chunks of about `capacity` visits. Chunk k's dz goes to buffer
// k % 2 of the ring. The items come in the order [dz 0] [dC 0, dz 1] [dC 1, dz 2] ..: those in one pair of
// brackets need all that are in brackets before it, and no more. One block.
__global__ void __launch_bounds__(kPlanThreads, 1)
    visit_plan_kernel(const __grid_constant__ VisitPlanArguments a) {
  constexpr int kClasses = 33;
  __shared__ uint32_t class_first[kClasses];
  __shared__ unsigned long long scan_scratch[kPlanThreads / kWarpLanes];
  const int thread = static_cast<int>(threadIdx.x);
  // Class k: sizes of 32 - k bits; the largest first.
  if (thread < kClasses) class_first[thread] = 0;
  __syncthreads();
  for (int tile = thread; tile < a.tiles; tile += kPlanThreads)
    atomicAdd(&class_first[__clz(a.counts[tile])], 1u);
  __syncthreads();
  if (thread == 0) {
    uint32_t before = 0;
    for (uint32_t& first : class_first) {
      const uint32_t size = first;
      first = before;
      before += size;
    }
  }
  __syncthreads();
  for (int tile = thread; tile < a.tiles; tile += kPlanThreads) {
    a.order[atomicAdd(&class_first[__clz(a.counts[tile])], 1u)] = tile;
  }
  __syncthreads();

  // Each thread takes neighbours in that order.
  const int share = (a.tiles + kPlanThreads - 1) / kPlanThreads;
  const int first = min(thread * share, a.tiles), end = min(first + share, a.tiles);
  const auto items_of_dz = [](uint32_t visits) { return (visits + kVisitRows - 1) / kVisitRows; };
  const auto items_of_dc = [&a](uint32_t visits) {
    if (a.slices == 0) return 0u;
    const uint32_t each = slices_per_item(static_cast<int>(visits), a.slices);
    return (a.slices + each - 1) / each;
  };
  unsigned long long rows = 0, dz = 0, dc = 0;
  for (int k = first; k < end; ++k) {
    const uint32_t visits = a.counts[a.order[k]];
    rows += visits;
    dz += items_of_dz(visits);
    dc += items_of_dc(visits);
  }
  unsigned long long all_rows, all_dz, all_dc;
  rows = block_exclusive_sum<kPlanThreads>(rows, scan_scratch, all_rows);
  dz = block_exclusive_sum<kPlanThreads>(dz, scan_scratch, all_dz);
  dc = block_exclusive_sum<kPlanThreads>(dc, scan_scratch, all_dc);

  // What comes before each chunk. A tile has at most `capacity` visits, so that no chunk is left out.
  unsigned long long row = rows, dz_before = dz, dc_before = dc;
  for (int k = first; k < end; ++k) {
    const uint32_t visits = a.counts[a.order[k]];
    const uint32_t chunk = static_cast<uint32_t>(row / a.capacity);
    const bool begins = k == 0 || chunk != (row - a.counts[a.order[k - 1]]) / a.capacity;
    if (begins) {
      a.chunk_begins[2 * chunk] = static_cast<uint32_t>(dz_before);
      a.chunk_begins[2 * chunk + 1] = static_cast<uint32_t>(dc_before);
    }
    if (k == a.tiles - 1) {
      a.chunk_begins[2 * (chunk + 1)] = static_cast<uint32_t>(all_dz);
      a.chunk_begins[2 * (chunk + 1) + 1] = static_cast<uint32_t>(all_dc);
    }
    row += visits;
    dz_before += items_of_dz(visits);
    dc_before += items_of_dc(visits);
  }
  if (thread == 0) a.control->items = static_cast<uint32_t>(all_dz + all_dc);
  __syncthreads();

  row = rows;
  for (int k = first; k < end; ++k) {
    const int tile = a.order[k];
    const uint32_t visits = a.counts[tile];
    const uint32_t chunk = static_cast<uint32_t>(row / a.capacity);
    const uint32_t* begins = a.chunk_begins + 2 * chunk;
    const uint32_t ready_dz = begins[0] + (chunk == 0 ? 0 : begins[-1]);
    const uint32_t ready_dc = begins[2] + begins[1];
    VisitItem item;
    item.tile = tile;
    item.first_row = chunk % 2 * a.buffer +
                     static_cast<uint32_t>(row - static_cast<unsigned long long>(chunk) * a.capacity);
    item.ready = ready_dz;
    const uint32_t parts = items_of_dz(visits);
    for (uint32_t part = 0; part < parts; ++part) {
      item.part = static_cast<int>(part);
      a.items[dz + begins[1] + part] = item;
    }
    item.ready = ready_dc;
    const uint32_t groups = items_of_dc(visits);
    for (uint32_t group = 0; group < groups; ++group) {
      item.part = ~static_cast<int>(group);
      a.items[dc + begins[2] + group] = item;
    }
    row += visits;
    dz += parts;
    dc += groups;
  }
}

}  // namespace cce
