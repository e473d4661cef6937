#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/finish_logits.cuh"
#include "kernels/live_rows.h"
#include "kernels/lse.cuh"
#include "ptx/math.cuh"
#include "tile/target.cuh"

// The statistics of a token's softmax beside its log-sum-exp, from logits that may be scaled: what the
// epilogues that find them share, and the kernel that joins what they leave.
namespace cce {

// Partial statistics of a run of columns of each live token, [splits, R] each; null where nobody asks.
struct PartialScores {
  float* entropy;
  float* log_squares;  // ln of the sum of p^2
  float* total;        // the sum of z
  float* max;          // the largest z, and its first column
  int* argmax;
};

template <typename Element>
struct ScoreArguments {
  LseArguments<Element> lse;
  const float* scale;  // [N] or null: 1
  PartialScores partial;
};

// Of some columns of one token: the sums of x = exp(z - max), of x^2 and of x log2 x, the sum of z, and the
// first column that has the largest z.
struct ScoreSums {
  float max;
  float sum, squares, weighed;
  float total;
  int argmax;

  __device__ __forceinline__ static ScoreSums none() { return {MaxSum::kLowest, 0.0f, 0.0f, 0.0f, 0.0f, 0}; }

  // With those of columns behind.
  __device__ __forceinline__ void add(const ScoreSums& other) {
    const float higher = fmaxf(max, other.max);
    const float own_bits = (max - higher) * kLog2E, others_bits = (other.max - higher) * kLog2E;
    const float own = ptx::exp2_approx(own_bits), others = ptx::exp2_approx(others_bits);
    // log2 of x changes by the bits. Where x becomes 0 they may be as many as a float has.
    const float own_weighed = own == 0.0f ? 0.0f : own * fmaf(sum, own_bits, weighed);
    const float others_weighed = others == 0.0f ? 0.0f : others * fmaf(other.sum, others_bits, other.weighed);
    weighed = own_weighed + others_weighed;
    sum = sum * own + other.sum * others;
    squares = squares * (own * own) + other.squares * (others * others);
    total += other.total;
    if (other.max > max) argmax = other.argmax;
    max = higher;
  }
  __device__ __forceinline__ TileSums tile() const { return {max, sum, squares}; }
  // -sum p log p and ln sum p^2 of these columns alone. Differences of logarithms would cancel.
  __device__ __forceinline__ float entropy() const {
    return kLn2 * (ptx::log2_approx(sum) - __fdividef(weighed, sum));
  }
  __device__ __forceinline__ float log_squares() const {
    return kLn2 * (ptx::log2_approx(squares) - 2.0f * ptx::log2_approx(sum));
  }
  __device__ __forceinline__ float lse() const { return MaxSum{max, sum}.lse(); }

  __device__ __forceinline__ void store(const PartialScores& to, int64_t index) const {
    if (to.entropy != nullptr) to.entropy[index] = entropy();
    if (to.log_squares != nullptr) to.log_squares[index] = log_squares();
    if (to.total != nullptr) to.total[index] = total;
    if (to.max != nullptr) {
      to.max[index] = max;
      to.argmax[index] = argmax;
    }
  }
};

// Scales a lane's capped sums, each row by its own, and finds the largest and the sum of each: what a
// column has that is not there is finite, so that 0 times it is 0, and not NaN.
template <typename Sums, typename ScaleOf>
__device__ __forceinline__ void scale_logits(Sums& sums, int first_column, int columns,
                                             const ScaleOf& scale_of, float (&max)[Sums::kRows],
                                             float (&total)[Sums::kRows]) {
#pragma unroll
  for (int r = 0; r < Sums::kRows; ++r) {
    const float scale = scale_of(r);
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < Sums::kColumns; ++c) {
      const float z = sums.at(r, c) * scale;
      sums.at(r, c) = z;
      sum[c % 2] += z;
    }
    total[r] = sum[0] + sum[1];
  }
  end_logits(sums, first_column, columns, MaxSum::kLowest);
#pragma unroll
  for (int r = 0; r < Sums::kRows; ++r) {
    max[r] = MaxSum::kLowest;
#pragma unroll
    for (int c = 0; c < Sums::kColumns; c += 2) {
      max[r] = fmaxf(max[r], fmaxf(sums.at(r, c), sums.at(r, c + 1)));
    }
  }
}

