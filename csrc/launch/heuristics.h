#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/label_logits_config.h"
#include "kernels/logits_sm80_config.h"
#include "kernels/logits_sm90_config.h"
#include "kernels/visits_config.h"
#include "launch/params.h"
#include "tile/constants.h"
#include "tile/schedule.h"

// Which configuration a kernel runs in, and why. Pure C++: tested without a GPU.
namespace cce {

inline int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

struct LabelLogitsPlan {
  bool vector_loads;   // 16-byte loads, else element by element
  const char* reason;  // for vector_loads
  unsigned blocks;
};

inline LabelLogitsPlan plan_label_logits(const LossInputs& p) {
  const int64_t bytes = element_bytes(p.dtype);
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kLabelLogitsVectorBytes == 0;
  };
  // With a single row the stride between rows is never used, and torch lets it be anything.
  const auto rows_aligned = [bytes](int64_t rows, int64_t stride) {
    return rows <= 1 || stride * bytes % kLabelLogitsVectorBytes == 0;
  };
  LabelLogitsPlan plan{};
  if (p.d * bytes < kLabelLogitsVectorBytes) {
    plan.reason = "element loads: a row is shorter than 16 bytes";
  } else if (!aligned(p.e)) {
    plan.reason = "element loads: e does not start at a multiple of 16 bytes";
  } else if (!aligned(p.c)) {
    plan.reason = "element loads: c does not start at a multiple of 16 bytes";
  } else if (!rows_aligned(p.n, p.e_row_stride)) {
    plan.reason = "element loads: e's rows are not a multiple of 16 bytes apart";
  } else if (!rows_aligned(p.v, p.c_row_stride)) {
    plan.reason = "element loads: c's rows are not a multiple of 16 bytes apart";
  } else {
    plan.vector_loads = true;
    plan.reason = "16-byte loads: every row of e and c starts at a multiple of 16 bytes";
  }
  // The kernel strides over the tokens, so CUDA's largest grid bounds the blocks, not the tokens.
  constexpr int64_t kLargestGrid = INT32_MAX;
  const int64_t blocks = (p.n + kLabelLogitsTokensPerBlock - 1) / kLabelLogitsTokensPerBlock;
  plan.blocks = static_cast<unsigned>(std::min(blocks, kLargestGrid));
  return plan;
}

// What a plan needs to know of a GPU, and of the build.
struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;          // that one block may have
  int major = 8, minor = 0;  // compute capability
  bool has_sm90 = false;     // the build has kernels for sm_90a, and nothing holds them back
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

// Stages of a cp.async ring that fit beside `other_bytes`: 4 hide the latency of memory, 2 are the least.
inline int ring_stages(const DeviceLimits& limits, int stage_bytes, int other_bytes) {
  const int fit = (limits.shared_bytes - other_bytes) / stage_bytes;
  return std::max(2, std::min(4, fit));
}

// ---- Forward ----

enum class ForwardKernel { kSm80, kSm90 };

struct LceForwardPlan {
  ForwardKernel kernel;
  int cluster;                // blocks with neighbouring rows that share what they read of C
  const char* kernel_reason;  // for both
  ForwardSchedule schedule;   // of rows as many as a cluster's
  int stages;
  int shared_bytes;
  int blocks;
  const char* reason;  // for the splits
};

// Partial log-sum-exps may take 2 MB, or one run of columns a token.
constexpr int64_t kMaxPartials = int64_t{1} << 19;

// Whether a tensor map describes rows as they lie: it knows no rows that overlap or lie 2^40 bytes apart. A
// single row's stride is never used.
inline bool tensor_map_takes(int64_t rows, int64_t d, int64_t row_stride) {
  return rows <= 1 || (row_stride >= d && row_stride < (int64_t{1} << 39));
}

