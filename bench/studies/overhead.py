"""Host time of one call on tensors so small that nothing else counts, beside F.cross_entropy(F.linear(..)).

python -m bench.studies.overhead [--device cpu|cuda] [--out FILE.json]

Forward without gradients, and forward + backward: microseconds, the median of the batches; on CUDA of enqueueing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

from .. import arguments
from ..report import files, origin

N, D, V = 8, 16, 128


def microseconds(call: Callable[[], object], batches: int = 15, calls: int = 100) -> float:
    for _ in range(calls):
        call()
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return statistics.median(times)


def main() -> None:
    parser = arguments.parser("bench.studies.overhead", __doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="where to save the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    e = torch.randn(N, D, device=args.device, requires_grad=True)
    c = torch.randn(V, D, device=args.device, requires_grad=True)
    t = torch.randint(0, V, (N,), device=args.device)
    losses: dict[str, Callable[[], Tensor]] = {
        "F.cross_entropy(F.linear)": lambda: F.cross_entropy(F.linear(e, c), t),
        "cce": lambda: linear_cross_entropy(e, c, t),
        "cce_exact": lambda: linear_cross_entropy(e, c, t, impl="cce_exact"),
        "cce, the operator": lambda: torch.ops.cce.linear_cross_entropy(e, c, t),
    }
    rows = []
    print(f"{'':<28}{'forward':>10}{'+ backward':>12}   us a call, N={N} D={D} V={V}, {args.device}")
    for name, loss in losses.items():
        with torch.no_grad():
            forward = microseconds(loss)
        both = microseconds(lambda loss=loss: torch.autograd.grad(loss(), (e, c)))
        rows.append({"method": name, "forward_us": forward, "forward_backward_us": both})
        print(f"{name:<28}{forward:>10.1f}{both:>12.1f}")
    if args.out:
        files.save(args.out, origin.machine(args.device, "bench.studies.overhead") | {"shape": [N, D, V]}, rows)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
