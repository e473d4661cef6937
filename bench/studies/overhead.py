"""Host time of one call on tensors so small that nothing else counts, beside F.cross_entropy(F.linear(..)).

python -m bench.studies.overhead [--device cpu|cuda] [--without-kernels] [--compiled] [--out FILE.json]

Forward without gradients, and forward + backward: microseconds, the median of the batches; on CUDA of enqueueing.
--without-kernels has the operators only allocate what they return: what is left is PyTorch's and this package's way to
a kernel and back. dense torch keeps its kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

from .. import arguments
from ..report import files, origin

N, D, V = 8, 16, 128
TILE_COLUMNS = 256


def microseconds(call: Callable[[], object]) -> float:
    # The GPU's queue has 1024 places: where it is full, a launch waits for the GPU.
    batches, calls = (150, 10) if torch.cuda.is_available() else (15, 100)
    for _ in range(100):
        call()
    times = []
    for _ in range(batches):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def without_kernels(device: str) -> torch.library.Library:
    """The operators' kernels on a device allocate and do nothing else, for as long as what is returned lives."""

    def forward(
        e: Tensor, c: Tensor, *others: Any, need_map: bool = True, stats: int = 0, **options: Any
    ) -> tuple[Tensor, ...]:
        tiles = (-(-len(c) // TILE_COLUMNS), len(e)) if need_map else (0, 0)
        nll, lse = (e.new_empty(len(e), dtype=torch.float32) for _ in range(2))
        rows = e.new_empty((4, len(e)) if stats else (0, 0), dtype=torch.float32)
        argmax = e.new_empty(len(e) if stats & 8 else 0, dtype=torch.int64)
        return nll, lse, e.new_empty(tiles, dtype=torch.int16), rows, argmax

    def backward(
        g_nll: Tensor, g_lse: Tensor, g_entropy: Tensor, e: Tensor, c: Tensor, *others: Any, **options: Any
    ) -> tuple[Tensor, ...]:
        return torch.empty_like(e), torch.empty_like(c), e.new_empty(0)

    def reduce(nll: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return nll.new_empty(()), nll.new_empty(())

    library = torch.library.Library("cce", "IMPL")
    for name, kernel in (("lce_forward", forward), ("lce_backward", backward), ("reduce_nll", reduce)):
        library.impl(name, kernel, device.upper(), allow_override=True)
    return library


def dense(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(e, c), t)


def main() -> None:
    parser = arguments.parser("bench.studies.overhead", __doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--without-kernels", action="store_true", help="have the operators allocate only")
    parser.add_argument("--compiled", action="store_true", help="torch.compile both as well")
    parser.add_argument("--commit", help="for the results file, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="where to save the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    # What CUDA's kernels serve: they leave fp32 to portable torch.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    e = torch.randn(N, D, dtype=dtype, device=args.device, requires_grad=True)
    c = torch.randn(V, D, dtype=dtype, device=args.device, requires_grad=True)
    t = torch.randint(0, V, (N,), device=args.device)
    losses: dict[str, Callable[..., Tensor]] = {
        "F.cross_entropy(F.linear)": dense,
        "cce": linear_cross_entropy,
        "cce_exact": lambda e, c, t: linear_cross_entropy(e, c, t, impl="cce_exact"),
        "cce, the operator": torch.ops.cce.linear_cross_entropy,
    }
    if args.compiled:
        losses["F.cross_entropy(F.linear), compiled"] = torch.compile(dense)
        losses["cce, compiled"] = torch.compile(lambda e, c, t: linear_cross_entropy(e, c, t))
    stand_ins = without_kernels(args.device) if args.without_kernels else None
    rows = []
    print(f"{'':<36}{'forward':>10}{'+ backward':>12}   us a call, N={N} D={D} V={V}, {dtype}, {args.device}")
    for name, loss in losses.items():
        with torch.no_grad():
            forward = microseconds(lambda loss=loss: loss(e, c, t))
        both = microseconds(lambda loss=loss: torch.autograd.grad(loss(e, c, t), (e, c)))
        rows.append({"method": name, "forward_us": forward, "forward_backward_us": both})
        print(f"{name:<36}{forward:>10.1f}{both:>12.1f}")
    del stand_ins
    if args.out:
        meta = {"shape": [N, D, V], "dtype": str(dtype), "kernels": not args.without_kernels}
        files.save(args.out, origin.machine(args.device, "bench.studies.overhead", args.commit) | meta, rows)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
