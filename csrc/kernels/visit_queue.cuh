#pragma once

#include <cstdint>

#include "kernels/visit_plan.h"
#include "kernels/visits_config.h"
#include "ptx/sync.cuh"

namespace cce {

// What a block that gave up waiting says.
struct VisitWait {
  int gave_up;     // 1: one did
  uint32_t index;  // of its item in the list
  VisitItem item;
  int gate;
  uint32_t pending;  // items of the gate that are not done
};

struct VisitQueueArguments {
  const VisitItem* items;
  VisitControl* control;
  uint32_t* pending;         // items of each gate that are not done
  int64_t wait_nanoseconds;  // after which a wait gives up, or -1: never
  VisitWait* gave_up;        // in the host's memory
};

// The list of items, from which blocks take one after the other. A block that took an item waits for items
// before it in the list alone, which running blocks hold: some block can always go on.
class VisitQueue {
 public:
  __device__ __forceinline__ VisitQueue(const VisitQueueArguments& a, VisitQueueShared& shared)
      : a_(a), shared_(shared) {}

  // Takes the next item and waits for the gates that it needs; false if there is none. All threads call this.
  // Thread 0's acquire and the barrier order what the whole block reads and writes afterwards.
  __device__ __forceinline__ bool take() {
    if (threadIdx.x == 0) {
      const uint32_t index = atomicAdd(&a_.control->taken, 1u);
      shared_.more = index < a_.control->items;
      if (shared_.more) {
        shared_.item = a_.items[index];
        for (const int gate : shared_.item.needs) {
          if (gate != kNoGate) wait_for(gate, index);
        }
      }
    }
    __syncthreads();
    return shared_.more;
  }

  __device__ __forceinline__ const VisitItem& item() const { return shared_.item; }

  // Ends the item that was taken. All threads call this: what they wrote is seen by whoever waits for its
  // gates.
  __device__ __forceinline__ void finish() {
    __syncthreads();
    if (threadIdx.x != 0) return;
    constexpr uint32_t kOneLess = ~0u;
    ptx::add_release(a_.pending + shared_.item.gate, kOneLess);
    const int second = second_gate(shared_.item);
    if (second != kNoGate) ptx::add_release(a_.pending + second, kOneLess);
  }

 private:
  __device__ __forceinline__ void wait_for(int gate, uint32_t index) {
    const bool limited = a_.wait_nanoseconds >= 0;
    const uint64_t begin = limited ? ptx::global_nanoseconds() : 0;
    while (const uint32_t pending = ptx::load_acquire(a_.pending + gate)) {
      __nanosleep(100);
      if (limited && ptx::global_nanoseconds() - begin > static_cast<uint64_t>(a_.wait_nanoseconds)) {
        // Says what it waits for and stops the kernel.
        *a_.gave_up = {1, index, shared_.item, gate, pending};
        __threadfence_system();
        ptx::trap();
      }
    }
  }

  const VisitQueueArguments& a_;
  VisitQueueShared& shared_;
};

}  // namespace cce
