"""The vocabulary-parallel loss against one GPU's, and what its collectives take of it.

    torchrun --nproc-per-node 2 -m bench.studies.distributed [--shape gemma2 8192,4096,262144] [--out FILE.json]
    python -m bench.studies.distributed predict FILE.json [--network GB/s]

Every rank computes the whole problem by itself (one_rank), its part of it (vocab_parallel), and that part's collectives
alone, of the same size (collectives) and of one element (latency), taking turns. A time is that of the slowest rank.
NCCL and bf16 on GPUs, gloo and fp32 on a CPU. predict prints the table of docs/distributed.md from a results file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from cce_ext import linear_cross_entropy, vocab_parallel
from cce_ext.distributed import VocabParallelOptions
from cce_ext.measure import phase_peaks

from .. import arguments
from ..measure.rows import Row
from ..measure.timing import KINDS, Times, interleave, spread
from ..peers.method import LossStep
from ..problems import shapes
from ..problems.inputs import Problem, lm
from ..report import files, origin

DEFAULT_SHAPES = {"cuda": ["gemma2", "8192,4096,262144"], "cpu": ["512,128,8192"]}
VOCABULARIES, RANKS = (256000, 1 << 20), (2, 8, 64, 1024)


class Together(LossStep):
    """A step that no rank begins before the others have ended theirs."""

    def release(self) -> None:
        super().release()
        dist.barrier()


class Collectives:
    """The loss's collectives, the forward's and the backward's, of n tokens of width d, on zeros."""

    def __init__(self, n: int, d: int, like: Tensor) -> None:
        self.group, self.ranks = dist.group.WORLD.group_name, dist.get_world_size()
        self.pairs = torch.zeros(2, n, device=like.device)
        self.gradient = torch.zeros(n, d, dtype=like.dtype, device=like.device)

    def forward(self) -> None:
        vocab_parallel.all_gather(self.pairs, self.ranks, self.group)

    def backward(self) -> None:
        vocab_parallel.all_reduce(self.gradient, self.group)

    def release(self) -> None:
        dist.barrier()


