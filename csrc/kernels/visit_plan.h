#pragma once

#include <cstdint>

#include "kernels/visit_items.h"
#include "tile/host_device.h"

namespace cce {

// Zeroed before each backward.
struct VisitControl {
  uint32_t largest;     // bits of the largest |a| or |b|
  uint32_t stray_rows;  // 1: a row of e that does not count is not finite
  uint32_t items;
  uint32_t taken;
};

struct VisitPlanArguments {
  VisitLayout layout;
  const uint32_t* counts;  // [tiles]: each one's visits, without the control variate's row
  VisitControl* control;
  int* order;              // scratch: [strips]
  uint32_t* chunk_begins;  // scratch: [chunks + 1, 2]: items of dz and of dC before each chunk
  uint32_t* pending;       // [gates]: items of each that are not done
  VisitItem* items;
};

constexpr int kVisitSizes = 33;

struct VisitPlanShared {
  uint32_t class_first[2 * kVisitSizes];
  struct {
    unsigned long long rows;
    uint32_t dz, chunks;
  } plain;  // of the strips that lend nothing
  uint32_t chunks;
};

// Strips with fewer visits have a higher class: 32 less the bits that the number takes.
CCE_HOST_DEVICE inline int visit_size_class(uint32_t visits) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(visits));
#else
  int zeros = 32;
  for (; visits != 0; visits >>= 1) --zeros;
  return zeros;
#endif
}