inline void choose_forward_kernel(LceForwardPlan& plan, const LossInputs& in, const DeviceLimits& limits) {
  plan.kernel = ForwardKernel::kSm80;
  plan.cluster = 1;
  if (limits.major != 9 || limits.minor != 0) {
    plan.kernel_reason = "mma.sync: the GPU is not of compute capability 9.0";
  } else if (!limits.has_sm90) {
    plan.kernel_reason = "mma.sync: the build has no kernels for sm_90a, or CCE_KERNELS holds them back";
  } else if (limits.shared_bytes < LogitsSm90Memory::kBytes) {
    plan.kernel_reason = "mma.sync: a block may not have the shared memory that wgmma's ring takes";
  } else if (!tensor_map_takes(in.n, in.d, in.e_row_stride) ||
             !tensor_map_takes(in.v, in.d, in.c_row_stride)) {
    plan.kernel_reason = "mma.sync: the copy engine takes no rows that overlap";
  } else {
    plan.kernel = ForwardKernel::kSm90;
    const bool pairs = in.n > LogitsSm90::kRows && limits.multiprocessors > 1;
    plan.cluster = pairs ? 2 : 1;
    plan.kernel_reason = pairs ? "wgmma in pairs: two blocks of rows share what they read of C"
                               : "wgmma: there is one block of rows";
  }
}

inline LceForwardPlan plan_lce_forward(const LossInputs& in, const DeviceLimits& limits) {
  LceForwardPlan plan{};
  choose_forward_kernel(plan, in, limits);
  if (plan.kernel == ForwardKernel::kSm90) {
    plan.stages = LogitsSm90::kStages;
    plan.shared_bytes = LogitsSm90Memory::kBytes;
  } else {
    plan.stages = ring_stages(limits, kLogitsStageBytes, kLogitsStateBytes);
    plan.shared_bytes = logits_shared_bytes(plan.stages);
  }
  static_assert(LogitsSm90::kRows == kLogitsRows && LogitsSm90::kColumns == kLogitsColumns, "one schedule");
  const int64_t n = in.n;
  const int slots = limits.multiprocessors / plan.cluster;  // clusters that run at a time
  plan.schedule.row_blocks = static_cast<int>(ceil_div(n, kLogitsRows * plan.cluster));
  plan.schedule.column_blocks = static_cast<int>(ceil_div(in.v, kLogitsColumns));
  plan.schedule.group = kScheduleGroup / plan.cluster;
  const int64_t most = std::min<int64_t>(plan.schedule.column_blocks, std::max<int64_t>(1, kMaxPartials / n));
  // The time of a unit beside its columns, in column blocks: its row block's first stages come from further
  // away.
  constexpr double kUnitCost = 0.1;
  double least = 0;
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t units = static_cast<int64_t>(plan.schedule.row_blocks) * splits;
    const double waves = static_cast<double>(ceil_div(units, slots));
    const double time =
        waves * (static_cast<double>(ceil_div(plan.schedule.column_blocks, splits)) + kUnitCost);
    if (splits == 1 || time < least) {
      least = time;
      plan.schedule.splits = splits;
    }
  }
  plan.reason = plan.schedule.splits == most && most < plan.schedule.column_blocks
                    ? "as many runs of columns as 2 MB of partial sums hold"
                    : "the runs of columns that leave the last wave fullest";
  plan.blocks = plan.cluster * std::min(plan.schedule.units(), slots);
  return plan;
}

// ---- Exact backward ----

struct ExactPlan {
  int64_t chunk_columns;  // a multiple of 256: columns of dz held at a time
  int chunks;
  int stages;
  int shared_bytes;
  int blocks;
};

// dz of a chunk may take this, or a sixteenth of the gradients.
constexpr int64_t kMinChunkBytes = int64_t{64} << 20;

