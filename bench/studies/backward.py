"""Where a step's time goes: its kernels one after the other, and the backward's time by tile rank.

    python -m bench.studies.backward [--shape gemma2 llama3] [--eps 0.00390625] [--out FILE.json]
    python -m bench.studies.backward plot FILE.json [--out FILE.png]

The timeline is one step's, as PyTorch's profiler has it. For the ranks, vocab tiles are sorted by the visits they
expect, and the backward is timed with a map that leaves one group of ranks to visit, less the time with a map that
leaves none (which has the labels' visits and the whole of dC). lm inputs, bf16. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cce_ext import linear_cross_entropy
from cce_ext.options import DEFAULT_SAMPLING_EPS
from cce_ext.sampling import even_share, log2_visit_rate, tile_shares, visit_probabilities

from .. import arguments
from ..measure.rows import Row
from ..measure.timing import milliseconds
from ..problems import shapes
from ..problems.inputs import Problem, lm
from ..report import files, origin

# Ends of the groups of ranks: eight times as many tiles from group to group.
FIRST_GROUP, GROWTH = 4, 8

DEFAULT_SHAPES = ("gemma2", "llama3")


def timeline(p: Problem, eps: float) -> list[Row]:
    """Kernels of one step on the GPU: name, start, length and the gap before it, all in microseconds."""
    e, c = (x.detach().requires_grad_() for x in (p.e, p.c))

    def step() -> None:
        linear_cross_entropy(e, c, p.targets, filter_eps=eps).backward()
        e.grad = c.grad = None

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda._sleep(2_000_000)  # the host's lead
        step()
        torch.cuda.synchronize()
    events = sorted(
        (x for x in profile.events() if x.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda x: x.time_range.start,
    )
    events = [x for x in events if "spin_kernel" not in x.name]
    rows: list[Row] = []
    begin = end = events[0].time_range.start
    for x in events:
        start, length = x.time_range.start, x.time_range.elapsed_us()
        name = x.name.removeprefix("void ").split("(")[0].split("<")[0]
        rows.append({"kernel": name, "start_us": start - begin, "length_us": length, "gap_us": max(start - end, 0.0)})
        end = max(end, start + length)
    return rows


def by_rank(p: Problem, eps: float, repeats: int) -> list[Row]:
    """Visits a token and milliseconds of each group of vocab tiles, the most visited first."""
    seed = torch.ones(1, dtype=torch.int64, device="cuda")
    nll, lse, tile_map, *_ = torch.ops.cce.lce_forward(p.e, p.c, None, p.targets, seed, eps=eps)
    share = tile_shares(tile_map, nll)
    visits = visit_probabilities(share, log2_visit_rate(eps), even_share(eps, len(tile_map))).mean(1)
    order = visits.argsort(descending=True)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    gradient = torch.full_like(nll, 1 / len(nll))

    def time_of(kept: Tensor) -> float:
        some = torch.zeros_like(tile_map)  # no mass
        some[kept] = tile_map[kept]

        def backward() -> None:
            saved = (p.e, p.c, None, p.targets, nll, lse, some, None, seed)
            torch.ops.cce.lce_backward(gradient, None, None, *saved, eps=eps)

        backward()
        return statistics.median(milliseconds(backward, flush) for _ in range(repeats))

    none = time_of(order[:0])
    rows: list[Row] = [{"tiles": 0, "first_rank": 0, "visits": 1.0, "runtime_ms": none}]
    first, size = 0, FIRST_GROUP
    with tqdm(total=len(order), desc="tiles by rank", leave=False) as bar:
        while first < len(order):
            kept = order[first : first + size]
            rows.append(
                {
                    "tiles": len(kept),
                    "first_rank": first,
                    "visits": visits[kept].sum().item(),
                    "runtime_ms": time_of(kept) - none,
                }
            )
            bar.update(len(kept))
            first, size = first + len(kept), size * GROWTH
    rows.append({"tiles": len(order), "first_rank": 0, "visits": visits.sum().item(), "runtime_ms": time_of(order)})
    return rows


def print_rows(name: str, rows: list[Row]) -> None:
    print(f"\n{name}")
    columns = list(rows[0])
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = (f"{x:>12.2f}" if isinstance(x, float) else f"{x:>12}" for x in (row[k] for k in columns))
        print(" ".join(cells))


def save_plot(result: dict, file: Path) -> None:
    """For each shape, the share of the visits and of the time that each group of tiles has."""
    import matplotlib.pyplot as plt

    shapes_ = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    figure, axes = plt.subplots(1, len(shapes_), figsize=(4.5 * len(shapes_), 3.2), squeeze=False)
    for axis, shape in zip(axes[0], shapes_, strict=True):
        rows = [r for r in result["rows"] if r["shape"] == shape and "tiles" in r]
        groups = rows[1:-1]
        labels = [f"{r['first_rank'] + 1}–{r['first_rank'] + r['tiles']}" for r in groups]
        for offset, key, label in ((-0.2, "visits", "visits a token"), (0.2, "runtime_ms", "time")):
            total = sum(r[key] for r in groups)
            axis.bar([k + offset for k in range(len(groups))], [r[key] / total for r in groups], 0.4, label=label)
        axis.set_xticks(range(len(groups)), labels, rotation=20)
        axis.set_title(f"{shape}: {rows[-1]['visits']:.1f} visits a token, {rows[-1]['runtime_ms']:.2f} ms")
        axis.set_xlabel("vocab tiles by rank")
        axis.set_ylabel("share")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["plot"]:
        parser = argparse.ArgumentParser(prog="python -m bench.studies.backward plot")
        parser.add_argument("file", type=Path, help="a results file of bench.studies.backward")
        parser.add_argument("--out", type=Path, help="default: the file's name with .png")
        args = parser.parse_args(sys.argv[2:])
        result = json.loads(args.file.read_text())
        if files.check(result) != "backward":
            parser.error(f"{args.file}: not a results file of bench.studies.backward")
        save_plot(result, args.out or args.file.with_suffix(".png"))
        return
    parser = arguments.parser("bench.studies.backward", __doc__)
    parser.add_argument("--shape", type=shapes.argument, nargs="+", default=[shapes.NAMED[s] for s in DEFAULT_SHAPES])
    parser.add_argument("--eps", type=float, default=DEFAULT_SAMPLING_EPS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--commit", help="for the results file, where there is no git to ask")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")
    rows = []
    for shape in args.shape:
        p = lm(*shape[1:], dtype=torch.bfloat16, device="cuda")
        for name, part in (
            ("timeline", timeline(p, args.eps)),
            ("by tile rank", by_rank(p, args.eps, args.repeats)),
        ):
            print_rows(f"{shape.name}: {name}", part)
            rows += [{"shape": shape.name, **row} for row in part]
    if args.out:
        files.save(args.out, origin.machine("cuda", "bench.studies.backward", args.commit), rows)


if __name__ == "__main__":
    main()
