#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/visit_consumer_sm90.cuh"
#include "kernels/visit_loader_sm90.cuh"
#include "kernels/visit_scout_sm90.cuh"

// As visits_sm80.cuh, on Hopper's copy engine and wgmma, a whole vocab tile at a time. A scout takes items
// from the list, waits for their gates and finds their tokens, an item ahead of the others; three warps of
// loaders gather the rows of E that visit and have the copy engine fetch C's and the ring's; two warpgroups
// consume. dz never leaves the registers on its way to dE: there it is the first operand of wgmma.
namespace cce {

template <typename Element>
__global__ void __launch_bounds__(VisitsSm90::kThreads, 1)
    visits_sm90_kernel(const __grid_constant__ VisitsSm90Maps maps,
                       const __grid_constant__ VisitsArguments<Element> a) {
  // Setup
  extern __shared__ unsigned char memory[];
  constexpr uint32_t kAlignment = LogitsSm90Shared::kAlignment;
  const auto unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const uint32_t begin = (unaligned + kAlignment - 1) / kAlignment * kAlignment;
  static_assert(offsetof(VisitsSm90Shared<Element>, ring) == 0, "the ring's addresses count from there");
  auto& shared = *reinterpret_cast<VisitsSm90Shared<Element>*>(memory + (begin - unaligned));
  const Ring ring = {begin};
  const VisitSlots slots = {begin};
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < LogitsSm90::kStages; ++slot) {
      ptx::mbarrier_init(ring.full(slot), 1 + VisitsSm90::kLoaderThreads);
      ptx::mbarrier_init(ring.empty(slot), LogitsSm90::kConsumerWarps);
    }
    for (int slot = 0; slot < VisitsSm90::kSlots; ++slot) {
      ptx::mbarrier_init(slots.found(slot), kWarpLanes);
      ptx::mbarrier_init(slots.done(slot), LogitsSm90::kConsumerWarps + VisitsSm90::kLoaderThreads);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  // The same for all lanes of a warp, and the compiler is to know it.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
  if (warp >= VisitsSm90::kFirstLoaderWarp) {
    ptx::keep_registers<VisitsSm90::kProducerRegisters>();
    if (warp < VisitsSm90::kScoutWarp) {
      VisitLoader<Element>(maps, a, shared, ring).run();
    } else if (warp == VisitsSm90::kScoutWarp) {
      VisitScout<Element>(a, shared, slots).run();
    }
  } else {
    ptx::take_registers<VisitsSm90::kConsumerRegisters>();
    VisitConsumer<Element>(a, shared, ring).run();
  }
}

}  // namespace cce
