#include <cuda_runtime.h>

#include "kernels/scan.cuh"
#include "kernels/visit_plan.h"
#include "launch/arguments.cuh"
#include "launch/launch.h"

namespace cce {

LaunchError launch_scan_correction(const LceForwardParams& p, const LceBackwardParams& visits,
                                   const VisitsScratch& scratch, const VisitsPlan& plan, int device,
                                   void* stream) {
  if (p.in.n == 0 || p.in.v == 0) return {};
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMemsetAsync(visits.control, 0, visits.zeroed_bytes, on);
  if (error != cudaSuccess) return cuda_error(error);
  const auto n = static_cast<int>(p.in.n);
  const ScanRowsArguments r = {p.lse,
                               targets_of(p.in),
                               p.in.ignore_index,
                               static_cast<GradientRow*>(visits.rows),
                               scratch.corrections,
                               n,
                               p.in.v};
  scan_rows_kernel<<<static_cast<unsigned>(ceil_div(n, kScanRowsThreads)), kScanRowsThreads, 0, on>>>(r);
  if (const LaunchError failed = launch_visits_search(visits, scratch, plan, device, stream)) return failed;
  if (const LaunchError failed = launch_visits(visits, scratch, plan, device, stream)) return failed;
  const ScanFinishArguments f = {r.rows,
                                 static_cast<const uint16_t*>(p.tile_map),
                                 scratch.corrections,
                                 p.label_logits,
                                 p.nll,
                                 p.lse,
                                 n,
                                 plan.tiles};
  scan_finish_kernel<<<static_cast<unsigned>(ceil_div(n, kScanFinishTokens)),
                       kScanFinishTokens * kScanFinishRuns, 0, on>>>(f);
  return cuda_error(cudaGetLastError());
}

}  // namespace cce
