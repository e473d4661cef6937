#pragma once

#include <cstdint>

// What the operators hand to the launchers: plain structs, without torch's types or CUDA's.
namespace cce {

// The ignore_index where all tokens count.
constexpr int64_t kIgnoreNone = INT64_MIN;

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// What every operator's kernels read of the inputs. Strides are in elements; the last dimension of e and c
// has stride 1.
struct LossInputs {
  const void* e;        // [n, d]
  const void* c;        // [v, d], of e's dtype
  const void* bias;     // [v], of e's dtype, or null
  const void* targets;  // [n], int32 or int64
  int64_t n, d, v;
  int64_t e_row_stride, c_row_stride, bias_stride, target_stride;
  int64_t ignore_index;
  double softcap;  // 0: none
  DType dtype;
  bool targets_are_int64;

  bool all_count() const { return ignore_index == kIgnoreNone; }
};

struct LabelLogitsParams {
  LossInputs in;
  const void* scale;  // [n], contiguous, of out's dtype, or null: 1
  void* out;          // [n], contiguous: float, or double for double e
};

// Pairs of a token and one of its k labels. in.targets and its stride are not used.
struct PairLogitsParams {
  LossInputs in;
  const void* targets;  // [n, k], contiguous, int32 or int64 as `in` says
  int64_t k;
  void* out;  // [n, k], contiguous: float, or double for double e
};

// Coefficients and sums are floats, or doubles for double e. What is written is contiguous, of e's dtype, and
// null where it is not wanted. Of `in` the bias, the targets and the softcap are not used.
struct PairGradientsParams {
  LossInputs in;
  int64_t k;
  const void* coefficients;  // [n, k], contiguous
  const int* labels;         // [n, k], contiguous; -1 for none
  const int64_t* order;      // [n k]: the pairs sorted by label, for grad_c and grad_bias
  void* grad_e;              // [n, d], added to
  void* grad_c;              // [v, d], added to
  void* grad_bias;           // [v], added to
  void* edges;               // scratch: [segments, 2, d] sums, for grad_c
  void* edge_biases;         // scratch: [segments, 2] sums, for grad_bias
};

struct ReduceNllParams {
  const float* nll;     // [n], contiguous
  const void* targets;  // [n], int32 or int64
  int64_t target_stride;
  bool targets_are_int64;
  int64_t ignore_index;
  int64_t n;
  bool mean;
  float* loss;   // one
  float* count;  // one: of the tokens that count
};

constexpr int64_t kLiveCountBytes = 8;

// What the forward finds of each token's softmax besides, and who asks for it: bits of the operator's stats.
// The largest logit comes with its column.
enum Statistic : int { kEntropy = 1, kLogSumSquares = 2, kMeanLogit = 4, kArgmax = 8 };
constexpr int kStatistics = 4;  // rows of the output, in the bits' order: the last is the largest logit
// Of a run of columns each takes 4 bytes, and the largest logit's column as many.
constexpr int partial_statistics(int64_t statistics) {
  int count = (statistics & kArgmax) != 0 ? 1 : 0;
  for (int k = 0; k < kStatistics; ++k) count += statistics >> k & 1;
  return count;
}

// A scan in 8 bits: e's rows that count and c, with a scale a row and a scale a vocab tile.
struct ScanScratch {
  void* e;            // [n, stride]
  void* c;            // [v, stride]
  int64_t stride;     // bytes, a multiple of 16
  float* row_scale;   // [n]
  float* tile_scale;  // [tiles]

