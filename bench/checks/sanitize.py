"""Every implementation of cce_ext on a GPU, forward and backward, at small odd shapes: for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.checks.sanitize

It calls the public functions only, so that a new kernel is there as soon as they use it: the loss, that of several
labels a token, linear_logprobs and, on Hopper, the loss by the 8-bit scan. Run it with
PYTORCH_NO_CUDA_MEMORY_CACHING=1: in a cached block of PyTorch's a read past a tensor's end goes unnoticed.
--without-cublas leaves out what calls cuBLAS: of the exact and the threshold backward only bias's gradient is left,
which needs no product, and fp32 is left out. Two tools want it on Hopper (bench/README.md, "compute-sanitizer and
cuBLAS").
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from cce_ext import HAS_CUDA, linear_cross_entropy, linear_logprobs

from .. import arguments

# Tails in every dimension, and whole blocks: N, D, V. In the last three dE's sums are borrowed from dC, and most of the
# vocabulary is visited by nobody.
SHAPES = ((1, 8, 5), (128, 64, 512), (130, 72, 1001), (1, 8, 4097), (9, 72, 2049), (130, 200, 2000))
IMPLS = ("cce", "cce_exact", "cce_threshold")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUTPUTS = ("entropy", "is_top1", "log_sum_sq_probs", "mean_logits")


def results(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    of_tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    softcap: float | None,
    impl: str,
    scans: bool,
) -> Iterator[tuple[str, Tensor, tuple[Tensor, ...]]]:
    """What is called, a number to differentiate, and what else came out of it.

    of_tokens: targets [N], and temperatures [N]; targets [N, 3] and their weights.
    """
    targets, temperatures, several, weights = of_tokens
    options = {"softcap": softcap, "impl": impl}
    yield "loss", linear_cross_entropy(e, c, targets, bias, reduction="sum", **options), ()
    loss = linear_cross_entropy(e, c, several, bias, reduction="sum", target_weights=weights, **options)
    yield "target_weights", loss, ()
    out = linear_logprobs(e, c, targets, bias, temperature=temperatures, outputs=OUTPUTS, **options)
    assert out.entropy is not None
    # Each with a gradient of its own.
    yield (
        "linear_logprobs",
        (out.logprobs + 0.5 * out.lse + 0.25 * out.entropy).sum(),
        tuple(x for x in out if x is not None),
    )
    if scans and impl == "cce" and e.dtype != torch.float32:
        yield "scan", linear_cross_entropy(e, c, targets, bias, reduction="sum", scan="fp8", **options), ()


def main() -> int:
    parser = arguments.parser("bench.checks.sanitize", __doc__)
    parser.add_argument("--without-cublas", action="store_true", help="for racecheck")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, default=IMPLS)
    args = parser.parse_args()
    without_cublas = args.without_cublas
    if not (HAS_CUDA and torch.cuda.is_available()):
        print("no CUDA device, or cce_ext was built without its CUDA kernels", file=sys.stderr)
        return 2
    # CCE_KERNELS=sm80 holds Hopper's own kernels back, of which the scan is one.
    scans = torch.cuda.get_device_capability() == (9, 0) and os.environ.get("CCE_KERNELS") != "sm80"
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
            others = torch.randint(0, v, (n, 2), generator=g)
            others[::2, 0] = v - 1  # one label of half the tokens
            others[1::3, 1] = -100
            several = torch.cat([targets[:, None], others], 1)
            if n > 1:
                several[n // 2 :: 14] = -100
            per_token = (targets, torch.rand(n, generator=g) + 0.5, several, torch.rand(n, 3, generator=g) - 0.25)
            of_tokens = tuple(x.cuda() for x in per_token)
            for impl in args.impl:
                for softcap, b in ((None, None), (20.0, bias)):
                    # What requires no gradient is frozen, or the backward would compute its gradient all the same.
                    products = impl == "cce" or not without_cublas
                    x, y = (e, c) if products else (e.detach(), c.detach())
                    wanted = [t for t in (x, y, b) if t is not None and t.requires_grad]
                    for call, total, more in results(x, y, b, of_tokens, softcap, impl, scans):
                        grads = torch.autograd.grad(total, wanted) if wanted else ()
                        if not all(x.isfinite().all() for x in (total, *more, *grads)):
                            shape = f"N={n} D={d} V={v} {dtype}"
                            print(f"not finite: {call} {shape} {impl} softcap={softcap}", file=sys.stderr)
                            return 1
                        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
