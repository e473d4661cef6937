#pragma once

#include "kernels/visit_plan.h"
#include "tile/block_scan.cuh"

namespace cce {

constexpr int kPlanThreads = 512;

// A block of the GPU, as plan_visit_items() takes it.
class PlanBlock {
 public:
  __device__ __forceinline__ explicit PlanBlock(unsigned long long* scan) : scan_(scan) {}

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return kPlanThreads; }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ uint32_t add(uint32_t* counter, uint32_t value) {
    return atomicAdd(counter, value);
  }
  __device__ __forceinline__ unsigned long long exclusive_sum(unsigned long long value,
                                                              unsigned long long& total) {
    return block_exclusive_sum<kPlanThreads>(value, scan_, total);
  }

 private:
  unsigned long long* scan_;
};

// One block.
static __global__ void __launch_bounds__(kPlanThreads, 1)
    visit_plan_kernel(const __grid_constant__ VisitPlanArguments a) {
  __shared__ VisitPlanShared shared;
  __shared__ unsigned long long scan[kPlanThreads / kWarpLanes];
  PlanBlock block(scan);
  plan_visit_items(block, a, shared);
}

}  // namespace cce
