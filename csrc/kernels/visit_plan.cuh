#pragma once

#include <cstdint>

#include "kernels/visits_config.h"
#include "tile/block_scan.cuh"

namespace cce {

struct VisitPlanArguments {
  const uint32_t* counts;  // [tiles]
  int n, tiles;
  int slices;  // of D, for items of dC; 0: none are needed
  bool need_e;
  int first_borrowed;  // tiles from here on lend their rows of dC to dE's sums; tiles: none do
  uint32_t capacity;   // rows of dz after which a new chunk begins; at least n
  uint32_t buffer;     // rows of one of the ring's buffers: capacity + n
  VisitControl* control;
  int* order;              // scratch: [tiles]
  uint32_t* chunk_begins;  // scratch: [chunks + 1, 2]: items of dz and of dC before each chunk
  uint32_t* pending;       // [2 + 2 chunks]: items of each stage
  VisitItem* items;
};

// Tiles in order of falling size are cut into chunks of about `capacity` visits. The items come in the order
// dz 0, dz 1, dC 0, dz 2, dC 1, dz 3 ..; a chunk's dC needs its dz, and its dz needs that the ring's buffer
// is free: dC of the chunk three before. All that an item needs comes before it.
//
// Where tiles have lent their rows of dC to dE's sums, these tiles make the last chunks. What they owe to dE
// is added at the very first; dE is rounded after the last dz of the others, and then theirs is computed a
// second time, for their dC. One block.
__global__ void __launch_bounds__(kPlanThreads, 1)
    visit_plan_kernel(const __grid_constant__ VisitPlanArguments a) {
  constexpr int kSizes = 33;
  __shared__ uint32_t class_first[2 * kSizes];
  __shared__ unsigned long long scan_scratch[kPlanThreads / kWarpLanes];
  __shared__ struct {
    unsigned long long rows;
    uint32_t dz, chunks;
  } plain;  // of the tiles that have lent nothing
  __shared__ uint32_t chunks;
  const int thread = static_cast<int>(threadIdx.x);
  // Tiles that lend come last. Before that, sizes of 32 - k bits: the largest first.
  const auto class_of = [&a](int tile) {
    return (tile < a.first_borrowed ? 0 : kSizes) + __clz(static_cast<int>(a.counts[tile]));
  };
  for (int k = thread; k < 2 * kSizes; k += kPlanThreads) class_first[k] = 0;
  if (thread == 0) plain = {0, 0, 0};
  __syncthreads();
  for (int tile = thread; tile < a.tiles; tile += kPlanThreads) atomicAdd(&class_first[class_of(tile)], 1u);
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
    a.order[atomicAdd(&class_first[class_of(tile)], 1u)] = tile;
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

  if (first < a.first_borrowed && a.first_borrowed <= end) {
    unsigned long long row = rows;
    uint32_t dz_before = static_cast<uint32_t>(dz);
    for (int k = first; k < a.first_borrowed; ++k) {
      const uint32_t visits = a.counts[a.order[k]];
      plain.chunks = static_cast<uint32_t>(row / a.capacity) + 1;
      row += visits;
      dz_before += items_of_dz(visits);
    }
    plain.rows = row;
    plain.dz = dz_before;
  }
  __syncthreads();
  // A position in the order, and the rows of the others before it.
  const auto place_of = [&](int k, unsigned long long row, uint32_t& row_in_chunk) {
    const bool lends = k >= a.first_borrowed;
    if (lends) row -= plain.rows;
    row_in_chunk = static_cast<uint32_t>(row % a.capacity);
    return static_cast<uint32_t>(row / a.capacity) + (lends ? plain.chunks : 0);
  };

  // What comes before each chunk. A tile has at most `capacity` visits, so that no chunk is left out.
  unsigned long long row = rows;
  uint32_t dz_before = static_cast<uint32_t>(dz), dc_before = static_cast<uint32_t>(dc);
  for (int k = first; k < end; ++k) {
    const uint32_t visits = a.counts[a.order[k]];
    uint32_t row_in_chunk;
    const uint32_t chunk = place_of(k, row, row_in_chunk);
    const bool begins = k == 0 || chunk != place_of(k - 1, row - a.counts[a.order[k - 1]], row_in_chunk);
    if (begins) {
      a.chunk_begins[2 * chunk] = dz_before;
      a.chunk_begins[2 * chunk + 1] = dc_before;
    }
    if (k == a.tiles - 1) {
      chunks = chunk + 1;
      a.chunk_begins[2 * (chunk + 1)] = static_cast<uint32_t>(all_dz);
      a.chunk_begins[2 * (chunk + 1) + 1] = static_cast<uint32_t>(all_dc);
    }
    row += visits;
    dz_before += items_of_dz(visits);
    dc_before += items_of_dc(visits);
  }
  const bool lent = a.first_borrowed < a.tiles;
  const uint32_t of_e = lent ? static_cast<uint32_t>(all_dz) - plain.dz : 0;  // items for dE alone, the first
  const uint32_t rounds = a.need_e ? static_cast<uint32_t>((a.n + kRoundRows - 1) / kRoundRows) : 0;
  if (thread == 0) a.control->items = of_e + static_cast<uint32_t>(all_dz + all_dc) + rounds;
  __syncthreads();

  // The items before dz of chunk k, before its dC, and before those that round dE.
  const auto begin_of_dz = [&](uint32_t k) {
    return of_e + a.chunk_begins[2 * k] + a.chunk_begins[2 * (k < 1 ? 0 : k - 1) + 1] +
           (k >= plain.chunks ? rounds : 0);
  };
  const auto begin_of_dc = [&](uint32_t k) {
    return of_e + a.chunk_begins[2 * min(k + 2, chunks)] + a.chunk_begins[2 * k + 1] +
           (k + 2 >= plain.chunks ? rounds : 0);
  };
  const uint32_t begin_of_rounding = of_e + a.chunk_begins[2 * plain.chunks] +
                                     a.chunk_begins[2 * (plain.chunks < 2 ? 0 : plain.chunks - 2) + 1];
  for (uint32_t k = thread; k < chunks; k += kPlanThreads) {
    a.pending[stage_of_dz(k)] = a.chunk_begins[2 * k + 2] - a.chunk_begins[2 * k];
    a.pending[stage_of_dc(k)] = a.chunk_begins[2 * k + 3] - a.chunk_begins[2 * k + 1];
  }
  if (thread == 0) {
    a.pending[kStageOfE] = a.need_e ? static_cast<uint32_t>(all_dz) : 0;
    a.pending[kStageOfRounding] = rounds;
  }

  row = rows;
  dz_before = static_cast<uint32_t>(dz);
  dc_before = static_cast<uint32_t>(dc);
  for (int k = first; k < end; ++k) {
    const int tile = a.order[k];
    const uint32_t visits = a.counts[tile];
    VisitItem item;
    item.tile = tile;
    uint32_t row_in_chunk;
    const uint32_t chunk = place_of(k, row, row_in_chunk);
    item.first_row = chunk % kVisitBuffers * a.buffer + row_in_chunk;
    const uint32_t parts = items_of_dz(visits);
    const bool lends = k >= a.first_borrowed;
    if (lends) {
      item.work = VisitWork::kVisitsOfE;
      item.stage = kStageOfE;
      item.needs[0] = item.needs[1] = kNoStage;
      for (item.part = 0; item.part < parts; ++item.part) a.items[dz_before - plain.dz + item.part] = item;
    }
    item.work = lends || !a.need_e ? VisitWork::kVisitsOfC
                : a.slices == 0    ? VisitWork::kVisitsOfE
                                   : VisitWork::kVisits;
    item.stage = item.work == VisitWork::kVisitsOfE ? kStageOfE : stage_of_dz(chunk);
    item.needs[0] = chunk < kVisitBuffers ? kNoStage : stage_of_dc(chunk - kVisitBuffers);
    item.needs[1] = lends ? kStageOfRounding : kNoStage;
    const uint32_t at_dz = begin_of_dz(chunk) + dz_before - a.chunk_begins[2 * chunk];
    for (item.part = 0; item.part < parts; ++item.part) a.items[at_dz + item.part] = item;
    item.work = VisitWork::kClassifier;
    item.stage = stage_of_dc(chunk);
    item.needs[0] = stage_of_dz(chunk);
    item.needs[1] = kNoStage;
    const uint32_t groups = items_of_dc(visits);
    const uint32_t at_dc = begin_of_dc(chunk) + dc_before - a.chunk_begins[2 * chunk + 1];
    for (item.part = 0; item.part < groups; ++item.part) a.items[at_dc + item.part] = item;
    row += visits;
    dz_before += parts;
    dc_before += groups;
  }
  VisitItem item;
  item.tile = 0;
  item.work = VisitWork::kRound;
  item.first_row = 0;
  item.stage = kStageOfRounding;
  item.needs[0] = kStageOfE;
  item.needs[1] = kNoStage;
  for (uint32_t part = thread; part < rounds; part += kPlanThreads) {
    item.part = part;
    a.items[begin_of_rounding + part] = item;
  }
}

}  // namespace cce
