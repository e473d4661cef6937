#pragma once

#include <cstdint>

#include "tile/constants.h"
#include "tile/host_device.h"

// The sampled backward as a list of items of work: what each of them reads, writes and waits for. The kernel
// takes its addresses and its waits from here, and tests/test_visit_order.py executes items on the CPU in
// adversarial orders by the same functions.
namespace cce {

// Visits that one item takes to a strip.
constexpr int kVisitRows = 128;
// Columns of D that a slice of an item's second product has.
constexpr int kVisitSlice = 128;
// Stages of 64 visits and one slice that an item of dC should have, so that its start and end do not show.
constexpr int kVisitItemStages = 48;
// Tokens of an item that ends dE, by all of D; and where it also multiplies the residual masses with the
// centroids, by a slice of D.
constexpr int kRoundRows = 64;
constexpr int kFinishRows = 256;
// Buffers of the ring that the chunks' dz take in turns. With three the dz of a chunk is done while that of
// the next is computed, before its dC is wanted.
constexpr int kVisitBuffers = 3;
// A chunk holds so many entries of dz a token, about an item for each multiprocessor at 8192 tokens, and no
// fewer than this, 4 MB of them. Of what few tokens visit, a strip has some 16 rows.
constexpr int kChunkEntriesPerToken = 384;
constexpr int kLeastChunkEntries = 1 << 21;
// dE's sums are borrowed from dC where they take one row in so many of it, whose logits are computed twice.
constexpr int kLeastLenders = 6;

// How a kernel takes the vocabulary: strips of columns, each a whole number of them to a vocab tile; what its
// dz in the ring begin at multiples of; the rows that a chunk has at least, however few the tokens, so that
// there is a strip for each multiprocessor; and whether it finds the tiles' centroids along with the visits,
// from a row for the mean token, in which case it multiplies them with the residual masses when dE ends.
struct VisitShape {
  int columns;
  int ring_rows;
  int chunk_rows;
  bool finds_centroids;
};

enum class VisitWork : uint32_t {
  kVisits,     // the part-th kVisitRows of the strip's visits: their dz for dC, and their dE
  kVisitsOfC,  // the same without their dE
  kVisitsOfE,  // the same for dE only
  kGradC,      // the strip's dC, in the part-th slices_per_item() of D
  kRound,      // dE of some tokens, from its sums: see rounded_by()
  // The part-th kVisitRows of the strip's visits: what they correct in a scan's sums of exponentials.
  kVisitsOfScan,
};

// Whether the item adds its visits' part to the sums of dE.
CCE_HOST_DEVICE constexpr bool adds_to_e(VisitWork work) {
  return work == VisitWork::kVisits || work == VisitWork::kVisitsOfE;
}
// Whether the item leaves its visits' dz in the ring, for the strip's items of dC.
CCE_HOST_DEVICE constexpr bool leaves_dz(VisitWork work) {
  return work == VisitWork::kVisits || work == VisitWork::kVisitsOfC;
}

// ---- Gates: a gate opens when all items that belong to it are done ----

constexpr int kNoGate = -1;
constexpr int kGateOfE = 0;         // all that adds to dE's sums
constexpr int kGateOfRounding = 1;  // all that reads them
// Chunk k of the visits has two gates, its dz and its dC.
CCE_HOST_DEVICE constexpr int gate_of_dz(int chunk) { return 2 + 2 * chunk; }
CCE_HOST_DEVICE constexpr int gate_of_dc(int chunk) { return 3 + 2 * chunk; }

struct VisitItem {
  int strip;
  VisitWork work : 3;
  uint32_t part : 29;
  uint32_t first_row;  // of the strip's dz in the ring
  int gate;            // it belongs to; what adds to dE belongs to kGateOfE as well
  int needs[2];        // gates that must be open before it begins, or kNoGate
};

// The second gate that the item belongs to, or kNoGate.
CCE_HOST_DEVICE constexpr int second_gate(const VisitItem& item) {
  return adds_to_e(item.work) && item.gate != kGateOfE ? kGateOfE : kNoGate;
}

// ---- How the work lies in memory: a pure function of the shape and of what is wanted ----

struct VisitLayout {
  int n, v, d;
  int columns;  // of a strip
  int strips;
  int strips_per_tile;
  int slices;  // of D, for items of dC; 0 where neither dC nor dbias is wanted
  bool need_e;
  bool of_scan;  // the visits correct a scan's log-sum-exps, and there is no gradient
  bool finds_centroids;
  // Rows after a strip's visits that are the control variate's, 0 or 1. Its dz are the tile's weights; for dC
  // its token is the sum of the tokens by their residual masses, for dE, where the kernel finds the
  // centroids, the mean token.
  int centroids;
  // Strips from here on lend their rows of dC to dE's sums (fp32, [n, d]), which begin at element
  // `sums_begin` of dC, and before them, where they live as long, to the residual masses ([tiles,
  // residual_stride] in 16 bits, at `residual_begin`); `strips`: none do.
  int first_borrowed;
  int64_t sums_begin, residual_begin;
  int residual_stride;  // n, rounded up to whole vectors
  uint32_t ring_pad;    // a strip's rows of the ring are a multiple of this
  uint32_t capacity;    // rows of dz after which a new chunk begins: no strip has more
  uint32_t buffer;      // rows of one of the ring's buffers: a chunk's last strip may go beyond its capacity
  int64_t max_chunks, max_items;

