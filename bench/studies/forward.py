"""The forward alone against the plain product, taking turns: for work on its kernel.

    python -m bench.studies.forward [--shape gemma2 llama3 gpt2] [--repeats 7] [--variant NAME] [--out FILE.json]

The ratio is of neighbours in one round, so that clocks which move with the power limit move for both. bf16, lm inputs,
training forward (with the tile map). Needs a GPU.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from cce_ext.ops import ops

from .. import arguments
from ..measure.timing import milliseconds
from ..problems import shapes
from ..problems.inputs import lm
from ..report import files, origin

DEFAULT_SHAPES = ("gemma2", "llama3", "qwen2.5", "mistral-nemo", "gpt2")


def measure(shape: shapes.Shape, repeats: int, variant: str) -> dict[str, object]:
    """A row of a ladder file: medians, and the ratio's median and range over the rounds."""
    name, n, d, v = shape
    p = lm(n, d, v, dtype=torch.bfloat16, device="cuda")
    logits = torch.empty(n, v, dtype=torch.bfloat16, device="cuda")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    calls = {
        "mm": lambda: torch.mm(p.e, p.c.T, out=logits),
        "cce": lambda: ops.lce_forward(p.e, p.c, None, p.targets, None),
    }
    for call in calls.values():
        call(), call()
    times: dict[str, list[float]] = {key: [] for key in calls}
    for round_ in tqdm(range(repeats), desc=name, leave=False):
        for key in random.Random(round_).sample(list(calls), len(calls)):
            times[key].append(milliseconds(calls[key], flush))
    ratios = [ours / mm for ours, mm in zip(times["cce"], times["mm"], strict=True)]
    mm, ours = statistics.median(times["mm"]), statistics.median(times["cce"])
    return {
        "variant": variant,
        "shape": name,
        "n": n,
        "d": d,
        "v": v,
        "mm_ms": mm,
        "runtime_ms": ours,
        "x_mm": ours / mm,
        "x_mm_min": min(ratios),
        "x_mm_max": max(ratios),
    }


def main() -> None:
    parser = arguments.parser("bench.studies.forward", __doc__)
    parser.add_argument("--shape", type=shapes.argument, nargs="+", default=[shapes.NAMED[s] for s in DEFAULT_SHAPES])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--variant", default="as built", help="what the rows are called")
    parser.add_argument("--commit", help="for the results file, where there is no git to ask")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the rows are added")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    rows = [measure(shape, args.repeats, args.variant) for shape in args.shape]
    for row in rows:
        print("{shape:<14} mm {mm_ms:.3f} ms, forward {runtime_ms:.3f} ms, x mm {x_mm:.3f}".format(**row), end="")
        print(" ({x_mm_min:.3f} to {x_mm_max:.3f})".format(**row))
    if args.out:
        earlier = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        files.save(args.out, origin.machine("cuda", "bench.studies.forward", args.commit), earlier + rows)


if __name__ == "__main__":
    main()
