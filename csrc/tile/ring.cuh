#pragma once

#include <cstdint>

#include "ptx/copy.cuh"
#include "tile/swizzle.h"

namespace cce {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Waits until the oldest of `stages - 1` stages under way has arrived, as far as this thread sent for it:
// each is one group of copies.
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages >= 4) {
    ptx::cp_async_wait<2>();
  } else if (stages == 3) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
}

// A ring of two to four stages in shared memory, through which operands stream. send(address) starts this
// thread's copies of the next stage, or none after the last.
template <int kStageBytes, typename Send>
class StageStream {
 public:
  __device__ __forceinline__ StageStream(uint32_t ring, int stages, Send& send)
      : ring_(ring), last_(ring + (stages - 1) * kStageBytes), stage_(last_), send_(send) {
    for (uint32_t slot = ring; slot != last_; slot += kStageBytes) {
      send_(slot);
      ptx::cp_async_commit();
    }
  }

  // Waits for the next stage, until it is there for all threads, which have then read all of the one before.
  // To be followed by fill().
  __device__ __forceinline__ void next() {
    wait_for_stage(static_cast<int>((last_ - ring_) / kStageBytes) + 1);
    __syncthreads();
    stage_ = stage_ == last_ ? ring_ : stage_ + kStageBytes;
  }

  // The address of the stage that next() waited for.
  __device__ __forceinline__ uint32_t stage() const { return stage_; }

  // Starts the copies of another stage, into the slot of the one before.
  __device__ __forceinline__ void fill() {
    send_(stage_ == ring_ ? last_ : stage_ - kStageBytes);
    ptx::cp_async_commit();
  }

  // Before the ring's memory serves something else.
  __device__ __forceinline__ void close() {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

 private:
  const uint32_t ring_, last_;
  uint32_t stage_;
  Send& send_;
};

// product += A B over the next `steps` stages, A at a stage's address and B kTileA bytes behind. The operands
// of 16 of k are loaded while the 16 before are multiplied, also from stage to stage, so that the tensor
// cores have work while the block waits at the barrier.
template <uint32_t kTileA, typename Product, typename Stream>
__device__ __forceinline__ void multiply_stages(Product& product, Stream& stream, int steps) {
  constexpr int kParts = Product::kDepth / 16;
  static_assert(kParts % 2 == 0, "the two sets of fragments take turns");
  typename Product::Fragments fragments[2];
  stream.next();
  product.load(fragments[0], stream.stage(), stream.stage() + kTileA, 0);
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part < kParts - 1) {
        product.load(fragments[(part + 1) % 2], stream.stage(), stream.stage() + kTileA, part + 1);
      } else if (step < steps - 1) {
        stream.next();
        product.load(fragments[(part + 1) % 2], stream.stage(), stream.stage() + kTileA, 0);
      }
      // Not sooner: the addresses of the copies would need registers beside both sets of fragments.
      if (part == 1) stream.fill();
      product.multiply(fragments[part % 2]);
    }
  }
}

// How the threads of a block share a stage's rows: a thread copies one chunk of every kThreads / 8-th row.
template <int kThreads>
struct CopyLane {
  static constexpr int kRowsPerPass = kThreads / (kRowBytes / kChunkBytes);
  static_assert(kRowsPerPass % 8 == 0, "the swizzle repeats every 8 rows");

  // The row of the first pass, and the chunk's first element.
  __device__ __forceinline__ static int row() { return static_cast<int>(threadIdx.x) / 8; }
  __device__ __forceinline__ static int column() {
    return static_cast<int>(threadIdx.x) % 8 * kChunkElements;
  }

  // The chunk's place in the tile; from pass to pass the swizzle stays.
  __device__ __forceinline__ static uint32_t destination(uint32_t tile, int pass) {
    return tile + swizzled_offset(row(), static_cast<int>(threadIdx.x) % 8) + pass * kRowsPerPass * kRowBytes;
  }
};

}  // namespace cce