inline ExactPlan plan_exact(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c,
                            const DeviceLimits& limits) {
  ExactPlan plan{};
  plan.stages = ring_stages(limits, kLogitsStageBytes, kLogitsStateBytes);
  plan.shared_bytes = logits_shared_bytes(plan.stages);
  plan.blocks = limits.multiprocessors;
  const int64_t bytes = std::max(kMinChunkBytes, (n + v) * d * 2 / 10);
  const int64_t most = std::max<int64_t>(
      kLogitsColumns,
      std::min(round_up(v, kLogitsColumns), bytes / (2 * n) / kLogitsColumns * kLogitsColumns));
  // A block's time in columns of depth, with what its epilogue costs beside.
  constexpr double kLogitsCost = 100, kClassifierCost = 150, kEmbeddingCost = 300;
  const int64_t grid = limits.multiprocessors;
  const int64_t row_blocks = ceil_div(n, kLogitsRows), blocks_d = ceil_div(d, kLogitsColumns);
  double least = 0;
  for (int64_t columns = kLogitsColumns; columns <= most; columns += kLogitsColumns) {
    const int64_t chunks = ceil_div(v, columns);
    const double logits = static_cast<double>(ceil_div(row_blocks * (columns / kLogitsColumns), grid)) *
                          (static_cast<double>(d) + kLogitsCost);
    const int64_t blocks_c = need_c ? columns / kLogitsRows * blocks_d : 0;
    const int64_t blocks = blocks_c + (need_e ? row_blocks * blocks_d : 0);
    double products = 0;
    for (int64_t k = 0; k < std::min(grid, blocks); ++k) {
      const auto of_c = static_cast<double>(k < blocks_c ? ceil_div(blocks_c - k, grid) : 0);
      const auto all = static_cast<double>(ceil_div(blocks - k, grid));
      products = std::max(products, of_c * (static_cast<double>(n) + kClassifierCost) +
                                        (all - of_c) * (static_cast<double>(columns) + kEmbeddingCost));
    }
    const double time = static_cast<double>(chunks) * (logits + products);
    if (plan.chunk_columns == 0 || time < least) {
      least = time;
      plan.chunk_columns = columns;
      plan.chunks = static_cast<int>(chunks);
    }
  }
  return plan;
}

// ---- Sampled and threshold backward ----

struct VisitsPlan {
  int64_t tiles;
  int words;         // of a tile's bits
  int slices;        // of D, for items of dC; 0 where neither dC nor dbias is wanted
  int64_t capacity;  // rows of dz in a chunk
  int64_t buffer;    // rows of one of the ring's buffers
  int64_t chunks;    // at most
  int64_t items;     // at most
  // dE's sums, 4 bytes each, lie in dC from this element on, whose tiles from the first borrowed one are
  // written last; none are borrowed if that is `tiles`.
  int64_t sums_begin;
  int64_t first_borrowed;
  int stages;
  int shared_bytes;
  int blocks;
};

// A chunk holds so many visits a token: an item for each multiprocessor at 8192 tokens.
constexpr int64_t kChunkVisitsPerToken = 2;
// dE's sums are borrowed from dC where they take one row in so many of it, whose logits are computed twice.
constexpr int64_t kLeastLenders = 6;

inline VisitsPlan plan_visits(int64_t n, int64_t d, int64_t v, bool need_e, bool need_c, bool need_bias,
                              int row_bytes, const DeviceLimits& limits) {
  VisitsPlan plan{};
  plan.tiles = ceil_div(v, kTileColumns);
  plan.words = mask_words(static_cast<int>(n));
  plan.slices = need_c || need_bias ? static_cast<int>(ceil_div(d, kVisitSlice)) : 0;
  plan.capacity = kChunkVisitsPerToken * n;
  plan.buffer = plan.capacity + n;
  plan.chunks = plan.tiles * n / plan.capacity + 2;
  plan.first_borrowed = plan.tiles;
  if (need_e && need_c && 2 * n * kLeastLenders <= v) {
    plan.sums_begin = (v - 2 * n) * d;
    plan.first_borrowed = (v - 2 * n) / kTileColumns;
  }
  plan.items = (2 * plan.tiles - plan.first_borrowed) * ceil_div(n, kVisitRows) + plan.tiles * plan.slices +
               (need_e ? ceil_div(n, kRoundRows) : 0);
  plan.stages = ring_stages(limits, kVisitStageBytes, row_bytes);
  plan.shared_bytes = plan.stages * kVisitStageBytes + row_bytes;
  plan.blocks = limits.multiprocessors;
  return plan;
}

}  // namespace cce
