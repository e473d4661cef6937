#include <cuda_runtime.h>

#include <cstdio>

#include "kernels/visits_sm80.cuh"
#include "launch/arguments.cuh"
#include "launch/launch.h"
#include "launch/launch_visits_sm90.h"
#include "launch/visit_sums.h"

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
      "the watchdog of CCE_DEBUG=1 stopped the visits: item %u (work %u, strip %d, part %u, gate %d) "
      "waits for gate %d, which %u items keep shut",
      report.index, static_cast<unsigned>(item.work), item.strip, static_cast<unsigned>(item.part), item.gate,
      report.gate, report.pending);
  return {"CUDA", text};
}

template <typename Element>
LaunchError launch_visits_sm80(const VisitsArguments<Element>& a, const VisitsPlan& plan,
                               cudaStream_t stream) {
  const auto kernel = visits_sm80_kernel<Element>;
  const cudaError_t error = allow_shared_memory(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return cuda_error(error);
  kernel<<<plan.blocks, kVisitThreads, plan.shared_bytes, stream>>>(a);
  return cuda_error(cudaGetLastError());
}

template <typename Element>
LaunchError launch(const LceBackwardParams& p, const VisitsScratch& scratch, const VisitsPlan& plan,
                   int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const VisitLayout& layout = plan.layout;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return cuda_error(error);

  VisitsArguments<Element> a;
  a.e = rows_of_e<Element>(p.in);
  a.c = rows_of_c<Element>(p.in, 0, p.in.v);
  a.bias = bias_from<Element>(p.in, 0);
  a.bias_stride = p.in.bias_stride;
  a.softcap = softcap_of(p.in);
  a.d = layout.d;
  a.stages = plan.stages;
  a.rows = static_cast<const GradientRow*>(p.rows);
  a.scores = static_cast<const TokenScore*>(p.scores);
  a.nll = p.nll;
  a.tile_map = static_cast<const uint16_t*>(scratch.tile_map);
  a.mask = static_cast<const uint32_t*>(scratch.mask);
  a.counts = static_cast<const uint32_t*>(scratch.counts);
  a.queue.items = static_cast<const VisitItem*>(scratch.items);
  a.queue.control = static_cast<VisitControl*>(p.control);
  a.queue.pending = static_cast<uint32_t*>(scratch.pending);
  // A graph that is captured cannot be waited for.
  auto capturing = cudaStreamCaptureStatusNone;
  const bool watched = plan.wait_milliseconds >= 0 && cudaStreamIsCapturing(on, &capturing) == cudaSuccess &&
                       capturing == cudaStreamCaptureStatusNone && watchdog_report() != nullptr;
  a.queue.wait_nanoseconds = watched ? plan.wait_milliseconds * 1000000 : -1;
  a.queue.gave_up = watched ? watchdog_report() : nullptr;
  if (watched) a.queue.gave_up->gave_up = 0;
  a.rate = visit_rate(scratch.eps, plan.tiles);
  a.layout = layout;
  a.mean = static_cast<const Element*>(scratch.mean);
  a.centroids = static_cast<Element*>(scratch.centroids);
  a.residual = visit_residual<Element>(p, scratch, layout);
  a.weights = static_cast<const Element*>(scratch.weights);
  a.residual_e = static_cast<const Element*>(scratch.residual_e);
  a.residual_sums = scratch.residual_sums;
  a.dz = layout.slices == 0 ? nullptr : static_cast<Element*>(scratch.dz);
  a.tokens = static_cast<int*>(scratch.tokens);
  a.corrections = scratch.corrections;
  a.sum_e = visit_sums<Element>(p, layout);
  a.grad_e = static_cast<Element*>(p.grad_e);
  a.grad_c = static_cast<Element*>(p.grad_c);
  a.grad_bias = static_cast<Element*>(p.grad_bias);
  const auto launch_kernel = [&]() -> LaunchError {
#if CCE_HAS_SM90
    if (plan.kernel == VisitsKernel::kSm90) return launch_visits_sm90<Element>(a, plan, stream);
#endif
    return launch_visits_sm80<Element>(a, plan, on);
  };
  const LaunchError failed = launch_kernel();
  return watched && !failed ? watch(*a.queue.gave_up, on) : failed;
}

}  // namespace

LaunchError launch_visits(const LceBackwardParams& p, const VisitsScratch& scratch, const VisitsPlan& plan,
                          int device, void* stream) {
  if (p.in.n == 0) return {};
  return dispatch_16bit(
      p.in.dtype, [&](auto element) { return launch<decltype(element)>(p, scratch, plan, device, stream); });
}

}  // namespace cce
