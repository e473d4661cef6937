#include "kernels/lse_epilogue_sm90.cuh"
#include "kernels/quantize.cuh"
#include "launch/launch_forward_sm90.h"
#include "launch/launch_logits_sm90.cuh"

namespace cce {
namespace {

template <typename Element>
cudaError_t quantize(const LceForwardParams& p, cudaStream_t on) {
  const LossInputs& in = p.in;
  const QuantizeRowsArguments<Element> e = {rows_of_e<Element>(in),
                                            live_rows_of(p),
                                            static_cast<int>(in.d),
                                            static_cast<int>(p.scan.stride),
                                            static_cast<unsigned char*>(p.scan.e),
                                            p.scan.row_scale};
  quantize_rows_kernel<Element>
      <<<static_cast<unsigned>(ceil_div(in.n, kQuantizeWarps)), kQuantizeThreads, 0, on>>>(e);
  const QuantizeTilesArguments<Element> c = {rows_of_c<Element>(in, 0, in.v), static_cast<int>(in.d),
                                             static_cast<int>(p.scan.stride),
                                             static_cast<unsigned char*>(p.scan.c), p.scan.tile_scale};
  quantize_tiles_kernel<Element>
      <<<static_cast<unsigned>(ceil_div(in.v, kTileColumns)), kQuantizeThreads, 0, on>>>(c);
  return cudaGetLastError();
}

}  // namespace

LaunchError launch_scan_sm90(const LceForwardParams& p, const LceForwardPlan& plan, void* stream) {
  return dispatch_16bit(p.in.dtype, [&](auto element) {
    using Element = decltype(element);
    const cudaError_t error = quantize<Element>(p, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return cuda_error(error);
    LossInputs in = p.in;
    in.e = p.scan.e;
    in.c = p.scan.c;
    in.e_row_stride = in.c_row_stride = p.scan.stride;
    const ScanArguments<Element> arguments = {lse_arguments<Element>(p), p.scan.row_scale, p.scan.tile_scale};
    return launch_logits_sm90<Fp8, LseEpilogueSm90<Element, LseOf::kScan>>(
        in, 0, in.v, plan.logits, plan.logits.schedule(in.n, in.v), live_rows_of(p), p.scan.e, plan.blocks,
        arguments, stream);
  });
}

}  // namespace cce
