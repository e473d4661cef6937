"""The portable path on this CPU against dense torch: time in one interleaved run, and peak memory over the inputs.

    python bench/portable.py [--shape N,D,V] [--repeats 5] [--out FILE.json]

Time: median of the repeats, methods taking turns. Memory: growth of the peak resident set over one call, each in a
fresh process that holds the inputs already; gradients count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from inputs import Problem, lm
from inputs import statistics as input_statistics
from report import machine, save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cce_ext import linear_cross_entropy
from cce_ext.measure import interleaved_times, peak_memory

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dense": lambda e, c, t: F.cross_entropy(e @ c.T, t),
    "cce": lambda e, c, t: linear_cross_entropy(e, c, t, impl="cce"),
    "cce_exact": lambda e, c, t: linear_cross_entropy(e, c, t, impl="cce_exact"),
    "cce_threshold": lambda e, c, t: linear_cross_entropy(e, c, t, impl="cce_threshold"),
}
KINDS = ("loss-fw", "loss-fw-bw")


def run(method: str, kind: str, p: Problem) -> None:
    """One call. The forward is the training one, so that it leaves what the backward needs."""
    e, c = (x.detach().requires_grad_() for x in (p.e, p.c))
    loss = METHODS[method](e, c, p.targets)
    if kind == "loss-fw-bw":
        loss.backward()


def measure_time(p: Problem, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each (method, kind) call."""
    cases = {f"{m} {k}": (m, k) for k in KINDS for m in METHODS}
    calls = {name: partial(run, *case, p) for name, case in cases.items()}
    with tqdm(total=(repeats + 1) * len(calls), desc="time") as bar:
        times = interleaved_times(calls, "cpu", repeats, bar.update)
    return {case: times[name] for name, case in cases.items()}


def memory_child(method: str, kind: str, file: str) -> None:
    p = Problem(*torch.load(file))
    # Libraries load and threads start on the first call.
    run(method, kind, Problem(p.e[:8].clone(), p.c[:256].clone(), p.targets[:8] % 256))
    print(json.dumps(peak_memory(lambda: run(method, kind, p), "cpu")))


def measure_memory(p: Problem) -> dict[tuple[str, str], float]:
    """Peak MB over the inputs of each (method, kind) call."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/inputs.pt"
        torch.save((p.e, p.c, p.targets), file)
        for kind in KINDS:
            for method in tqdm(METHODS, desc=f"memory {kind}"):
                command = [sys.executable, __file__, "--child", method, kind, file]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peaks[method, kind] = float(json.loads(out))
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048,512,65536", help="N,D,V (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to save the figures as JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        memory_child(*args.child)
        return

    n, d, v = (int(x) for x in args.shape.split(","))
    p = lm(n, d, v, dtype=torch.float32, seed=args.seed)
    figures = input_statistics(p)
    print(f"N={n} D={d} V={v} fp32, lm inputs:", ", ".join(f"{k} {x:.3g}" for k, x in figures.items()))
    memory, times = measure_memory(p), measure_time(p, args.repeats)
    rows = []
    for kind in KINDS:
        base = statistics.median(times["dense", kind])
        for method in METHODS:
            ms = times[method, kind]
            rows.append(
                {
                    "method": method,
                    "kind": kind,
                    "runtime_ms": statistics.median(ms),
                    "runtime_min_ms": min(ms),
                    "runtime_max_ms": max(ms),
                    "x_dense": statistics.median(ms) / base,
                    "op_mem_mb": memory[method, kind],
                    "mem_x_dense": memory[method, kind] / memory["dense", kind],
                }
            )
    print(f"{'kind':<12}{'method':<15}{'ms':>8}{'min':>8}{'max':>8}{'x dense':>9}{'MB':>8}{'x dense':>9}")
    for r in rows:
        print(
            f"{r['kind']:<12}{r['method']:<15}{r['runtime_ms']:>8.0f}{r['runtime_min_ms']:>8.0f}"
            f"{r['runtime_max_ms']:>8.0f}{r['x_dense']:>9.3f}{r['op_mem_mb']:>8.0f}{r['mem_x_dense']:>9.3f}"
        )
    if args.out:
        save(args.out, machine("cpu") | {"shape": [n, d, v], "data": "lm", "data_statistics": figures}, rows)


if __name__ == "__main__":
    main()