  CCE_HOST_DEVICE bool borrows() const { return first_borrowed < strips; }
  CCE_HOST_DEVICE int64_t ring_rows() const {
    return slices == 0 ? 0 : kVisitBuffers * static_cast<int64_t>(buffer);
  }
  // Items that end dE.
  CCE_HOST_DEVICE int rounds() const {
    if (!need_e) return 0;
    if (!finds_centroids) return (n + kRoundRows - 1) / kRoundRows;
    return (n + kFinishRows - 1) / kFinishRows * slices_of_d();
  }
  CCE_HOST_DEVICE int slices_of_d() const { return (d + kVisitSlice - 1) / kVisitSlice; }
  CCE_HOST_DEVICE int64_t max_gates() const { return 2 + 2 * max_chunks; }
  CCE_HOST_DEVICE int tile_of(int strip) const { return strip / strips_per_tile; }
  // Rows of a strip: its tile's visits, by their counts, and the control variate's.
  CCE_HOST_DEVICE uint32_t rows_of(const uint32_t* counts, int strip) const {
    return counts[tile_of(strip)] + static_cast<uint32_t>(centroids);
  }
  CCE_HOST_DEVICE uint32_t padded(uint32_t rows) const { return (rows + ring_pad - 1) / ring_pad * ring_pad; }
};

inline VisitLayout visit_layout(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c, bool need_bias,
                                const VisitShape& shape) {
  const auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  VisitLayout layout{};
  layout.n = static_cast<int>(n);
  layout.v = static_cast<int>(v);
  layout.d = static_cast<int>(d);
  layout.columns = shape.columns;
  layout.strips_per_tile = kTileColumns / shape.columns;
  layout.ring_pad = static_cast<uint32_t>(shape.ring_rows);
  const int64_t strips = ceil_div(v, shape.columns);
  layout.strips = static_cast<int>(strips);
  layout.slices = need_c || need_bias ? static_cast<int>(ceil_div(d, kVisitSlice)) : 0;
  layout.need_e = need_e;
  layout.finds_centroids = shape.finds_centroids && need_e;
  layout.centroids = layout.slices > 0 || layout.finds_centroids ? 1 : 0;
  layout.first_borrowed = layout.strips;
  layout.residual_stride = static_cast<int>(ceil_div(n, 8) * 8);
  // Two rows of dC, in 16 bits, hold the sums of one token.
  const int64_t residual = ceil_div(v, kTileColumns) * layout.residual_stride;
  const int64_t lent = 2 * n + (layout.finds_centroids ? ceil_div(residual, d) : 0);
  if (need_e && need_c && lent * kLeastLenders <= v) {
    layout.sums_begin = (v - 2 * n) * d;
    layout.residual_begin = (v - lent) * d;
    layout.first_borrowed = static_cast<int>((v - lent) / shape.columns);
  }
  const uint32_t most = layout.padded(static_cast<uint32_t>(n + layout.centroids));
  int64_t chunk = ceil_div(kChunkEntriesPerToken * n, shape.columns);
  if (chunk < shape.chunk_rows) chunk = shape.chunk_rows;
  // No more than all strips can have, and no less than one can.
  if (chunk > strips * most) chunk = strips * most;
  layout.capacity = layout.padded(chunk < most ? most : static_cast<uint32_t>(chunk));
  layout.buffer = layout.capacity + most;
  // The strips that lend begin a chunk of their own.
  layout.max_chunks = strips * most / layout.capacity + 2;
  layout.max_items = (2 * strips - layout.first_borrowed) * ceil_div(n + layout.centroids, kVisitRows) +
                     strips * layout.slices + layout.rounds();
  return layout;
}

// ---- What an item touches; `visits` is the number of its strip's rows ----

struct VisitRange {
  int64_t begin, end;
};

CCE_HOST_DEVICE constexpr VisitRange visit_range(int64_t begin, int64_t size, int64_t end) {
  return {begin < end ? begin : end, begin + size < end ? begin + size : end};
}

// An item of dz: its visits, counted within the strip; with leaves_dz() it writes the ring's rows
// item.first_row + these.
CCE_HOST_DEVICE constexpr VisitRange visits_of(const VisitItem& item, uint32_t visits) {
  return visit_range(static_cast<int64_t>(item.part) * kVisitRows, kVisitRows, visits);
}

// Slices in each of a strip's items of dC.
CCE_HOST_DEVICE constexpr int slices_per_item(uint32_t visits, int slices) {
  const uint32_t stages = visits <= 64 ? 1 : (visits + 63) / 64;
  const int most = static_cast<int>(kVisitItemStages / stages);
  return most < 1 ? 1 : most < slices ? most : slices;
}

// An item of dC: its slices of D. It reads the ring's rows item.first_row + [0, visits) and writes these
// slices of the strip's rows of dC; the one with slice 0 also writes dbias.
CCE_HOST_DEVICE constexpr VisitRange slices_of(const VisitItem& item, uint32_t visits, int slices) {
  const int64_t each = slices_per_item(visits, slices);
  return visit_range(item.part * each, each, slices);
}

// An item of rounding: the tokens, and the slices of D, whose sums it reads and whose dE it writes.
struct RoundedPart {
  VisitRange tokens, slices;
};
CCE_HOST_DEVICE inline RoundedPart rounded_by(const VisitItem& item, const VisitLayout& layout) {
  const int slices = layout.slices_of_d();
  if (!layout.finds_centroids) {
    return {visit_range(static_cast<int64_t>(item.part) * kRoundRows, kRoundRows, layout.n), {0, slices}};
  }
  // Neighbours in the list read the same centroids.
  const int blocks = (layout.n + kFinishRows - 1) / kFinishRows;
  const int64_t part = item.part;
  return {visit_range(part % blocks * kFinishRows, kFinishRows, layout.n),
          visit_range(part / blocks, 1, slices)};
}

// How many items a strip has of each kind.
CCE_HOST_DEVICE constexpr uint32_t items_of_dz(uint32_t visits) {
  return (visits + kVisitRows - 1) / kVisitRows;
}
CCE_HOST_DEVICE constexpr uint32_t items_of_dc(uint32_t visits, int slices) {
  if (slices == 0) return 0;
  const uint32_t each = static_cast<uint32_t>(slices_per_item(visits, slices));
  return (static_cast<uint32_t>(slices) + each - 1) / each;
}

}  // namespace cce
