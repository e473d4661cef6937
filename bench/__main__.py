"""Every implementation of the loss that is installed, on the same inputs, in one interleaved run.

    python -m bench                                    a first look: one shape, all methods
    python -m bench --shape gemma2 llama3 gpt2         models' shapes (N, D, V): see below
    python -m bench --shape 4096,2048,65536 --softcap 30
    python -m bench --shape llama3 --vocab 32000 64000 128000
    python -m bench --data saved:FILE                  e, c and targets of a real model
    python -m bench plot FILE.. [--out FILE.png]       time against memory, cost against V and N

Times are medians of CUDA events (or of the clock, on a CPU), with the methods taking turns; x mm is the ratio to the
plain product e @ c.T; memory is the peak over the inputs; gradient errors are against fp64. bench/README.md says how.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import arguments
from .arguments import positive, positive_real
from .measure import child
from .measure.rows import Row
from .measure.supervisor import measure
from .measure.worker import Job
from .peers.methods import METHODS, packages
from .problems import inputs, shapes
from .problems.inputs import Problem
from .problems.shapes import Shape
from .report import files, origin, plot, tables

RESULTS = child.ROOT / "bench" / "results"
DEFAULT_SHAPE = {"cuda": "gemma2", "cpu": "1024,256,16384"}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[Shape]]:
    """The options, and the shapes to measure."""
    names = ", ".join(f"{s.name} ({s.n}, {s.d}, {s.v})" for s in shapes.NAMED.values())
    parser = arguments.parser("bench", __doc__)
    parser.epilog = f"shapes: {names}\n\nmethods: {', '.join(METHODS)}"
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--shape", nargs="+", type=shapes.argument, metavar="SHAPE", help="names, or N,D,V (default: gemma2 on a GPU)"
    )
    what.add_argument(
        "--tokens", nargs="+", type=positive, metavar="N", help="in place of the shape's N, one after another"
    )
    what.add_argument(
        "--vocab", nargs="+", type=positive, metavar="V", help="in place of the shape's V, one after another"
    )
    what.add_argument("--data", default="lm", help="lm, randn, uniform or saved:FILE (default: %(default)s)")
    what.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all but cce_eps*; mm is always there")
    what.add_argument("--softcap", type=positive_real, help="logits become S * tanh(logits / S); Gemma 2 has 30")
    what.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    what.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=positive, default=10, help="timed calls (default: %(default)s; 5 if > 100 ms)")
    how.add_argument("--warmup", type=positive, default=3, help="rounds before them (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of the inputs and of sampled gradients")
    how.add_argument(
        "--time-limit", type=positive_real, metavar="SECONDS", help="for all of it; what is left out says so"
    )
    how.add_argument("--out", type=Path, metavar="FILE.json", help="default: a new file in bench/results")
    how.add_argument("--commit", help="for the results file, where there is no git to ask")
    args = parser.parse_args(argv)

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    args.dtype = args.dtype or DTYPES[args.device]
    unknown = [m for m in args.methods or [] if m not in METHODS]
    if unknown:
        parser.error(f"--methods: there is no {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if args.methods:
        args.methods = [m for m in METHODS if m == "mm" or m in args.methods]
    else:
        args.methods = [m for m in METHODS if not METHODS[m].on_request]
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out: expected a .json file, got {str(args.out)!r}")

    if args.data.startswith("saved:"):
        if args.shape or args.tokens or args.vocab:
            parser.error("--shape, --tokens, --vocab: saved inputs have their own shape")
        try:
            p: Problem = inputs.saved(args.data.removeprefix("saved:"))
        except (OSError, ValueError) as error:
            parser.error(f"--data: {error}")
        return args, [shapes.of(*p.e.shape, len(p.c))]
    if args.data not in inputs.KINDS:
        parser.error(f"--data: expected {', '.join(inputs.KINDS)} or saved:FILE, got {args.data!r}")
    given = args.shape or [shapes.parse(DEFAULT_SHAPE[args.device])]
    todo = list(dict.fromkeys(swept for s in given for swept in shapes.sweep(s, args.tokens, args.vocab)))
    narrow = [s.name for s in todo if s.d <= inputs.TOPICS]
    if args.data == "lm" and narrow:
        parser.error(f"--shape {narrow[0]}: lm inputs need a hidden width above {inputs.TOPICS}; use --data randn")
    return args, todo


def run(args: argparse.Namespace, todo: list[Shape]) -> int:
    """Measures, prints and saves; 1 if a method of cce_ext's own failed."""
    start = time.monotonic()
    state = origin.gpu_state() if args.device == "cuda" else None
    meta = origin.machine(args.device, "bench", args.commit) | {
        "driver": state["driver_version"] if state else None,
        "clocks": {"before": state, "after": None} if state else None,
        "cuda": torch.version.cuda,
        "packages": packages(),
        "dtype": args.dtype,
        "softcap": args.softcap,
        "seed": args.seed,
        "data_statistics": {},
    }
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    out = args.out or RESULTS / f"bench_{args.device}_{stamp}.json"
    rows: list[Row] = []
    # A saved file's own folder is nobody else's business, and no part of the result.
    label = "saved:" + Path(args.data.removeprefix("saved:")).name if args.data.startswith("saved:") else args.data
    for i, s in enumerate(todo):
        left = args.time_limit - (time.monotonic() - start) if args.time_limit else math.inf
        job = Job(
            shape=tuple(s),
            data=args.data,
            dtype=args.dtype,
            device=args.device,
            methods=args.methods,
            softcap=args.softcap,
            seed=args.seed,
            repeats=args.repeats,
            warmup=args.warmup,
            seconds=left / (len(todo) - i) if args.time_limit else None,
            excluded={},
        )
        new, statistics = measure(job, left)
        for row in new:
            row["data"] = label
        rows += new
        figures = ", ".join(f"{k} {x:.3g}" for k, x in statistics.items())
        print(f"\n{s.name}: N={s.n} D={s.d} V={s.v} {args.dtype}, {label} inputs: {figures or 'none'}")
        print(tables.table(new), flush=True)
        meta["data_statistics"][f"{s.n},{s.d},{s.v}"] = statistics
        if state:
            meta["clocks"]["after"] = origin.gpu_state()
        files.save(out, meta, rows)
    print(f"\nsaved {out}")
    ours = [r for r in rows if METHODS[r["method"]].ours]
    return 1 if any(r["note"].startswith("failed") or "WRONG" in r["note"] for r in ours) else 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["plot"]:
        return plot.main(argv[1:])
    return run(*parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
