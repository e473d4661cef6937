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
// before it in the list alone, which running blocks hold and do in the list's order: some block can always go
// on. Of a block, one thread calls this; a barrier on its other side orders what the whole block reads and
// writes.
class VisitQueue {
 public:
  __device__ __forceinline__ explicit VisitQueue(const VisitQueueArguments& a) : a_(a) {}

  // Takes the next item and waits for the gates that it needs; false if there is none.
  __device__ __forceinline__ bool take(VisitItem& item) const {
    const uint32_t index = atomicAdd(&a_.control->taken, 1u);
    if (index >= a_.control->items) return false;
    item = a_.items[index];
    for (const int gate : item.needs) {
      if (gate != kNoGate) wait_for(gate, item, index);
    }
    return true;
  }

  // Ends an item: what was written is seen by whoever waits for its gates.
  __device__ __forceinline__ void finish(const VisitItem& item) const {
    constexpr uint32_t kOneLess = ~0u;
    ptx::add_release(a_.pending + item.gate, kOneLess);
    const int second = second_gate(item);
    if (second != kNoGate) ptx::add_release(a_.pending + second, kOneLess);
  }

 private:
  __device__ __forceinline__ void wait_for(int gate, const VisitItem& item, uint32_t index) const {
    const bool limited = a_.wait_nanoseconds >= 0;
    const uint64_t begin = limited ? ptx::global_nanoseconds() : 0;
    while (const uint32_t pending = ptx::load_acquire(a_.pending + gate)) {
      __nanosleep(100);
      if (limited && ptx::global_nanoseconds() - begin > static_cast<uint64_t>(a_.wait_nanoseconds)) {
        // Says what it waits for and stops the kernel.
        *a_.gave_up = {1, index, item, gate, pending};
        __threadfence_system();
        ptx::trap();
      }
    }
  }

  const VisitQueueArguments& a_;
};

}  // namespace cce
