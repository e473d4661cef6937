"""How true log-probabilities and entropies are: the largest and the rms error against fp64 of the same inputs, in nats.

    python -m bench.studies.accuracy [--data lm saved:FILE] [--shape N,D,V] [--methods NAME ..] [--out FILE.json]

Beside linear_logprobs: dense torch, whose logits are rounded to the inputs' dtype; fp32_head, dense torch of the same
inputs in fp32; and the heads of other packages where they can be imported. fp64 is computed in blocks of tokens, and so
are the dense ones. --out is a results file, and a plot beside it. Runs on a CPU at small shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import arguments
from ..measure.errors import BLOCK_LOGITS, distances
from ..measure.rows import Row
from ..peers.method import LogProbs, Outputs, reason
from ..peers.methods import LOGPROBS, packages
from ..peers.plain import logits_of, logprobs_of
from ..problems import inputs, shapes
from ..problems.inputs import Problem
from ..problems.statistics import statistics
from ..report import files, origin
from ..report.plot import STYLES

DEFAULT_SHAPE = {"cuda": "trl", "cpu": "512,256,8192"}
DEFAULT_METHODS = ("cce", "fp32_head", "torch", "trl", "liger", "apple_cce")
# Those that hold logits, of which only so many fit.
DENSE = ("torch", "compiled_torch", "fp32_head")
OUTPUTS = ("logprobs", "entropy")
# What a user of each knows it by.
LABELS = {"cce": "linear_logprobs", "torch": "dense torch", "fp32_head": "an fp32 head", "trl": "TRL's kernel"}


def blocks(p: Problem) -> Iterator[slice]:
    """The tokens, as many at a time as BLOCK_LOGITS has room for."""
    size = max(1, BLOCK_LOGITS // len(p.c))
    for i in tqdm(range(0, len(p.e), size), desc="blocks", leave=False, disable=None):
        yield slice(i, i + size)


def exact(p: Problem, softcap: float | None) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies [N] in fp64."""
    c = p.c.double()
    found = [logprobs_of(logits_of(p.e[rows].double(), c, softcap), p.targets[rows]) for rows in blocks(p)]
    return tuple(torch.cat(x) for x in zip(*found, strict=True))


def outputs_of(name: str, p: Problem, softcap: float | None) -> Outputs:
    """Those of a method of LOGPROBS, without a graph. Raises what it raises."""
    load = LOGPROBS[name].load
    assert load is not None
    function: LogProbs = load(softcap)
    if name not in DENSE:
        return function(p.e, p.c, p.targets)
    found = [function(p.e[rows], p.c, p.targets[rows]) for rows in blocks(p)]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
def measure(data: str, shape: shapes.Shape, p: Problem, methods: list[str], softcap: float | None) -> list[Row]:
    """A row a method: the largest and the rms error of each output, over the tokens that are not ignored."""
    true, live = exact(p, softcap), p.live()
    rows: list[Row] = []
    for name in tqdm(methods, desc=data, disable=None):
        row: Row = {"shape": shape.name, "n": shape.n, "d": shape.d, "v": shape.v, "data": data, "method": name}
        row |= {f"{of}_{figure}": None for of in OUTPUTS for figure in ("max", "rms")} | {"note": ""}
        rows.append(row)
        try:
            found = outputs_of(name, p, softcap)
        except Exception as error:
            row["note"] = reason(error)
            continue
        notes = [] if LOGPROBS[name].entropy else [LOGPROBS[name].note]
        for of, x, y in zip(OUTPUTS, found, true, strict=True):
            if x is None:
                continue
            if not x[live].isfinite().all():
                notes.append(f"WRONG: {of} is not finite")
                continue
            row[f"{of}_max"], row[f"{of}_rms"] = distances(x, y, live)
        row["note"] = "; ".join(notes)
    return rows


