#include "ops/scan.h"

#include "ops/checks.h"
#include "ops/inputs.h"
#include "ops/workspace.h"

namespace cce {

using torch::stable::Tensor;

void correct_scan(const char* op, const LceForwardParams& params, const int64_t* seed, double eps,
                  const Tensor& e, const CudaScope& scope) {
  const LossInputs& in = params.in;
  VisitsPlan plan = plan_scan_visits(in, device_limits(op, e));
  plan.wait_milliseconds = watchdog_milliseconds();
  const VisitLayout& layout = plan.layout;
  const int64_t tiles = plan.tiles;
  constexpr int64_t word = Workspace::kWord;
  LceBackwardParams visits{};
  VisitsScratch scratch{};
  Workspace space;
  constexpr int64_t kRowWords = 4;
  space.add(visits.rows, in.n * kRowWords * word);
  const int64_t zeros = space.bytes();
  space.add(visits.control, static_cast<int64_t>(sizeof(VisitControl)));
  space.add(scratch.counts, tiles * word);
  visits.zeroed_bytes = space.bytes() - zeros;
  space.add(scratch.mask, tiles * plan.words * word);
  space.add(scratch.order, layout.strips * word);
  space.add(scratch.chunk_begins, 2 * (layout.max_chunks + 1) * word);
  space.add(scratch.pending, layout.max_gates() * word);
  space.add(scratch.items, layout.max_items * static_cast<int64_t>(sizeof(VisitItem)));
  // No row of an item is the mean token's, but those past its last point there.
  space.add(scratch.mean, in.d * Workspace::kElement);
  space.add(scratch.corrections, in.n * static_cast<int64_t>(sizeof(double)));
  const Tensor memory = space.allocate(e);
  visits.in = in;
  visits.nll = params.nll;
  visits.lse = params.lse;
  scratch.tile_map = params.tile_map;
  scratch.seed = seed;
  // The backward's visits must not be the same: an error of the log-sum-exp would go with them.
  constexpr int64_t kScanSalt = int64_t{0x5ca4} << 40;
  scratch.salt = kScanSalt;
  scratch.eps = eps;
  check_launch(op, launch_scan_correction(params, visits, scratch, plan, scope.device(), scope.stream()), e);
}

}  // namespace cce
