"""What calls take back to back: milliseconds, joules and watts, beside the plain product.

    python -m bench.studies.energy [--shape llama3] [--calls mm cce kl_forward ..] [--seconds 3] [--out FILE.json]

A call is repeated for --seconds, the next one as soon as the last has ended, and the GPU's own counter of energy (NVML)
is read before and after. Calls come in the order of --calls, the product first, when the card is coolest. That is
another state than that of `python -m bench`, where each call has pauses around it and all take turns: figures of the
two are not to be mixed. A divergence's teacher has the student's shape. bf16, lm inputs. Needs a GPU.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from cce_ext import linear_cross_entropy, linear_kl, linear_logprobs

from .. import arguments
from ..measure.rows import Row
from ..peers import plain
from ..problems import shapes
from ..problems.inputs import Problem, lm
from ..report import files, origin

Call = Callable[[], object]


class EnergyCounter:
    """The millijoules that the GPU in use has taken since its driver was loaded.

    Raises OSError without NVML, RuntimeError where it does not tell: its energy counter came with Volta.
    """

    def __init__(self) -> None:
        self.nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self.device = ctypes.c_void_p()
        self._do("nvmlInit_v2")
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        self._do("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self.device))

    def _do(self, function: str, *args: object) -> None:
        if status := getattr(self.nvml, function)(*args):
            raise RuntimeError(f"{function} failed with NVML's error {status}")

    def millijoules(self) -> int:
        value = ctypes.c_ulonglong()
        self._do("nvmlDeviceGetTotalEnergyConsumption", self.device, ctypes.byref(value))
        return value.value


def calls(p: Problem) -> dict[str, Call]:
    """By name. Where nothing else is said, forward and backward, both gradients."""
    e, c = (x.detach().requires_grad_() for x in (p.e, p.c))
    teacher_e, teacher_c = p.e.roll(1, 0), p.c.roll(1, 0)
    logits: list[torch.Tensor] = []

    def product() -> None:
        if not logits:
            logits.append(p.e.new_empty(len(p.e), len(p.c)))
        torch.mm(p.e, p.c.T, out=logits[0])

    def trained(loss: Callable[[], torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(), (e, c))

    def scored(batch_invariant: bool) -> Call:
        return torch.no_grad()(lambda: linear_logprobs(p.e, p.c, p.targets, batch_invariant=batch_invariant))

    def divergence(kind: str) -> Call:
        return trained(lambda: linear_kl(e, c, teacher_e, teacher_c, kind=kind))

    dense = plain.baseline(None)
    return {
        "mm": product,
        "cce_forward": torch.no_grad()(lambda: linear_cross_entropy(p.e, p.c, p.targets)),
        "cce": trained(lambda: linear_cross_entropy(e, c, p.targets)),
        "cce_fp8": trained(lambda: linear_cross_entropy(e, c, p.targets, scan="fp8")),
        "cce_exact": trained(lambda: linear_cross_entropy(e, c, p.targets, impl="cce_exact")),
        "baseline": trained(lambda: dense(e, c, p.targets)),
        "score": scored(False),
        "score_batch_invariant": scored(True),
        "kl_forward": divergence("forward"),
        "kl_reverse": divergence("reverse"),
        "kl_jsd": divergence("jsd"),
    }


NAMES = ("mm", "cce_forward", "cce", "cce_fp8", "cce_exact", "baseline", "score", "score_batch_invariant")
NAMES += ("kl_forward", "kl_reverse", "kl_jsd")


def measure(call: Call, seconds: float, counter: EnergyCounter) -> dict[str, float]:
    """Of one call in a row of them, the median of three rows. The clocks settle in a row that is not counted."""

    def row(length: float) -> tuple[float, float]:
        torch.cuda.synchronize()
        before, start, count = counter.millijoules(), time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < length:
            call()
            torch.cuda.synchronize()
            count += 1
        took = time.perf_counter() - start
        return 1e3 * took / count, (counter.millijoules() - before) / 1e3 / count

    row(seconds / 4)
    rows = [row(seconds / 3) for _ in range(3)]
    ms, joules = (statistics.median(x) for x in zip(*rows, strict=True))
    return {"runtime_ms": ms, "joules": joules, "watts": 1e3 * joules / ms}


def of_shape(shape: shapes.Shape, names: list[str], seconds: float, counter: EnergyCounter) -> list[Row]:
    name, n, d, v = shape
    p = lm(n, d, v, dtype=torch.bfloat16, device="cuda")
    known = calls(p)
    rows: list[Row] = []
    for method in tqdm(dict.fromkeys(("mm", *names)), desc=name, leave=False):
        found = measure(known[method], seconds, counter)
        mm = rows[0] if rows else found
        ratios = {f"x_mm_{k}": found[k] / mm[k] for k in ("runtime_ms", "joules")}
        rows.append({"shape": name, "n": n, "d": d, "v": v, "method": method, **found, **ratios})
    return rows


def main() -> None:
    parser = arguments.parser("bench.studies.energy", __doc__)
    parser.add_argument("--shape", type=shapes.argument, nargs="+", default=[shapes.NAMED["llama3"]])
    parser.add_argument("--calls", choices=NAMES, nargs="+", default=list(NAMES), metavar="CALL", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=arguments.positive, default=3, help="how long each call is repeated")
    parser.add_argument("--commit", help="for the results file, where there is no git to ask")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the results file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    try:
        counter = EnergyCounter()
        counter.millijoules()
    except (OSError, RuntimeError) as error:
        parser.error(f"the GPU does not tell its energy: {error}")
    rows = [row for shape in args.shape for row in of_shape(shape, args.calls, args.seconds, counter)]
    print(f"{'shape':<10} {'call':<22} {'ms':>9} {'x mm':>6} {'J':>9} {'x mm':>6} {'W':>5}")
    for r in rows:
        print("{shape:<10} {method:<22} {runtime_ms:9.3f} {x_mm_runtime_ms:6.2f}".format(**r), end=" ")
        print("{joules:9.3f} {x_mm_joules:6.2f} {watts:5.0f}".format(**r))
    if args.out:
        files.save(args.out, origin.machine("cuda", "bench.studies.energy", args.commit), rows)


if __name__ == "__main__":
    main()