def table(rows: list[Row]) -> str:
    """In Markdown: a line a method and data; below it why what is missing is."""
    heads = ("inputs", "method", "log-probability: largest", "rms", "entropy: largest", "rms")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        figures = [row[f"{of}_{figure}"] for of in OUTPUTS for figure in ("max", "rms")]
        cells = [row["data"], label(row["method"]), *("–" if x is None else f"{x:.1e}" for x in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    notes = dict.fromkeys(f"{label(row['method'])}: {row['note']}" for row in rows if row["note"])
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def label(method: str) -> str:
    return LABELS.get(method, method)


def draw(meta: dict[str, Any], rows: list[Row], file: Path) -> None:
    """A panel an output and data: rms errors as dots, the largest ones as rings, a line a method."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["logprobs_rms"] is not None]
    if not rows:
        raise ValueError("no method has an error: there is nothing to draw")
    data = list(dict.fromkeys(row["data"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    figure = Figure(figsize=(8.4, len(data) * (0.33 * len(methods) + 0.9) + 0.5), layout="constrained")
    panels = figure.subplots(len(data), 2, squeeze=False, sharex=True, sharey=True)
    for line, kind in zip(panels, data, strict=True):
        for axes, of in zip(line, OUTPUTS, strict=True):
            for row in rows:
                if row["data"] != kind or row[f"{of}_rms"] is None:
                    continue
                at, color = methods.index(row["method"]), STYLES[row["method"]][0]
                axes.plot([row[f"{of}_rms"], row[f"{of}_max"]], [at, at], color=color, linewidth=1.0)
                axes.plot(row[f"{of}_rms"], at, "o", color=color, label="rms")
                axes.plot(row[f"{of}_max"], at, "o", color=color, markerfacecolor="white", label="largest")
            axes.set(xscale="log", ylim=(-0.6, len(methods) - 0.4))
            n, d, v = next((row["n"], row["d"], row["v"]) for row in rows if row["data"] == kind)
            name = "log-probability" if of == "logprobs" else of
            axes.set_title(f"{name}, {kind}, N={n} D={d} V={v}", fontsize=9)
            axes.set_yticks(range(len(methods)), [label(m) for m in methods], fontsize=8)
            axes.grid(alpha=0.3, linewidth=0.5)
    for axes in panels[-1]:
        axes.set_xlabel("error against fp64 (nats): dot rms, ring largest", fontsize=8)
    figure.suptitle(f"{meta['dtype']}, {meta['device']}, torch {meta['torch']}", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> int:
    parser = arguments.parser("bench.studies.accuracy", __doc__)
    parser.add_argument("--shape", type=shapes.argument, help="of lm and randn (default: trl on a GPU)")
    parser.add_argument("--data", nargs="+", default=["lm"], metavar="DATA", help="lm, randn, saved:FILE (default: lm)")
    parser.add_argument("--methods", nargs="+", choices=[m for m in LOGPROBS if m != "mm"], default=DEFAULT_METHODS)
    parser.add_argument("--softcap", type=arguments.positive_real)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="for the results file, where there is no git to ask")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to save the figures, and a plot as .png")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out: expected a .json file, got {str(args.out)!r}")
    # An fp32 head is one: no TF32.
    torch.set_float32_matmul_precision("highest")
    dtype, shape = getattr(torch, args.dtype), args.shape or shapes.parse(DEFAULT_SHAPE[args.device])
    rows: list[Row] = []
    figures = {}
    for data in dict.fromkeys(args.data):
        try:
            p = problem(data, shape, dtype, args)
        except (OSError, ValueError) as error:
            parser.error(f"--data: {error}")
        name, at = inputs.label(data), shapes.of(*p.e.shape, len(p.c))
        figures[f"{at.n},{at.d},{at.v} {name}"] = found = statistics(p.rows(p.live()))
        print(f"{at.name}: N={at.n} D={at.d} V={at.v} {args.dtype}, {name}: entropy {found['entropy']:.3g}")
        rows += measure(name, at, p, list(args.methods), args.softcap)
    print(f"\n{table(rows)}")
    meta = origin.machine(args.device, "bench.studies.accuracy", args.commit) | {
        "dtype": args.dtype,
        "softcap": args.softcap,
        "seed": args.seed,
        "packages": packages(),
        "data_statistics": figures,
    }
    if args.out is not None:
        files.save(args.out, meta, rows)
        draw(meta, rows, args.out.with_suffix(".png"))
        print(f"\nsaved {args.out}")
    return 1 if any(row["method"].startswith("cce") and row["note"] for row in rows) else 0


def problem(data: str, shape: shapes.Shape, dtype: torch.dtype, args: Any) -> Problem:
    """Raises OSError or ValueError for data that is none."""
    if data.startswith("saved:"):
        return inputs.saved(data.removeprefix("saved:"), dtype=dtype, device=args.device)
    if data not in inputs.KINDS:
        raise ValueError(f"expected {', '.join(inputs.KINDS)} or saved:FILE, got {data!r}")
    return inputs.make(data, *shape[1:], dtype=dtype, device=args.device, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
