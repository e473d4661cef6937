#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/centroids_config.h"
#include "kernels/forward_splits.h"
#include "kernels/label_logits_config.h"
#include "kernels/logit_codes.h"
#include "kernels/logits_sm80_config.h"
#include "kernels/logits_sm90_config.h"
#include "kernels/pairs_config.h"
#include "kernels/visit_plan.h"
#include "kernels/visits_config.h"
#include "kernels/visits_sm90_config.h"
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

// Whether 16-byte loads fit rows of d elements that begin at `pointer`, all of each row.
inline bool vector_rows(const void* pointer, int64_t rows, int64_t stride, int64_t d, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % kPairVectorBytes == 0 && d * bytes % kPairVectorBytes == 0 &&
         (rows <= 1 || stride * bytes % kPairVectorBytes == 0);
}

struct PairGradientsPlan {
  bool vector_loads;  // 16-byte loads, else element by element
  int64_t columns;    // of a block
  int64_t segments;   // runs of the sorted pairs, a block's each
  int64_t pairs;      // of a segment
};

// The number of segments depends on the number of pairs alone: it says in which order their sums are taken.
inline PairGradientsPlan plan_pair_gradients(const PairGradientsParams& p) {
  const int64_t bytes = element_bytes(p.in.dtype);
  PairGradientsPlan plan{};
  plan.vector_loads = vector_rows(p.in.e, p.in.n, p.in.e_row_stride, p.in.d, bytes) &&
                      vector_rows(p.in.c, p.in.v, p.in.c_row_stride, p.in.d, bytes) &&
                      vector_rows(p.grad_e, p.in.n, p.in.d, p.in.d, bytes) &&
                      vector_rows(p.grad_c, p.in.v, p.in.d, p.in.d, bytes);
  plan.columns = kPairThreads * (plan.vector_loads ? kPairVectorBytes / bytes : 1);
  const int64_t pairs = p.in.n * p.k;
  plan.pairs = std::max<int64_t>(kPairSegmentLeast, (pairs + kPairSegments - 1) / kPairSegments);
  plan.segments = (pairs + plan.pairs - 1) / plan.pairs;
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

// Shared memory that a block may have on the smallest GPUs that the kernels serve (compute capability 8.6,
// 8.9 and 12.0).
constexpr int kLeastSharedBytes = 99 * 1024;
static_assert(logits_shared_bytes(2) <= kLeastSharedBytes, "two stages of the product fit every GPU");
static_assert(2 * kVisitStageBytes + sizeof(VisitsShared) <= kLeastSharedBytes, "and two of the visits");

// Stages of a cp.async ring that fit beside `other_bytes`: 4 hide the latency of memory, 2 are the least.
inline int ring_stages(const DeviceLimits& limits, int stage_bytes, int other_bytes) {
  const int fit = (limits.shared_bytes - other_bytes) / stage_bytes;
  return std::max(2, std::min(4, fit));
}

// ---- The product E C^T, whatever its epilogue ----

enum class LogitsKernel { kSm80, kSm90 };

struct LogitsPlan {
  LogitsKernel kernel;
  int cluster;         // blocks with neighbouring rows that share what they read of C
  const char* reason;  // for both
  int stages;
  int shared_bytes;
  int slots;  // clusters that run at a time

  // For some of C's rows. A unit is one block; longer runs of columns are the forward's.
  LogitsSchedule schedule(int64_t n, int64_t columns) const {
    LogitsSchedule schedule{};
    schedule.row_blocks = static_cast<int>(ceil_div(n, kLogitsRows * cluster));
    schedule.column_blocks = static_cast<int>(ceil_div(columns, kLogitsColumns));
    schedule.splits = schedule.column_blocks;
    schedule.group = kScheduleGroup / cluster;
    return schedule;
  }
  int blocks(const LogitsSchedule& schedule) const { return cluster * std::min(schedule.units(), slots); }
};

// Whether a tensor map describes rows as they lie: it knows no rows that overlap or lie 2^40 bytes apart. A
// single row's stride is never used.
inline bool tensor_map_takes(int64_t rows, int64_t d, int64_t row_stride) {
  return rows <= 1 || (row_stride >= d && row_stride < (int64_t{1} << 39));
}

// Why Hopper's kernels cannot run, or null. shared_bytes: what a block of them needs.
inline const char* why_not_sm90(const LossInputs& in, const DeviceLimits& limits, int shared_bytes) {
  if (limits.major != 9 || limits.minor != 0) return "mma.sync: the GPU is not of compute capability 9.0";
  if (!limits.has_sm90)
    return "mma.sync: the build has no kernels for sm_90a, or CCE_KERNELS holds them back";
  if (limits.shared_bytes < shared_bytes) {
    return "mma.sync: a block may not have the shared memory that wgmma's ring takes";
  }
  if (!tensor_map_takes(in.n, in.d, in.e_row_stride) || !tensor_map_takes(in.v, in.d, in.c_row_stride)) {
    return "mma.sync: the copy engine takes no rows that overlap";
  }
  return nullptr;
}

inline LogitsPlan plan_logits(const LossInputs& in, const DeviceLimits& limits) {
  static_assert(LogitsSm90::kRows == kLogitsRows && LogitsSm90::kColumns == kLogitsColumns, "one schedule");
  LogitsPlan plan{};
  plan.reason = why_not_sm90(in, limits, kLogitsSm90SharedBytes);
  if (plan.reason == nullptr) {
    const bool pairs = in.n > LogitsSm90::kRows && limits.multiprocessors > 1;
    plan.kernel = LogitsKernel::kSm90;
    plan.cluster = pairs ? 2 : 1;
    plan.reason = pairs ? "wgmma in pairs: two blocks of rows share what they read of C"
                        : "wgmma: there is one block of rows";
    plan.stages = LogitsSm90::kStages;
    plan.shared_bytes = kLogitsSm90SharedBytes;
  } else {
    plan.kernel = LogitsKernel::kSm80;
    plan.cluster = 1;
    plan.stages = ring_stages(limits, kLogitsStageBytes, kLogitsStateBytes);
    plan.shared_bytes = logits_shared_bytes(plan.stages);
  }
  plan.slots = limits.multiprocessors / plan.cluster;
  return plan;
}

// ---- Forward ----

struct LceForwardPlan {
  LogitsPlan logits;
  ForwardSplits splits;  // by which the device chooses the runs of columns, for the rows that count
  int blocks;
  int64_t partials;  // that any number of rows that count may need
};

// batch_invariant: sums of a token are in an order that depends on C alone.
inline LceForwardPlan plan_lce_forward(const LossInputs& in, const DeviceLimits& limits,
                                       bool batch_invariant = false) {
  LceForwardPlan plan{};
  plan.logits = plan_logits(in, limits);
  const int column_blocks = static_cast<int>(ceil_div(in.v, kLogitsColumns));
  const int fixed = batch_invariant ? std::min(column_blocks, kInvariantSplits) : 0;
  plan.splits = {column_blocks, limits.multiprocessors, kLogitsRows, plan.logits.cluster > 1, fixed};
  // Fewer rows may have more units.
  plan.blocks = plan.logits.cluster * plan.logits.slots;
  plan.partials = fixed != 0 ? in.n * fixed : std::min(in.n * column_blocks, std::max(in.n, kMaxPartials));
  // Where all rows count the host knows what the device will choose. Of few tokens, which may have many runs,
  // the search would take it longer than a small kernel.
  constexpr int kMostSearched = 128;
  if (in.all_count() && plan.splits.most(in.n) <= kMostSearched) {
    plan.partials = in.n * plan.splits.best(in.n);
  }
  return plan;
}

// ---- Exact and threshold backward ----

struct ExactPlan {
  LogitsPlan logits;
  int64_t chunk_columns;  // a multiple of 256: columns of dz held at a time
  int chunks;
  int live_product_stages;
  int live_product_blocks;
};

// At the peak there are the gradient of c, the sums of e's in fp32, dz of a chunk, and the workspace that
// torch gives cuBLAS on Hopper, 32 MB; e's gradient itself comes when dz is gone. A chunk may be so wide that
// all of it is a seventh more than the gradients; but this is left to it, since each chunk reads and writes
// the sums once.
constexpr int64_t kExactMinChunkBytes = int64_t{32} << 20;
constexpr int64_t kExactShare = 7;
constexpr int64_t kBlasWorkspaceBytes = int64_t{32} << 20;

inline ExactPlan plan_exact(const LossInputs& in, bool need_e, bool need_c, const DeviceLimits& limits) {
  ExactPlan plan{};
  plan.logits = plan_logits(in, limits);
  plan.live_product_stages = ring_stages(limits, kVisitStageBytes, 0);
  plan.live_product_blocks = limits.multiprocessors;
  const int64_t bytes_e = need_e ? in.n * in.d * 2 : 0, bytes_c = need_c ? in.v * in.d * 2 : 0;
  const int64_t bytes =
      std::max(kExactMinChunkBytes, (bytes_e + bytes_c) / kExactShare - bytes_e - kBlasWorkspaceBytes);
  const int64_t most = std::max<int64_t>(
      kLogitsColumns,
      std::min(round_up(in.v, kLogitsColumns), bytes / (2 * in.n) / kLogitsColumns * kLogitsColumns));
  // The widths are compared by the time of three products in blocks of 128 x 256, wave by wave, in columns of
  // depth. Of cuBLAS's blocks this is a guess; a block of dE's also reads and writes its sums.
  constexpr double kBlockCost = 150, kSumsCost = 600;
  const int64_t rows = ceil_div(in.n, kLogitsRows), blocks_d = ceil_div(in.d, kLogitsColumns);
  const auto waves = [](int64_t blocks, int at_a_time) {
    return static_cast<double>(ceil_div(blocks, at_a_time));
  };
  const int grid = limits.multiprocessors;
  double least = 0;
  for (int64_t columns = kLogitsColumns; columns <= most; columns += kLogitsColumns) {
    const int64_t chunks = ceil_div(in.v, columns);
    double time = waves(plan.logits.schedule(in.n, columns).units(), plan.logits.slots) *
                  (static_cast<double>(in.d) + kBlockCost);
    if (need_c) {
      time += waves(columns / kLogitsRows * blocks_d, grid) * (static_cast<double>(in.n) + kBlockCost);
    }
    if (need_e) time += waves(rows * blocks_d, grid) * (static_cast<double>(columns) + kSumsCost);
    time *= static_cast<double>(chunks);
    if (plan.chunk_columns == 0 || time < least) {
      least = time;
      plan.chunk_columns = columns;
      plan.chunks = static_cast<int>(chunks);
    }
  }
  return plan;
}

// ---- Sampled backward ----

enum class VisitsKernel { kSm80, kSm90 };

struct VisitsPlan {
  VisitsKernel kernel;
  const char* reason;
  VisitShape shape;
  VisitLayout layout;
  int words;   // of a tile's bits
  int stages;  // of mma.sync's ring; wgmma's has its own number
  int shared_bytes;
  int blocks;
  int tiles;
  int centroid_group;  // rows of C in shared memory at a time, where a pass of its own finds the centroids
  int live_product_stages;
  int live_product_blocks;
  bool few_tokens;                 // no more than the mean token has runs: what is done for many takes longer
  int64_t wait_milliseconds = -1;  // after which a wait gives up; -1: never

  int centroid_shared_bytes() const { return cce::centroid_shared_bytes(layout.d, centroid_group); }
  // For products of the residual masses.
  bool needs_blas(bool need_c) const {
    return (need_c && !few_tokens) || (layout.need_e && !layout.finds_centroids);
  }
};

inline VisitsPlan plan_visits(const LossInputs& in, bool need_e, bool need_c, bool need_bias,
                              const DeviceLimits& limits) {
  VisitsPlan plan{};
  plan.reason = why_not_sm90(in, limits, kVisitsSm90SharedBytes);
  if (plan.reason == nullptr) {
    plan.kernel = VisitsKernel::kSm90;
    plan.reason = "wgmma: whole vocab tiles";
    plan.stages = LogitsSm90::kStages;
    plan.shared_bytes = kVisitsSm90SharedBytes;
  } else {
    plan.kernel = VisitsKernel::kSm80;
    plan.stages = ring_stages(limits, kVisitStageBytes, sizeof(VisitsShared));
    plan.shared_bytes = plan.stages * kVisitStageBytes + static_cast<int>(sizeof(VisitsShared));
  }
  plan.shape = plan.kernel == VisitsKernel::kSm90 ? VisitsSm90::kShape : kVisitShape;
  plan.layout = visit_layout(in.n, in.d, in.v, need_e, need_c, need_bias, plan.shape);
  plan.words = mask_words(static_cast<int>(in.n));
  plan.blocks = limits.multiprocessors;
  plan.tiles = static_cast<int>(ceil_div(in.v, kTileColumns));
  plan.centroid_group = centroid_group(static_cast<int>(in.d), limits.shared_bytes - kCentroidStaticBytes);
  plan.live_product_stages = ring_stages(limits, kVisitStageBytes, 0);
  plan.live_product_blocks = limits.multiprocessors;
  plan.few_tokens = in.n <= kMeanSplits;
  return plan;
}

// The visits that correct a scan in the forward.
inline VisitsPlan plan_scan_visits(const LossInputs& in, const DeviceLimits& limits) {
  VisitsPlan plan = plan_visits(in, false, false, false, limits);
  plan.layout.of_scan = true;
  return plan;
}

}  // namespace cce
