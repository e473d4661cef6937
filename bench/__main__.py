"""Every implementation of a task that is installed, on the same inputs, in one interleaved run.

    python -m bench                                    a first look: one shape, all methods
    python -m bench --shape gemma2 llama3 gpt2         models' shapes (N, D, V): see below
    python -m bench --shape 4096,2048,65536 --softcap 30
    python -m bench --shape llama3 --vocab 32000 64000 128000
    python -m bench --shape llama3 --tokens 64..16384  from few tokens to many, doubled from each to the next
    python -m bench --shape llama3 --ignored 0.75 --spans   prompts, whose tokens are ignored, and the others alone
    python -m bench --shape llama3 --frozen c          the classifier requires no gradient: LoRA, RL
    python -m bench --shape 8,64,512 --host            what a call takes of the host's time as well
    python -m bench --data saved:FILE                  e, c and targets of a real model
    python -m bench --data lm saved:FILE --methods eps  both, and what the sampling eps costs and buys
    python -m bench --task logprobs --shape trl        log-probabilities and entropies: scoring, and both gradients
    python -m bench --task distill --shape trl         soft targets: the 64 most probable of a teacher's
    python -m bench plot FILE.. [--out FILE.png]       time against memory, cost against V and N
    python -m bench result FILE [--out FILE.png]       one run's time against memory, with gradient errors, for readers
    python -m bench eps FILE.. [--out FILE.md]         time against gradient error, dense PyTorch first

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
from typing import Any, NamedTuple

import torch

from . import arguments
from .arguments import positive, positive_real
from .measure import child
from .measure.rows import Row
from .measure.supervisor import measure
from .measure.worker import Job
from .peers.methods import EPS, GROUPS, OF_TASK, packages
from .problems import inputs, regimes, shapes
from .problems.inputs import Problem
from .problems.shapes import Shape
from .problems.tasks import TASKS
from .report import eps, files, origin, plot, result, tables

RESULTS = child.ROOT / "bench" / "results"
DEFAULT_SHAPE = {"cuda": "gemma2", "cpu": "1024,256,16384"}
DEFAULT_SHAPE_OF_TOKENS = {"cuda": "trl", "cpu": "1024,256,16384"}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


class Place(NamedTuple):
    """What one table is of. origin: what saved data says of itself."""

    data: str
    shape: Shape
    origin: dict[str, Any] | None = None


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[Place]]:
    """The options, and what to measure on."""
    names = ", ".join(f"{s.name} ({s.n}, {s.d}, {s.v})" for s in shapes.NAMED.values())
    parser = arguments.parser("bench", __doc__)
    words = "; ".join(f"{name} stands for {', '.join(members)}" for name, members in GROUPS.items())
    methods = "\n".join(f"methods of {task}: {', '.join(table)}" for task, table in OF_TASK.items())
    parser.epilog = f"shapes: {names}\n\n{methods}\n{words}, of the loss"
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--task",
        choices=TASKS,
        default="loss",
        help="the loss; log-probabilities and entropies; or soft targets (default: %(default)s)",
    )
    what.add_argument(
        "--shape",
        nargs="+",
        type=shapes.argument,
        metavar="SHAPE",
        help="names, or N,D,V (default: gemma2 on a GPU, trl where --task is not loss)",
    )
    what.add_argument(
        "--tokens",
        nargs="+",
        type=arguments.doubling,
        metavar="N",
        help="in place of the shape's N, one after another; A..B doubles A up to B",
    )
    what.add_argument(
        "--vocab", nargs="+", type=positive, metavar="V", help="in place of the shape's V, one after another"
    )
    what.add_argument(
        "--data",
        nargs="+",
        default=["lm"],
        metavar="DATA",
        help="lm, randn, uniform: each at every shape; saved:FILE at its own (default: lm)",
    )
    what.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="default: all that are not for this alone; mm is always there"
    )
    what.add_argument("--softcap", type=positive_real, help="logits become S * tanh(logits / S); Gemma 2 has 30")
    what.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32")
    what.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    what.add_argument(
        "--ignored",
        nargs="+",
        type=arguments.share,
        default=[0.0],
        metavar="F",
        help="the share of the tokens that is ignored, one after another; the others are measured alone as well",
    )
    what.add_argument(
        "--spans", action="store_true", help=f"ignored are prompts, of sequences of {regimes.SEQUENCE} tokens"
    )
    what.add_argument("--frozen", choices=regimes.SIDES, help="this side requires no gradient")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=positive, default=10, help="timed calls (default: %(default)s; 5 if > 100 ms)")
    how.add_argument("--warmup", type=positive, default=3, help="rounds before them (default: %(default)s)")
    how.add_argument("--host", action="store_true", help="measure the host's time of a call as well")
    how.add_argument("--seed", type=int, default=0, help="of the inputs, of what is ignored and of sampled gradients")
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
    table = OF_TASK[args.task]
    groups = GROUPS if args.task == "loss" else {}
    unknown = [m for m in args.methods or [] if m not in table and m not in groups]
    if unknown:
        parser.error(f"--methods: there is no {', '.join(unknown)}; there are {', '.join((*table, *groups))}")
    if args.methods:
        wanted = {m for given in args.methods for m in groups.get(given, (given,))}
        args.methods = [m for m in table if m == "mm" or m in wanted]
    else:
        args.methods = [m for m in table if not table[m].on_request]
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out: expected a .json file, got {str(args.out)!r}")

    return args, places(parser, args)


def places(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Place]:
    """Each kind of data at its shapes. Ends the program where the options do not go together."""
    data = list(dict.fromkeys(args.data))
    saved = [x for x in data if x.startswith("saved:")]
    unknown = [x for x in data if x not in inputs.KINDS and x not in saved]
    if unknown:
        parser.error(f"--data: expected {', '.join(inputs.KINDS)} or saved:FILE, got {unknown[0]!r}")
    if saved == data and (args.shape or args.tokens or args.vocab):
        parser.error("--shape, --tokens, --vocab: saved inputs have their own shape")
    if len({inputs.label(x) for x in saved}) < len(saved):
        parser.error("--data: two saved files of one name, by which the results could not tell them apart")
    args.ignored = list(dict.fromkeys(args.ignored))
    if args.spans and not any(args.ignored):
        parser.error("--spans: there is no --ignored, whose tokens these would be")
    if saved and any(args.ignored):
        parser.error("--ignored: saved inputs have their own")
    default = DEFAULT_SHAPE if args.task == "loss" else DEFAULT_SHAPE_OF_TOKENS
    given = args.shape or [shapes.parse(default[args.device])]
    tokens = [n for each in args.tokens or [] for n in each]
    swept = list(dict.fromkeys(x for s in given for x in shapes.sweep(s, tokens, args.vocab)))
    for share in filter(None, args.ignored):
        for s in swept:
            if not 0 < regimes.ignored_count(s.n, share) < s.n:
                parser.error(f"--ignored {share:g}: of N={s.n} tokens that is none or all")
    narrow = [s.name for s in swept if s.d <= inputs.TOPICS]
    if "lm" in data and narrow:
        parser.error(f"--shape {narrow[0]}: lm inputs need a hidden width above {inputs.TOPICS}; use --data randn")
    found = []
    for x in data:
        if x not in saved:
            found += [Place(x, s) for s in swept]
            continue
        try:
            p: Problem = inputs.saved(x.removeprefix("saved:"))
        except (OSError, ValueError) as error:
            parser.error(f"--data: {error}")
        found.append(Place(x, shapes.of(*p.e.shape, len(p.c)), p.origin))
    return found


def run(args: argparse.Namespace, todo: list[Place]) -> int:
    """Measures, prints and saves; 1 if a method of cce_ext's own failed."""
    start = time.monotonic()
    state = origin.gpu_state() if args.device == "cuda" else None
    meta = origin.machine(args.device, "bench", args.commit) | {
        "driver": state["driver_version"] if state else None,
        "clocks": {"before": state, "after": None} if state else None,
        "cuda": torch.version.cuda,
        "packages": packages(),
        "task": args.task,
        "dtype": args.dtype,
        "softcap": args.softcap,
        "seed": args.seed,
        "data_statistics": {},
        "data_origin": {inputs.label(place.data): place.origin for place in todo if place.origin is not None},
    }
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    out = args.out or RESULTS / f"bench_{args.device}_{stamp}.json"
    rows: list[Row] = []
    everything = [(place, share) for place in todo for share in args.ignored]
    for i, ((data, s, _), share) in enumerate(everything):
        label = inputs.label(data)
        left = args.time_limit - (time.monotonic() - start) if args.time_limit else math.inf
        job = Job(
            shape=tuple(s),
            data=data,
            dtype=args.dtype,
            device=args.device,
            methods=args.methods,
            softcap=args.softcap,
            seed=args.seed,
            repeats=args.repeats,
            warmup=args.warmup,
            seconds=left / (len(everything) - i) if args.time_limit else None,
            excluded={},
            ignored=share,
            spans=args.spans,
            frozen=args.frozen,
            host=args.host,
            task=args.task,
        )
        new, statistics = measure(job, left)
        for row in new:
            row["data"] = label
        rows += new
        figures = ", ".join(f"{k} {x:.3g}" for k, x in statistics.items())
        print(f"\n{s.name}: N={s.n} D={s.d} V={s.v} {args.dtype}, {label} inputs: {figures or 'none'}")
        for regime in dict.fromkeys(row["regime"] for row in new):
            here = [row for row in new if row["regime"] == regime]
            if regime:
                print(f"{regime}: N={here[0]['n']}")
            print(tables.table(here), flush=True)
        meta["data_statistics"][f"{s.n},{s.d},{s.v} {label}"] = statistics
        if state:
            meta["clocks"]["after"] = origin.gpu_state()
        files.save(out, meta, rows)
    if any(r["method"] in EPS and r["runtime_ms"] is not None for r in rows):
        print(f"\n{eps.tables(meta, rows)}")
    print(f"\nsaved {out}")
    ours = [r for r in rows if OF_TASK[args.task][r["method"]].ours]
    return 1 if any(r["note"].startswith("failed") or "WRONG" in r["note"] for r in ours) else 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["plot"]:
        return plot.main(argv[1:])
    if argv[:1] == ["result"]:
        return result.main(argv[1:])
    if argv[:1] == ["eps"]:
        return eps.main(argv[1:])
    return run(*parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