  bool on() const { return c != nullptr; }
};

// Rows of e and c are multiples of 16 bytes apart, begin at one, and have d % 8 == 0 elements. All that is
// written is contiguous.
struct LceForwardParams {
  LossInputs in;
  float* label_logits;        // [n]
  int* live_tokens;           // scratch: [n]
  void* live_count;           // scratch: LiveCount
  void* live_e;               // scratch: [n, d] of e's dtype, or null where all count: e is read
  float* partial_lse;         // scratch: the plan's partials
  int64_t partials;           // how many
  const float* scale;         // [n] contiguous, of the logits, or null: 1
  void* tile_map;             // [tiles, n] codes of 16 bits, or null
  void* codes;                // the logits in 16 bits, a LogitCodes, or null; not where it is scored
  float* nll;                 // [n]
  float* lse;                 // [n]
  ScanScratch scan;           // null unless the product is to be of 8 bits
  int statistics;             // bits of Statistic
  float* partial_statistics;  // scratch: partial_statistics() for each partial, where there are any
  float* stats;               // [kStatistics, n], or null without any
  int64_t* argmax;            // [n], or null without kArgmax

  // Whether it takes more than the loss: kernels of their own.
  bool scored() const { return scale != nullptr || statistics != 0; }
};

constexpr int64_t kTokenScoreBytes = 32;

// As LceForwardParams; what a backward shares, whichever pairs it visits.
struct LceBackwardParams {
  LossInputs in;
  const float* g_nll;  // [n] or null
  const float* g_lse;  // [n] or null
  int64_t g_nll_stride, g_lse_stride;
  const float* count;  // one, by which g_nll is divided, or null
  const float* nll;    // [n]
  const float* lse;    // [n]
  // Of the entropy, where its gradient is given or logits are scaled; else null.
  const float* g_entropy;  // [n] or null
  int64_t g_entropy_stride;
  const float* entropy;  // [n], contiguous, where g_entropy is given
  const float* scale;    // [n] contiguous, of the logits, or null: 1
  void* scores;          // scratch: [n] TokenScore, kTokenScoreBytes each, or null: neither is there
  void* rows;            // scratch: [n] GradientRow, 16 bytes each
  void* control;         // scratch: VisitControl, and behind it what else begins as zeros
  int64_t zeroed_bytes;  // of both: a multiple of 4
  void* grad_e;          // [n, d] or null
  void* grad_c;          // [v, d] or null
  void* grad_bias;       // [v] or null
  float* sum_e;          // scratch: [n, d] where e's gradient is wanted, else null
};

// cuBLAS as torch has loaded it: its handle, of the current device and stream, and its functions by their
// names (null for one that it does not have).
struct Blas {
  void* handle;
  void* (*function)(const char* name);
};

struct ExactScratch {
  const void* codes;  // the logits, as the forward has kept them, or null: they are computed again
  void* dz;           // [n, chunk columns] of e's dtype
  float* factors;     // [2]
  double threshold;   // the least |p - onehot| for which a block is kept, or 0: all are
};

struct VisitsScratch {
  const void* tile_map;  // [tiles, n] codes of 16 bits, of the forward
  const int64_t* seed;   // one
  int64_t salt;          // 0, or what other draws by the same seed have
  double eps;
  void* mask;            // [tiles, mask words]
  void* counts;          // [tiles], of what control begins
  void* order;           // [strips]
  void* chunk_begins;    // [chunks + 1, 2]
  void* pending;         // [2 + 2 chunks]
  void* items;           // VisitItem each
  float* mean_sums;      // [mean splits, d]
  void* mean;            // [d] of e's dtype: the mean token
  void* weights;         // [tiles, 256] of e's dtype: of a tile's columns in its centroid
  void* centroids;       // [tiles, d] of e's dtype
  void* residual;        // [tiles, residual stride] of e's dtype
  void* residual_e;      // [tiles, d] of e's dtype: sums of e by residual masses, where dC is wanted
  float* residual_sums;  // [tiles]: sums of these masses, where dbias is wanted
  double* corrections;   // [n]: of a scan's sums of p, where the visits are a scan's
  // For launch_visits alone.
  void* dz;      // [buffers, columns of a strip] of e's dtype
  void* tokens;  // [buffers]
};

}  // namespace cce