// Lists the items, and how many belong to each gate.
//
// Strips in order of falling size are cut into chunks of about `capacity` rows. The items come in the order
// dz 0, dz 1, dC 0, dz 2, dC 1, dz 3 ..; a chunk's dC needs its dz, and its dz needs that the ring's buffer
// is free: dC of the chunk three before. Every strip has a row, the control variate's, so that every chunk
// has dz, which waits; its dC thereby stands for that of all chunks before. All that an item needs comes
// before it in the list.
//
// Where strips lend their rows of dC to dE's sums, these strips make the last chunks. What they owe to dE is
// added at the very first; dE is rounded after the last dz of the others, and then theirs is computed a
// second time, for their dC, which waits for the rounding by a gate of its own.
//
// Block is a block of threads: thread(), threads(), sync(), add() to a counter, and exclusive_sum() over the
// threads.
template <typename Block>
CCE_HOST_DEVICE void plan_visit_items(Block& block, const VisitPlanArguments& a, VisitPlanShared& shared) {
  const VisitLayout& layout = a.layout;
  const int thread = block.thread(), threads = block.threads(), strips = layout.strips;

  // Strips that lend come last. Before that, the largest first.
  const auto class_of = [&](int strip) {
    return (strip < layout.first_borrowed ? 0 : kVisitSizes) +
           visit_size_class(layout.rows_of(a.counts, strip));
  };
  for (int k = thread; k < 2 * kVisitSizes; k += threads) shared.class_first[k] = 0;
  if (thread == 0) shared.plain = {0, 0, 0};
  block.sync();
  for (int strip = thread; strip < strips; strip += threads)
    block.add(&shared.class_first[class_of(strip)], 1);
  block.sync();
  if (thread == 0) {
    uint32_t before = 0;
    for (uint32_t& first : shared.class_first) {
      const uint32_t size = first;
      first = before;
      before += size;
    }
  }
  block.sync();
  for (int strip = thread; strip < strips; strip += threads) {
    a.order[block.add(&shared.class_first[class_of(strip)], 1)] = strip;
  }
  block.sync();

  // Each thread takes neighbours in that order.
  const int share = (strips + threads - 1) / threads;
  const int first = thread * share < strips ? thread * share : strips;
  const int end = first + share < strips ? first + share : strips;
  unsigned long long rows = 0, dz = 0, dc = 0;
  for (int k = first; k < end; ++k) {
    const uint32_t visits = layout.rows_of(a.counts, a.order[k]);
    rows += layout.padded(visits);
    dz += items_of_dz(visits);
    dc += items_of_dc(visits, layout.slices);
  }
  unsigned long long all_rows, all_dz, all_dc;
  rows = block.exclusive_sum(rows, all_rows);
  dz = block.exclusive_sum(dz, all_dz);
  dc = block.exclusive_sum(dc, all_dc);

  if (first < layout.first_borrowed && layout.first_borrowed <= end) {
    unsigned long long row = rows;
    uint32_t dz_before = static_cast<uint32_t>(dz);
    for (int k = first; k < layout.first_borrowed; ++k) {
      const uint32_t visits = layout.rows_of(a.counts, a.order[k]);
      shared.plain.chunks = static_cast<uint32_t>(row / layout.capacity) + 1;
      row += layout.padded(visits);
      dz_before += items_of_dz(visits);
    }
    shared.plain.rows = row;
    shared.plain.dz = dz_before;
  }
  block.sync();
  const uint32_t plain_dz = shared.plain.dz, plain_chunks = shared.plain.chunks;
  // The chunk of a position in the order, and its first row there; `row`: the visits before it.
  const auto place_of = [&](int k, unsigned long long row, uint32_t& row_in_chunk) {
    const bool lends = k >= layout.first_borrowed;
    if (lends) row -= shared.plain.rows;
    row_in_chunk = static_cast<uint32_t>(row % layout.capacity);
    return static_cast<uint32_t>(row / layout.capacity) + (lends ? plain_chunks : 0);
  };

  // What comes before each chunk. A strip has at most `capacity` rows, so that no chunk is left out.
  unsigned long long row = rows;
  uint32_t dz_before = static_cast<uint32_t>(dz), dc_before = static_cast<uint32_t>(dc);
  for (int k = first; k < end; ++k) {
    const uint32_t visits = layout.rows_of(a.counts, a.order[k]);
    uint32_t row_in_chunk;
    const uint32_t chunk = place_of(k, row, row_in_chunk);
    const bool begins =
        k == 0 ||
        chunk != place_of(k - 1, row - layout.padded(layout.rows_of(a.counts, a.order[k - 1])), row_in_chunk);
    if (begins) {
      a.chunk_begins[2 * chunk] = dz_before;
      a.chunk_begins[2 * chunk + 1] = dc_before;
    }
    if (k == strips - 1) {
      shared.chunks = chunk + 1;
      a.chunk_begins[2 * (chunk + 1)] = static_cast<uint32_t>(all_dz);
      a.chunk_begins[2 * (chunk + 1) + 1] = static_cast<uint32_t>(all_dc);
    }
    row += layout.padded(visits);
    dz_before += items_of_dz(visits);
    dc_before += items_of_dc(visits, layout.slices);
  }
  // Items that add to dE alone for strips that lend: the first of all.
  const uint32_t of_e = layout.borrows() ? static_cast<uint32_t>(all_dz) - plain_dz : 0;
  const auto rounds = static_cast<uint32_t>(layout.rounds());
  if (thread == 0) a.control->items = of_e + static_cast<uint32_t>(all_dz + all_dc) + rounds;
  block.sync();

  // The items before dz of chunk k, before its dC, and before those that round dE.
  const uint32_t chunks = shared.chunks;
  const auto begin_of_dz = [&](uint32_t k) {
    return of_e + a.chunk_begins[2 * k] + a.chunk_begins[2 * (k < 1 ? 0 : k - 1) + 1] +
           (k >= plain_chunks ? rounds : 0);
  };
  const auto begin_of_dc = [&](uint32_t k) {
    return of_e + a.chunk_begins[2 * (k + 2 < chunks ? k + 2 : chunks)] + a.chunk_begins[2 * k + 1] +
           (k + 2 >= plain_chunks ? rounds : 0);
  };
  const uint32_t begin_of_rounding = of_e + a.chunk_begins[2 * plain_chunks] +
                                     a.chunk_begins[2 * (plain_chunks < 2 ? 0 : plain_chunks - 2) + 1];
  for (uint32_t k = static_cast<uint32_t>(thread); k < chunks; k += static_cast<uint32_t>(threads)) {
    const bool leaves = layout.slices != 0;
    a.pending[gate_of_dz(static_cast<int>(k))] =
        leaves ? a.chunk_begins[2 * k + 2] - a.chunk_begins[2 * k] : 0;
    a.pending[gate_of_dc(static_cast<int>(k))] = a.chunk_begins[2 * k + 3] - a.chunk_begins[2 * k + 1];
  }
  if (thread == 0) {
    a.pending[kGateOfE] = layout.need_e || layout.of_scan ? static_cast<uint32_t>(all_dz) : 0;
    a.pending[kGateOfRounding] = rounds;
  }

  row = rows;
  dz_before = static_cast<uint32_t>(dz);
  dc_before = static_cast<uint32_t>(dc);
  for (int k = first; k < end; ++k) {
    const int strip = a.order[k];
    const uint32_t visits = layout.rows_of(a.counts, strip);
    VisitItem item;
    item.strip = strip;
    uint32_t row_in_chunk;
    const uint32_t chunk = place_of(k, row, row_in_chunk);
    const int chunk_number = static_cast<int>(chunk);
    item.first_row = chunk % kVisitBuffers * layout.buffer + row_in_chunk;
    const uint32_t parts = items_of_dz(visits);
    const bool lends = k >= layout.first_borrowed;
    if (lends) {
      item.work = VisitWork::kVisitsOfE;
      item.gate = kGateOfE;
      item.needs[0] = item.needs[1] = kNoGate;
      for (uint32_t part = 0; part < parts; ++part) {
        item.part = part;
        a.items[dz_before - plain_dz + part] = item;
      }
    }
    item.work = layout.of_scan            ? VisitWork::kVisitsOfScan
                : lends || !layout.need_e ? VisitWork::kVisitsOfC
                : layout.slices == 0      ? VisitWork::kVisitsOfE
                                          : VisitWork::kVisits;
    item.gate = leaves_dz(item.work) ? gate_of_dz(chunk_number) : kGateOfE;
    item.needs[0] = chunk < kVisitBuffers ? kNoGate : gate_of_dc(chunk_number - kVisitBuffers);
    item.needs[1] = kNoGate;
    const uint32_t at_dz = begin_of_dz(chunk) + dz_before - a.chunk_begins[2 * chunk];
    for (uint32_t part = 0; part < parts; ++part) {
      item.part = part;
      a.items[at_dz + part] = item;
    }
    item.work = VisitWork::kGradC;
    item.gate = gate_of_dc(chunk_number);
    item.needs[0] = gate_of_dz(chunk_number);
    item.needs[1] = lends ? kGateOfRounding : kNoGate;
    const uint32_t groups = items_of_dc(visits, layout.slices);
    const uint32_t at_dc = begin_of_dc(chunk) + dc_before - a.chunk_begins[2 * chunk + 1];
    for (uint32_t part = 0; part < groups; ++part) {
      item.part = part;
      a.items[at_dc + part] = item;
    }
    row += layout.padded(visits);
    dz_before += parts;
    dc_before += groups;
  }
  VisitItem item;
  item.strip = 0;
  item.work = VisitWork::kRound;
  item.first_row = 0;
  item.gate = kGateOfRounding;
  item.needs[0] = kGateOfE;
  item.needs[1] = kNoGate;
  for (uint32_t part = static_cast<uint32_t>(thread); part < rounds; part += static_cast<uint32_t>(threads)) {
    item.part = part;
    a.items[begin_of_rounding + part] = item;
  }
}

}  // namespace cce
