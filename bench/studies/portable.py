"""The portable path on this CPU against dense torch: time in one interleaved run, and peak memory over the inputs.

    python -m bench.studies.portable [--shape N,D,V] [--repeats 5] [--out FILE.json]

Time: median of the repeats, methods taking turns. Memory: growth of the peak resident set over one call, each in a
fresh process that holds the inputs already; gradients count.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from .. import arguments
from ..measure import memory
from ..measure.timing import Times, interleave
from ..peers.method import make_step
from ..peers.methods import METHODS
from ..problems.inputs import Problem, lm
from ..problems.statistics import statistics as input_statistics
from ..report import files, origin

# As the results call them: the method of peers/methods.py. fp32 logits need no cast, so that baseline is
# F.cross_entropy(e @ c.T, t).
COMPARED = {"dense": "baseline", "cce": "cce", "cce_exact": "cce_exact", "cce_threshold": "cce_threshold"}
KINDS = ("loss-fw", "loss-fw-bw")


def measure_time(p: Problem, repeats: int) -> dict[str, Times]:
    steps = {name: make_step(METHODS[method], p, None) for name, method in COMPARED.items()}
    with tqdm(total=(repeats + 1) * len(steps), desc="time") as bar:
        return interleave(steps, "cpu", repeats, warmup=1, tick=bar.update)


def main() -> None:
    parser = arguments.parser("bench.studies.portable", __doc__)
    parser.add_argument("--shape", default="2048,512,65536", help="N,D,V (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to save the figures as JSON")
    args = parser.parse_args()

    n, d, v = (int(x) for x in args.shape.split(","))
    p = lm(n, d, v, dtype=torch.float32, seed=args.seed)
    figures = input_statistics(p)
    print(f"N={n} D={d} V={v} fp32, lm inputs:", ", ".join(f"{k} {x:.3g}" for k, x in figures.items()))
    peaks = {name: memory.peaks(METHODS[method], p, None) for name, method in tqdm(COMPARED.items(), desc="memory")}
    times = measure_time(p, args.repeats)
    rows = []
    for kind in KINDS:
        base = statistics.median(times["dense"].of(kind))
        for name in COMPARED:
            ms, mb, dense_mb = times[name].of(kind), peaks[name][kind], peaks["dense"][kind]
            rows.append(
                {
                    "method": name,
                    "kind": kind,
                    "runtime_ms": statistics.median(ms),
                    "runtime_min_ms": min(ms),
                    "runtime_max_ms": max(ms),
                    "x_dense": statistics.median(ms) / base,
                    "op_mem_mb": mb,
                    "mem_x_dense": mb / dense_mb if mb is not None and dense_mb else None,
                }
            )
    print(f"{'kind':<12}{'method':<15}{'ms':>8}{'min':>8}{'max':>8}{'x dense':>9}{'MB':>8}{'x dense':>9}")
    for r in rows:
        mb, ratio = ("-" if x is None else f"{x:.{k}f}" for x, k in ((r["op_mem_mb"], 0), (r["mem_x_dense"], 3)))
        print(
            f"{r['kind']:<12}{r['method']:<15}{r['runtime_ms']:>8.0f}{r['runtime_min_ms']:>8.0f}"
            f"{r['runtime_max_ms']:>8.0f}{r['x_dense']:>9.3f}{mb:>8}{ratio:>9}"
        )
    if args.out:
        inputs = {"shape": [n, d, v], "data": "lm", "data_statistics": figures}
        files.save(args.out, origin.machine("cpu", "bench.studies.portable") | inputs, rows)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