// The lane's part of a row's sums, relative to the row's largest z of all lanes that have it.
template <typename Sums>
__device__ __forceinline__ ScoreSums score_row(const Sums& sums, int r, float max) {
  const float offset = -max * kLog2E;
  float sum[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f}, weighed[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < Sums::kColumns; ++c) {
    float bits = fmaf(sums.at(r, c), kLog2E, offset);
    // A masked column's -inf would make 0 times it NaN. A NaN stays.
    bits = bits < MaxSum::kLowest ? MaxSum::kLowest : bits;
    const float x = ptx::exp2_approx(bits);
    sum[c % 2] += x;
    squares[c % 2] = fmaf(x, x, squares[c % 2]);
    weighed[c % 2] = fmaf(x, bits, weighed[c % 2]);
  }
  return {max, sum[0] + sum[1], squares[0] + squares[1], weighed[0] + weighed[1], 0.0f, 0};
}

// The lane's first column of a row that has the largest z, counted from the lane's first; many if none has.
template <typename Sums>
__device__ __forceinline__ int first_column_of(const Sums& sums, int r, float max) {
  int first = 1 << 20;
#pragma unroll
  for (int c = Sums::kColumns - 1; c >= 0; --c) {
    if (sums.at(r, c) == max) first = Sums::column_offset(c);
  }
  return first;
}

struct ScoreFinishArguments {
  LiveRows live;  // R of the n tokens
  PartialScores partial;
  const float* partial_lse;  // [splits, R]
  const float* lse;          // [n]
  Targets targets;           // [n]
  int64_t ignore_index;
  float* stats;     // [kStatistics, n]: entropy, ln of the sum of p^2, mean logit, largest logit
  int64_t* argmax;  // [n] or null
  int64_t n;
  int v;
};

// Joins the partial statistics of each token, in their order. An ignored token's are 0, as are rows that
// nobody asked for.
static __global__ void __launch_bounds__(kLseFinishThreads) score_finish_kernel(ScoreFinishArguments a) {
  const int index = static_cast<int>(blockIdx.x) * kLseFinishThreads + static_cast<int>(threadIdx.x);
  if (index >= a.n) return;
  const auto write = [&](int token, float entropy, float log_squares, float mean, float max, int argmax) {
    a.stats[token] = entropy;
    a.stats[a.n + token] = log_squares;
    a.stats[2 * a.n + token] = mean;
    a.stats[3 * a.n + token] = max;
    if (a.argmax != nullptr) a.argmax[token] = argmax;
  };
  const LiveCount live = *a.live.count;
  if (index < live.rows) {
    const int token = a.live.tokens[index];
    const float lse = a.lse[token];
    const PartialScores& from = a.partial;
    float entropy = 0.0f, squares = 0.0f, total = 0.0f, max = -INFINITY;
    int argmax = 0;
    for (int split = 0; split < live.splits; ++split) {
      const int64_t at = static_cast<int64_t>(split) * live.rows + index;
      const float log_share = a.partial_lse[at] - lse;
      const float share = expf(log_share);
      // What has no share has no entropy either: it may be NaN.
      if (from.entropy != nullptr && share != 0.0f) entropy += share * (from.entropy[at] - log_share);
      if (from.log_squares != nullptr && share != 0.0f) {
        squares += expf(from.log_squares[at] + 2.0f * log_share);
      }
      if (from.total != nullptr) total += from.total[at];
      if (from.max != nullptr && (split == 0 || from.max[at] > max)) {
        max = from.max[at];
        argmax = from.argmax[at];
      }
    }
    write(token, from.entropy == nullptr ? 0.0f : entropy,
          from.log_squares == nullptr ? 0.0f : ptx::log2_approx(squares) * kLn2,
          from.total == nullptr ? 0.0f : total / static_cast<float>(a.v), from.max == nullptr ? 0.0f : max,
          argmax);
  }
  if (a.targets[index] == a.ignore_index) write(index, 0.0f, 0.0f, 0.0f, 0.0f, 0);
}

}  // namespace cce
