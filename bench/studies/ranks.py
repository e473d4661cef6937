"""What it costs that data-parallel ranks are seeded alike: their mean gradient's variance, simulated on one device.

python -m bench.studies.ranks [--device cpu|cuda] [--draws 64] [--out FILE.json]

Each rank has tokens of its own. Seeded alike, all draw their visits from the same seed, else each from another. The
figures are the mean over draws of the squared distance of the ranks' mean gradient from the exact one, alike over
apart, of c and of a shift of all e (what a bias before the classifier would have): 1 means that nothing is lost, the
number of ranks that all noise is shared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cce_ext import linear_cross_entropy

from .. import arguments
from ..problems import inputs
from ..report import files, origin

N, D, V = 128, 64, 16384
RANKS = (2, 4, 8)
DATA = ("lm", "randn", "uniform with a mean")


def problem(data: str, ranks: int, device: str) -> inputs.Problem:
    """Tokens of all ranks, one after the other; they have documents of their own."""
    if data == "lm":
        return inputs.lm(ranks * inputs.DOCUMENT, D, V, dtype=torch.float32, device=device)
    p = inputs.randn(ranks * N, D, V, dtype=torch.float32, device=device)
    if data == "randn":
        return p
    # Flat softmaxes of tokens that have much in common.
    e = torch.zeros_like(p.e)
    e[:, 0] = 1.0
    return inputs.Problem(e + 0.05 * p.e, p.c, p.targets)


def gradients(e: Tensor, c: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Of c, and of a shift of all e."""
    shift = torch.zeros_like(e[0]).requires_grad_()
    loss = linear_cross_entropy(e + shift, c, targets, **options)  # type: ignore[arg-type]
    d_c, d_shift = torch.autograd.grad(loss, (c, shift))
    return d_c, d_shift


def variances(p: inputs.Problem, ranks: int, draws: int, alike: bool, progress: tqdm) -> list[float]:
    """Of the ranks' mean gradients of c and of the shift."""
    c = p.c.requires_grad_()
    parts = [(e[:N], t[:N]) for e, t in zip(p.e.chunk(ranks), p.targets.chunk(ranks), strict=True)]
    exact = [gradients(e, c, t, impl="cce_exact") for e, t in parts]
    totals = [0.0, 0.0]
    for draw in range(draws):
        off = [torch.zeros_like(x) for x in exact[0]]
        for rank, (e, t) in enumerate(parts):
            seed = draw if alike else 1_000_003 * (rank + 1) + draw
            own = gradients(e, c, t, generator=torch.Generator(c.device).manual_seed(seed))
            for total, x, y in zip(off, own, exact[rank], strict=True):
                total += (x - y) / ranks
            progress.update()
        totals = [total + x.square().sum().item() / draws for total, x in zip(totals, off, strict=True)]
    return totals


def main() -> None:
    parser = arguments.parser("bench.studies.ranks", __doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--draws", type=arguments.positive, default=64, help="for each figure")
    parser.add_argument("--out", type=Path, help="where to save the figures as JSON")
    args = parser.parse_args()
    rows = []
    with tqdm(total=len(DATA) * sum(RANKS) * 2 * args.draws, unit="gradient", disable=None) as progress:
        for data in DATA:
            for ranks in RANKS:
                p = problem(data, ranks, args.device)
                alike, apart = (variances(p, ranks, args.draws, same, progress) for same in (True, False))
                of_c, of_shift = (x / y for x, y in zip(alike, apart, strict=True))
                rows.append({"data": data, "ranks": ranks, "c": of_c, "shift_of_e": of_shift})
    print(f"{'':<34}" + "".join(f"{ranks:>8}" for ranks in RANKS) + "   ranks")
    for data in DATA:
        for of in ("c", "shift_of_e"):
            figures = [row[of] for row in rows if row["data"] == data]
            print(f"{data + ', ' + of:<34}" + "".join(f"{figure:>8.2f}" for figure in figures))
    if args.out:
        files.save(args.out, origin.machine(args.device, "bench.studies.ranks") | {"shape": [N, D, V]}, rows)
        print(f"saved {args.out}")


if __name__ == "__main__":
    main()
