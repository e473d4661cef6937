#pragma once

#include <cstdint>

#include "kernels/pairs_config.h"
#include "tile/element.cuh"

// What pairs of a token and a label, each with a coefficient, add to gradients: rows of c to those of dE, and
// rows of e to those of dC. Sums are taken in one order, and added to what is there with one rounding.
namespace cce {

// Rows of e, c and of what is written are kCount elements' vectors; strides are in elements.
template <typename Element, typename Accumulator>
struct PairGradientsArguments {
  const Element* e;                 // [n, d]
  const Element* c;                 // [v, d]
  const Accumulator* coefficients;  // [n, k]
  const int* labels;                // [n, k]; -1: none
  const int64_t* order;             // [n k]: the pairs sorted by label
  Element* grad_e;                  // [n, d], contiguous
  Element* grad_c;                  // [v, d], contiguous, or null
  Element* grad_bias;               // [v], or null
  Accumulator* edges;               // [segments, 2, d]
  Accumulator* edge_biases;         // [segments, 2]
  int64_t k, d;
  int64_t e_row_stride, c_row_stride;
  int64_t pairs, segment_pairs, segments;
};

// A thread's kCount neighbouring columns of a row of sums.
template <typename Element, typename Accumulator, int kCount>
struct PairSums {
  using Load = Vector<Element, kCount>;
  Accumulator values[kCount];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Accumulator(0);
  }

  __device__ __forceinline__ void add(Accumulator coefficient, const Load& row) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      values[i] = fma(coefficient, widen<Accumulator>(row.values[i]), values[i]);
  }

  __device__ __forceinline__ void store(Accumulator* address) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) address[i] = values[i];
  }

  __device__ __forceinline__ void add_to(Element* address) const {
    Load row = Load::load_written(address);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      row.values[i] = rounded<Element>(widen<Accumulator>(row.values[i]) + values[i]);
    }
    row.store(address);
  }
};

// Pairs that a block has ready: all of its threads walk them one by one, several rows in flight.
template <typename Accumulator>
struct PairBatch {
  Accumulator coefficients[kPairThreads];
  int labels[kPairThreads];
  int tokens[kPairThreads];
};

// A block adds to kPairThreads * kCount columns of a token's row of dE. A token without labels keeps its row.
template <typename Element, typename Accumulator, int kCount>
__global__ void __launch_bounds__(kPairThreads)
    pair_tokens_kernel(PairGradientsArguments<Element, Accumulator> a) {
  using Load = Vector<Element, kCount>;
  __shared__ PairBatch<Accumulator> batch;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t token = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kPairThreads + thread) * kCount;
  const bool inside = column < a.d;
  PairSums<Element, Accumulator, kCount> sums;
  sums.clear();
  bool any = false;
  for (int64_t first = 0; first < a.k; first += kPairThreads) {
    const int count = static_cast<int>(min(a.k - first, static_cast<int64_t>(kPairThreads)));
    const int own = thread < count ? a.labels[token * a.k + first + thread] : -1;
    batch.labels[thread] = own;
    batch.coefficients[thread] = own < 0 ? Accumulator(0) : a.coefficients[token * a.k + first + thread];
    if (!__syncthreads_or(own >= 0)) continue;  // which is a barrier for what has been written
    any = true;
    for (int p = 0; p < count && inside; p += kPairInFlight) {
      Load rows[kPairInFlight];
#pragma unroll
      for (int j = 0; j < kPairInFlight; ++j) {
        const int label = p + j < count ? batch.labels[p + j] : -1;
        rows[j] = label < 0 ? Load::zero() : Load::load(a.c + label * a.c_row_stride + column);
      }
#pragma unroll
      for (int j = 0; j < kPairInFlight; ++j) {
        if (p + j < count) sums.add(batch.coefficients[p + j], rows[j]);
      }
    }
    __syncthreads();
  }
  if (any && inside) sums.add_to(a.grad_e + token * a.d + column);
}

// The label of a pair by its place in the order; -2 outside of it, which no pair has.
template <typename Element, typename Accumulator>
__device__ __forceinline__ int pair_label(const PairGradientsArguments<Element, Accumulator>& a,
                                          int64_t place) {
  return place < 0 || place >= a.pairs ? -2 : a.labels[a.order[place]];
}

