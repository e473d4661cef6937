"""Every implementation of cce_ext on a GPU, forward and backward, at small odd shapes: for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.checks.sanitize

It calls the public function only, so that a new kernel is there as soon as the function uses it. Run it with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: in a cached block of PyTorch's a read past a tensor's end goes unnoticed.
--without-cublas leaves out what calls cuBLAS: of the exact and the threshold backward only bias's gradient is left,
which needs no product, and fp32 is left out. Two tools want it on Hopper (bench/README.md, "compute-sanitizer and
cuBLAS").
"""

from __future__ import annotations

import sys

import torch

from cce_ext import HAS_CUDA, linear_cross_entropy

from .. import arguments

# Tails in every dimension, and whole blocks: N, D, V. In the last three dE's sums are borrowed from dC, and most of the
# vocabulary is visited by nobody.
SHAPES = ((1, 8, 5), (128, 64, 512), (130, 72, 1001), (1, 8, 4097), (9, 72, 2049), (130, 200, 2000))
IMPLS = ("cce", "cce_exact", "cce_threshold")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> int:
    parser = arguments.parser("bench.checks.sanitize", __doc__)
    parser.add_argument("--without-cublas", action="store_true", help="for racecheck")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=IMPLS)
    args = parser.parse_args()
    without_cublas = args.without_cublas
    if not (HAS_CUDA and torch.cuda.is_available()):
        print("no CUDA device, or cce_ext was built without its CUDA kernels", file=sys.stderr)
        return 2
    calls = 0
    for n, d, v in SHAPES:
        for dtype in DTYPES[:2] if without_cublas else DTYPES:
            # Made on the CPU: initcheck then has nobody else's kernels to doubt.
            g = torch.Generator().manual_seed(0)
            e = torch.randn(n, d, generator=g).to(dtype).cuda().requires_grad_()
            c = (torch.randn(v, d, generator=g) / d**0.5).to(dtype).cuda().requires_grad_()
            bias = torch.randn(v, generator=g).to(dtype).cuda().requires_grad_()
            targets = torch.randint(0, v, (n,), generator=g)
            if v >= 12 * n:
                e = (40 * c.detach().cpu()[targets]).cuda().requires_grad_()
            if n > 1:
                targets[n // 2 :: 7] = -100
            for impl in args.impl:
                for softcap, b in ((None, None), (20.0, bias)):
                    # What requires no gradient is frozen, or the backward would compute its gradient all the same.
                    products = impl == "cce" or not without_cublas
                    x, y = (e, c) if products else (e.detach(), c.detach())
                    loss = linear_cross_entropy(x, y, targets.cuda(), b, softcap=softcap, reduction="sum", impl=impl)
                    wanted = [t for t in (x, y, b) if t is not None and t.requires_grad]
                    grads = torch.autograd.grad(loss, wanted) if wanted else ()
                    if not all(x.isfinite().all() for x in (loss, *grads)):
                        print(f"not finite: N={n} D={d} V={v} {dtype} {impl} softcap={softcap}", file=sys.stderr)
                        return 1
                    calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
