#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/visits_sm90_config.h"

namespace cce {

// The barriers of the slots for items, by their shared addresses.
struct VisitSlots {
  uint32_t base;  // of a VisitsSm90Shared

  __device__ __forceinline__ uint32_t found(int slot) const {
    return base + offsetof(VisitsSm90Shared<uint16_t>, found) + slot * sizeof(uint64_t);
  }
  __device__ __forceinline__ uint32_t done(int slot) const {
    return base + offsetof(VisitsSm90Shared<uint16_t>, done) + slot * sizeof(uint64_t);
  }
};

struct VisitSlotPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == VisitsSm90::kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace cce