// dC, and dbias by the blocks of the first columns: a block walks a segment of the sorted pairs. A label
// whose pairs are all in it is added to its row. One whose pairs began in the segment before, or go on in the
// next, leaves its sum at the segment's edge: what comes from before as the first, what goes on as the
// second.
template <typename Element, typename Accumulator, int kCount>
__global__ void __launch_bounds__(kPairThreads, kPairBlocks)
    pair_segments_kernel(PairGradientsArguments<Element, Accumulator> a) {
  using Load = Vector<Element, kCount>;
  __shared__ PairBatch<Accumulator> batch;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t segment = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kPairThreads + thread) * kCount;
  const bool inside = a.grad_c != nullptr && column < a.d;
  const bool of_bias = a.grad_bias != nullptr && blockIdx.y == 0 && thread == 0;
  const int64_t begin = segment * a.segment_pairs;
  const int64_t end = min(begin + a.segment_pairs, a.pairs);
  const int before = pair_label(a, begin - 1), after = pair_label(a, end);

  PairSums<Element, Accumulator, kCount> sums;
  sums.clear();
  Accumulator bias = Accumulator(0);
  int current = -1;
  const auto finish = [&](bool last) {
    if (current < 0) return;
    const bool comes = current == before, goes = last && current == after;
    if (comes || goes) {
      const int64_t edge = 2 * segment + (comes ? 0 : 1);
      if (inside) sums.store(a.edges + edge * a.d + column);
      if (of_bias) a.edge_biases[edge] = bias;
    } else {
      if (inside) sums.add_to(a.grad_c + current * a.d + column);
      if (of_bias) {
        a.grad_bias[current] = rounded<Element>(widen<Accumulator>(a.grad_bias[current]) + bias);
      }
    }
  };

  for (int64_t first = begin; first < end; first += kPairThreads) {
    const int count = static_cast<int>(min(end - first, static_cast<int64_t>(kPairThreads)));
    if (thread < count) {
      const int64_t pair = a.order[first + thread];
      batch.labels[thread] = a.labels[pair];
      batch.coefficients[thread] = a.coefficients[pair];
      batch.tokens[thread] = static_cast<int>(pair / a.k);
    }
    __syncthreads();
    for (int p = 0; p < count; p += kPairInFlight) {
      Load rows[kPairInFlight];
#pragma unroll
      for (int j = 0; j < kPairInFlight; ++j) {
        const bool wanted = inside && p + j < count && batch.labels[p + j] >= 0;
        rows[j] = wanted ? Load::load(a.e + batch.tokens[p + j] * a.e_row_stride + column) : Load::zero();
      }
#pragma unroll
      for (int j = 0; j < kPairInFlight; ++j) {
        if (p + j >= count) break;
        const int label = batch.labels[p + j];
        if (label < 0) continue;  // these come first
        if (label != current) {
          finish(false);
          sums.clear();
          bias = Accumulator(0);
          current = label;
        }
        sums.add(batch.coefficients[p + j], rows[j]);
        bias += batch.coefficients[p + j];
      }
    }
    __syncthreads();
  }
  finish(true);
}

// What the segments left at their edges: the block of the segment where a label's pairs begin adds them up,
// from segment to segment, and adds the sum to the label's row.
template <typename Element, typename Accumulator, int kCount>
__global__ void __launch_bounds__(kPairThreads)
    pair_edges_kernel(PairGradientsArguments<Element, Accumulator> a) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t segment = blockIdx.x;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kPairThreads + thread) * kCount;
  const int64_t begin = segment * a.segment_pairs;
  const int64_t end = begin + a.segment_pairs;  // where there is a next segment
  const int label = pair_label(a, end - 1);
  if (label < 0 || pair_label(a, end) != label || pair_label(a, begin - 1) == label) return;

  // The next segment continues the label, and one after it does where that one begins with it too: of sorted
  // pairs those follow each other.
  int64_t stop = segment + 1;
  for (int64_t first = segment + 1; first < a.segments; first += kPairThreads) {
    const int64_t other = first + thread;
    const int more =
        __syncthreads_count(other < a.segments && pair_label(a, other * a.segment_pairs) == label);
    stop += more;
    if (more < kPairThreads) break;
  }

  if (a.grad_c != nullptr && column < a.d) {
    PairSums<Element, Accumulator, kCount> sums;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums.values[i] = a.edges[(2 * segment + 1) * a.d + column + i];
#pragma unroll kPairInFlight
    for (int64_t other = segment + 1; other < stop; ++other) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums.values[i] += a.edges[2 * other * a.d + column + i];
    }
    sums.add_to(a.grad_c + label * a.d + column);
  }
  if (a.grad_bias != nullptr && blockIdx.y == 0 && thread == 0) {
    Accumulator bias = a.edge_biases[2 * segment + 1];
    for (int64_t other = segment + 1; other < stop; ++other) bias += a.edge_biases[2 * other];
    a.grad_bias[label] = rounded<Element>(widen<Accumulator>(a.grad_bias[label]) + bias);
  }
}

}  // namespace cce