def measure(shape: shapes.Shape, device: str, repeats: int, warmup: int) -> list[Row]:
    """Raises ValueError if the ranks' loss is not that of one."""
    p = lm(*shape[1:], dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    # Two devices need not make the same numbers of one seed.
    for x in (p.e, p.c, p.targets):
        dist.broadcast(x, 0)
    options = VocabParallelOptions.from_vocab(shape.v)
    part = Problem(p.e, p.c[options.start : options.stop].clone(), p.targets)
    losses = {
        "one_rank": Together(linear_cross_entropy, p),
        "vocab_parallel": Together(lambda *x: linear_cross_entropy(*x, vocab_parallel_options=options), part),
    }
    memory, values = {}, {}
    for name, step in losses.items():
        step.forward(), step.backward()
        values[name] = step.loss.item()
        step.release()
        peaks = phase_peaks([step.forward, step.backward], device)
        step.release()
        memory[name] = None if peaks is None else max(peaks)
    if not math.isclose(*values.values(), rel_tol=1e-3):
        raise ValueError(f"{shape.name}: the losses differ: {values}")
    steps = {
        **losses,
        "collectives": Collectives(shape.n, shape.d, p.e),
        "latency": Collectives(1, 1, p.e),
    }
    with tqdm(total=(repeats + warmup) * len(steps), desc=shape.name, disable=dist.get_rank() != 0) as bar:
        times = interleave(steps, device, repeats, warmup, tick=bar.update)
    times = {name: slowest(t, device) for name, t in times.items()}

    rows = []
    one, ours, collectives = (
        spread(times[x].of("loss-fw-bw"))[0] for x in ("one_rank", "vocab_parallel", "collectives")
    )
    for name in steps:
        for kind in KINDS:
            ms, p20, p80 = spread(times[name].of(kind))
            whole = name == "vocab_parallel" and kind == "loss-fw-bw"
            rows.append(
                {
                    "shape": shape.name,
                    "n": shape.n,
                    "d": shape.d,
                    "v": shape.v,
                    "ranks": dist.get_world_size(),
                    "method": name,
                    "kind": kind,
                    "runtime_ms": ms,
                    "runtime_p20": p20,
                    "runtime_p80": p80,
                    "op_mem_mb": memory.get(name) if kind == "loss-fw-bw" else None,
                    "speed_up": one / ours if whole else None,
                    "communication": collectives / ours if whole else None,
                }
            )
    return rows


def slowest(times: Times, device: str) -> Times:
    """Of each repeat the times of the rank that took longest."""
    both = torch.tensor([times.forward, times.backward], device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return Times(*both.tolist())


# ---- prediction ----


@dataclasses.dataclass(frozen=True)
class Model:
    """Constants of one shape in a results file, in ms, bytes and bytes a ms. docs/distributed.md has the formulas."""

    n: int
    d: int
    fixed: float  # compute that does not depend on the rows a rank has
    row: float  # compute a row
    latency: dict[str, float]  # all-gather, all-reduce; of two ranks
    bandwidth: float

    @classmethod
    def fit(cls, rows: list[Row]) -> Model:
        """From the rows of one shape."""
        n, d, v, ranks = (rows[0][key] for key in ("n", "d", "v", "ranks"))
        ms = {(r["method"], r["kind"]): r["runtime_ms"] for r in rows}
        one, part = (ms[x, "loss-fw-bw"] for x in ("one_rank", "vocab_parallel"))
        cut = v - -(-v // ranks)
        row = (one - (part - ms["collectives", "loss-fw-bw"])) / cut
        steps = math.log2(ranks)
        return cls(
            n,
            d,
            fixed=one - row * v,
            row=row,
            latency={"all_gather": ms["latency", "loss-fw"] / steps, "all_reduce": ms["latency", "loss-bw"] / steps},
            bandwidth=all_reduce_bytes(n, d, ranks) / ms["collectives", "loss-bw"],
        )

    def predict(self, v: int, ranks: int, bandwidth: float) -> dict[str, Any]:
        rows, steps = -(-v // ranks), math.log2(ranks)
        compute = self.fixed + self.row * rows
        gather = self.latency["all_gather"] * steps + all_gather_bytes(self.n, ranks) / bandwidth
        reduce = self.latency["all_reduce"] * steps + all_reduce_bytes(self.n, self.d, ranks) / bandwidth
        total = compute + gather + reduce
        return {
            "v": v,
            "ranks": ranks,
            "one": self.fixed + self.row * v,
            "compute": compute,
            "gather": gather,
            "reduce": reduce,
            "total": total,
            "share": (gather + reduce) / total,
            "mb": memory_bytes(self.n, self.d, rows, ranks) / 2**20,
        }


def all_gather_bytes(n: int, ranks: int) -> float:
    """Sent by a rank: two fp32 a token to each of the others."""
    return 8.0 * n * (ranks - 1)


def all_reduce_bytes(n: int, d: int, ranks: int) -> float:
    """Sent by a rank in a ring: a bf16 gradient of e, reduced and then spread."""
    return 2.0 * n * d * 2 * (ranks - 1) / ranks


def memory_bytes(n: int, d: int, rows: int, ranks: int) -> float:
    """On a rank, in bf16: c and e with their gradients, and the most that is there beside them: docs/faq.md, "Memory".

    That is what the backward needs, or the gradient of e once more, which an all-reduce returns.
    """
    ring = 3.9e3 * n if n >= 5462 else 12.6e6 + 1.5e3 * n
    lent = rows >= 6 * (2 * n + n * rows / 256 / d)  # dE's sums and the residual masses lie in dC
    sums = 0.0 if lent else n * (4.0 * d + rows / 128)
    backward = ring + sums + n * (rows / 128 + rows / 500 + 8.0 * ranks) + d * rows / 60
    return 4.0 * d * (rows + n) + max(backward, 2.0 * n * d)


def predict(rows: list[Row], network: float | None, node: int) -> str:
    """The table of each shape in a results file. network: GB/s from a rank to one on another node."""
    lines = []
    for shape in dict.fromkeys(r["shape"] for r in rows):
        model = Model.fit([r for r in rows if r["shape"] == shape])
        lines += [
            f"{shape}: {model.fixed:.3g} ms + {1e6 * model.row:.3g} ms a million rows, "
            f"{1e-6 * model.bandwidth:.3g} GB/s",
            f"{'V':>8} {'ranks':>5} {'one rank':>9} {'compute':>8} {'all-gather':>10} {'all-reduce':>10}"
            f" {'total ms':>8} {'speed-up':>8} {'share':>6} {'MB a rank':>9}",
        ]
        for v in VOCABULARIES:
            for ranks in RANKS:
                p = model.predict(v, ranks, model.bandwidth if ranks <= node or network is None else 1e6 * network)
                lines.append(
                    f"{v:>8} {ranks:>5} {p['one']:>9.2f} {p['compute']:>8.2f} {p['gather']:>10.3f} {p['reduce']:>10.3f}"
                    f" {p['total']:>8.2f} {p['one'] / p['total']:>8.1f} {p['share']:>6.2f} {p['mb']:>9.0f}"
                )
    return "\n".join(lines)


# ---- the command line ----


def main_predict(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.distributed predict")
    parser.add_argument("file", type=Path, help="a results file of bench.studies.distributed")
    parser.add_argument("--network", type=float, metavar="GB/s", help="of a rank, past a node (default: as measured)")
    parser.add_argument("--node", type=int, default=8, help="ranks of a node (default: %(default)s)")
    args = parser.parse_args(argv)
    result = json.loads(args.file.read_text())
    if files.check(result) != "distributed":
        parser.error(f"{args.file}: not a results file of bench.studies.distributed")
    print(predict(result["rows"], args.network, args.node))


def main() -> None:
    if sys.argv[1:2] == ["predict"]:
        return main_predict(sys.argv[2:])
    parser = arguments.parser("bench.studies.distributed", __doc__)
    parser.add_argument("--shape", type=shapes.argument, nargs="+", help="names of bench/problems/shapes.py, or N,D,V")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--commit", help="for the results file, where there is no git to ask")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("run it by torchrun --nproc-per-node RANKS -m bench.studies.distributed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = args.shape or [shapes.parse(text) for text in DEFAULT_SHAPES[device]]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    ranks = dist.get_world_size()
    if ranks < 2:
        parser.error("--nproc-per-node: 2 ranks or more")
    rows = [row for shape in todo for row in measure(shape, device, args.repeats, args.warmup)]
    if dist.get_rank() == 0:
        print(table(rows))
        if args.out:
            meta = origin.machine(device, "bench.studies.distributed", args.commit) | {
                "backend": dist.get_backend(),
                "gpu": origin.gpu_state(),
            }
            meta["command"] = meta["command"].replace("python", f"torchrun --nproc-per-node {ranks}", 1)
            files.save(args.out, meta, rows)
            print(f"saved {args.out}")
    dist.destroy_process_group()


def table(rows: list[Row]) -> str:
    lines = [f"{'shape':<18} {'method':<15} {'forward':>8} {'backward':>8} {'both ms':>8} {'MB':>7}"]
    ms = {(r["shape"], r["method"], r["kind"]): r["runtime_ms"] for r in rows}
    for r in rows:
        if r["kind"] != "loss-fw-bw":
            continue
        times = " ".join(f"{ms[r['shape'], r['method'], kind]:>8.3f}" for kind in KINDS)
        mb = "-" if r["op_mem_mb"] is None else f"{r['op_mem_mb']:.0f}"
        more = "" if r["speed_up"] is None else f"  {r['speed_up']:.2f} x, {r['communication']:.1%} communication"
        lines.append(f"{r['shape']:<18} {r['method']:<15} {times} {mb:>7}{more}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
