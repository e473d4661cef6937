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
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import child, inputs, report, shapes
from .inputs import Problem
from .methods import METHODS, packages
from .report import Row
from .shapes import Shape
from .worker import TIME_LIMIT, Job, empty_rows

RESULTS = child.ROOT / "bench" / "results"
DEFAULT_SHAPE = {"cuda": "gemma2", "cpu": "1024,256,16384"}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
# Of a shape's time what its process plans with, and the seconds more after which it is ended: a call takes what it
# takes, and a compiler that hangs does not look at the clock.
SHARE = 0.9
GRACE_SECONDS = 20.0


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def positive_real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[Shape]]:
    """The options, and the shapes to measure."""
    names = ", ".join(f"{s.name} ({s.n}, {s.d}, {s.v})" for s in shapes.NAMED.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"shapes: {names}\n\nmethods: {', '.join(METHODS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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


def measure(job: Job, seconds_left: float) -> tuple[list[Row], dict[str, float]]:
    """Rows and input statistics of a shape, from workers: another one without the culprit where one comes to grief."""
    end = time.monotonic() + seconds_left
    while True:
        left = end - time.monotonic()
        limited = job.seconds is not None
        if limited and left <= 0:
            return not_measured(job, TIME_LIMIT), {}
        with tempfile.TemporaryDirectory() as folder:
            job_file, state_file = Path(folder, "job.json"), Path(folder, "state.json")
            seconds = SHARE * min(job.seconds, left) if job.seconds is not None else None
            job_file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, seconds=seconds))))
            timeout = None if seconds is None else min(left, seconds + GRACE_SECONDS)
            try:
                code = child.run("bench.worker", str(job_file), str(state_file), timeout=timeout).returncode
                ended = f"failed: its process ended with code {code}"
            except subprocess.TimeoutExpired:
                ended = "failed: it went on past the time limit"
            state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
        if state.get("done"):
            return state["rows"], state["statistics"]
        note = state.get("reason") or ended
        culprit = state.get("current")
        if culprit is None:
            return not_measured(job, note), {}
        print(f"{culprit}: {note}; again without it", file=sys.stderr)
        job = dataclasses.replace(job, excluded={**job.excluded, culprit: note})


def not_measured(job: Job, note: str) -> list[Row]:
    return [r for m in job.methods for r in empty_rows(Shape(*job.shape), job.data, m, job.excluded.get(m, note))]


def run(args: argparse.Namespace, todo: list[Shape]) -> int:
    """Measures, prints and saves; 1 if a method of cce_ext's own failed."""
    start = time.monotonic()
    state = report.gpu_state() if args.device == "cuda" else None
    meta = report.machine(args.device, "bench", args.commit) | {
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
        print(report.table(new), flush=True)
        meta["data_statistics"][f"{s.n},{s.d},{s.v}"] = statistics
        if state:
            meta["clocks"]["after"] = report.gpu_state()
        report.save(out, meta, rows)
    print(f"\nsaved {out}")
    ours = [r for r in rows if METHODS[r["method"]].ours]
    return 1 if any(r["note"].startswith("failed") or "WRONG" in r["note"] for r in ours) else 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["plot"]:
        from . import plot

        return plot.main(argv[1:])
    return run(*parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
