#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/visit_mask.cuh"
#include "kernels/visit_plan.cuh"
#include "kernels/visits_sm80.cuh"
#include "launch/arguments.cuh"
#include "launch/launch.h"

namespace cce {

namespace {

// Where a block that gives up waiting says for what: memory that the host can read after the kernel has
// stopped. Allocated on first use and kept.
VisitWait* watchdog_report() {
  static VisitWait* const report = [] {
    void* memory = nullptr;
    const unsigned flags = cudaHostAllocPortable | cudaHostAllocMapped;
    const cudaError_t error = cudaHostAlloc(&memory, sizeof(VisitWait), flags);
    return error == cudaSuccess ? static_cast<VisitWait*>(memory) : nullptr;
  }();
  return report;
}

// Waits for the kernel; if it gave up waiting, says for what.
LaunchError watch(const VisitWait& report, cudaStream_t stream) {
  const cudaError_t error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess || report.gave_up == 0) return cuda_error(error);
  static thread_local char text[256];
  const VisitItem& item = report.item;
  std::snprintf(
      text, sizeof(text),
      "the watchdog of CCE_DEBUG=1 stopped the visits: item %u (work %u, tile %d, part %u, gate %d) "
      "waits for gate %d, which %u items keep shut",
      report.index, static_cast<unsigned>(item.work), item.tile, static_cast<unsigned>(item.part), item.gate,
      report.gate, report.pending);
  return {"CUDA", text};
}

// Finds the visits, plans the work and does it.
template <typename Element>
LaunchError launch_visits(const LceBackwardParams& p, const VisitsScratch& scratch, const VisitsPlan& plan,
                          int device, void* stream) {
  const auto visits = visits_sm80_kernel<Element>;
  const auto on = static_cast<cudaStream_t>(stream);
  auto* control = static_cast<VisitControl*>(p.control);
  const VisitLayout& layout = plan.layout;
  float* sum_e = p.sum_e;
  if (layout.borrows()) {
    sum_e = reinterpret_cast<float*>(static_cast<Element*>(p.grad_c) + layout.sums_begin);
  }
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = allow_shared_memory(visits, plan.shared_bytes);
  if (error == cudaSuccess) error = cudaMemsetAsync(scratch.counts, 0, layout.tiles * sizeof(uint32_t), on);
  if (error == cudaSuccess && p.grad_e != nullptr) {
    error = cudaMemsetAsync(sum_e, 0, p.in.n * p.in.d * sizeof(float), on);
  }
  if (error != cudaSuccess) return cuda_error(error);

  VisitMaskArguments m;
  m.rows = static_cast<const GradientRow*>(p.rows);
  m.nll = p.nll;
  m.tile_map = static_cast<const __nv_bfloat16*>(scratch.tile_map);
  m.seed = scratch.seed;
  m.log_rate = static_cast<float>(std::log(1.0 / scratch.eps - 1.0));
  m.n = layout.n;
  m.tiles = layout.tiles;
  m.mask = static_cast<uint32_t*>(scratch.mask);
  m.counts = static_cast<uint32_t*>(scratch.counts);
  // A block writes 4 KB of the mask: 2^31 blocks would be 8 TB of it.
  const int64_t mask_blocks = ceil_div(layout.n, kMaskTokens) * ceil_div(layout.tiles, kChainTiles);
  visit_mask_kernel<<<static_cast<unsigned>(mask_blocks), kMaskThreads, 0, on>>>(m);

  VisitPlanArguments s;
  s.layout = layout;
  s.counts = m.counts;
  s.control = control;
  s.order = static_cast<int*>(scratch.order);
  s.chunk_begins = static_cast<uint32_t*>(scratch.chunk_begins);
  s.pending = static_cast<uint32_t*>(scratch.pending);
  s.items = static_cast<VisitItem*>(scratch.items);
  visit_plan_kernel<<<1, kPlanThreads, 0, on>>>(s);

  VisitsArguments<Element> a;
  a.e = rows_of_e<Element>(p.in);
  a.c = rows_of_c<Element>(p.in, 0, p.in.v);
  a.bias = bias_from<Element>(p.in, 0);
  a.bias_stride = p.in.bias_stride;
  a.softcap = softcap_of(p.in);
  a.d = layout.d;
  a.stages = plan.stages;
  a.rows = m.rows;
  a.nll = p.nll;
  a.tile_map = m.tile_map;
  a.mask = m.mask;
  a.counts = m.counts;
  a.queue.items = s.items;
  a.queue.control = control;
  a.queue.pending = s.pending;
  a.log_rate = m.log_rate;
  // A graph that is captured cannot be waited for.
  auto capturing = cudaStreamCaptureStatusNone;
  const bool watched = plan.wait_milliseconds >= 0 && cudaStreamIsCapturing(on, &capturing) == cudaSuccess &&
                       capturing == cudaStreamCaptureStatusNone && watchdog_report() != nullptr;
  a.queue.wait_nanoseconds = watched ? plan.wait_milliseconds * 1000000 : -1;
  a.queue.gave_up = watched ? watchdog_report() : nullptr;
  if (watched) a.queue.gave_up->gave_up = 0;
  a.dz = layout.slices == 0 ? nullptr : static_cast<Element*>(scratch.dz);
  a.tokens = static_cast<int*>(scratch.tokens);
  a.sum_e = sum_e;
  a.grad_e = static_cast<Element*>(p.grad_e);
  a.grad_c = static_cast<Element*>(p.grad_c);
  a.grad_bias = static_cast<Element*>(p.grad_bias);
  visits<<<plan.blocks, kVisitThreads, plan.shared_bytes, on>>>(a);
  error = cudaGetLastError();
  return watched && error == cudaSuccess ? watch(*a.queue.gave_up, on) : cuda_error(error);
}

}  // namespace

LaunchError launch_visits_backward(const LceBackwardParams& p, const VisitsScratch& scratch,
                                   const VisitsPlan& plan, int device, void* stream) {
  if (p.in.n == 0) return {};
  return dispatch_16bit(p.in.dtype, [&](auto element) {
    return launch_visits<decltype(element)>(p, scratch, plan, device, stream);
  });
}

}  // namespace cce
