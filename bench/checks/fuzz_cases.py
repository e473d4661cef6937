"""The fuzzer's cases: what is drawn, and the tensors of each."""

from __future__ import annotations

import json
import math
import random
import shlex
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext.sampling import TILE_COLUMNS

IGNORE = -100
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One configuration. What its tensors hold is drawn from seed, on the device. CHOICES has what there is."""

    n: int
    d: int
    v: int
    dtype: str = "bfloat16"
    impl: str = "cce"
    filter_eps: float | str = "auto"
    bias: bool = False
    needs: str = "ec"  # whose gradients are asked for: e's, c's, the bias's
    softcap: float | None = None
    ignored: str = "none"
    e_layout: str = "plain"
    c_layout: str = "plain"
    target_dtype: str = "int64"
    stride: int = 1  # of targets and bias
    reduction: str = "mean"
    shift: int = 0
    upstream: str = "equal"  # the tokens' weights: zeros is random with 0 for half of them
    lse: bool = False  # whether the log-sum-exp is differentiated as well
    softmax: str = "flat"
    labels: str = "spread"
    seed: int = 0

    @property
    def batch(self) -> int:
        """How many sequences the tokens are."""
        return 2 if self.n % 2 == 0 and self.n > 2 else 1

    def command(self, device: str) -> str:
        """What repeats this case, as a line of a shell."""
        return f"python -m bench.checks.fuzz --device {device} --case {shlex.quote(json.dumps(asdict(self)))}"


# What comes twice is drawn twice as often.
CHOICES = {
    "impl": ("cce", "cce", "cce_exact", "cce_threshold"),
    "bias": (False, False, True),
    "softcap": (None, None, 5.0, 30.0),
    "ignored": ("none", "none", "none", "few", "few", "most", "all but one", "all"),
    "e_layout": ("plain", "wide", "unaligned", "offset", "transposed", "expanded"),
    "c_layout": ("plain", "wide", "unaligned", "offset", "transposed"),
    "target_dtype": ("int64", "int32"),
    "stride": (1, 1, 2, 3),
    "reduction": ("mean", "mean", "sum", "none"),
    "shift": (0, 0, 0, 1),
    "upstream": ("equal", "random", "zeros"),
    "lse": (False, True),
    "softmax": ("uniform", "flat", "peaked", "one confident", "confident", "far head", "far middle", "far tail"),
    "labels": ("spread", "spread", "one tile", "last tile"),
}
DTYPES = {
    "cuda": ("bfloat16", "bfloat16", "float16", "float16", "float32"),
    "cpu": ("bfloat16", "float16", "float32", "float64"),
}
LOG2_EPS = {"cce": (-10, -2), "cce_threshold": (-14, -1)}
LARGEST = {"cuda": (3000, 600, 150_000), "cpu": (200, 600, 40_000)}  # N, D, V
LOGITS = {"cuda": 2e8, "cpu": 2e6}  # at most: fp64 holds several tensors of that size


def draw_case(seed: int, k: int, device: str) -> Case:
    """The k-th case of a seed."""
    r = random.Random(f"{device}/{seed}/{k}")
    n, d, v = draw_shape(r, device)
    options = {name: r.choice(values) for name, values in CHOICES.items()}
    if n == 1:
        options["shift"] = 0
    if options["impl"] in LOG2_EPS and r.random() < 0.75:
        options["filter_eps"] = 2.0 ** r.uniform(*LOG2_EPS[options["impl"]])
    sides = "ecb" if options["bias"] else "ec"
    needs = sides if r.random() < 0.6 else "".join(r.sample(sides, r.randint(1, len(sides))))
    return Case(n, d, v, dtype=r.choice(DTYPES[device]), needs=needs, seed=r.randrange(2**31), **options)


def draw_shape(r: random.Random, device: str) -> tuple[int, int, int]:
    """N, D, V: often beside what kernels divide by, and about V = 12 N, from where on dE's sums lie in dC."""

    def up_to(most: float) -> int:
        return int(math.exp(r.uniform(0, math.log(most + 0.99))))

    def near(multiple: int, most: int) -> int:
        return multiple * up_to(most / multiple) + r.choice((-1, 0, 1))

    most_n, most_d, most_v = LARGEST[device]
    n = r.choice((1, 2, 3, 31, 32, 33, 127, 128, 129)) if r.random() < 0.5 else up_to(most_n)
    small, about_12_n = r.choice((1, r.randint(1, 128))), 12 * n + r.choice((-1, 0, 1))
    v = r.choice((small, about_12_n, about_12_n, near(128, most_v), near(128, most_v), up_to(most_v)))
    d = r.choice((near(8, most_d), near(64, most_d), up_to(most_d)))
    return n, d, min(v, int(LOGITS[device]) // n)


# ---- a case's tensors ----


class Problem:
    """e [N, D], c [V, D], bias [V] and targets [N] as the function takes them, and labels: the targets after the shift.

    loss_weight, [N] or of a reduced loss one number, and g_lse, [N] or None, make the scalar that is differentiated;
    g_nll [N] and g_lse are what then flows into the operators.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.g = torch.Generator(device).manual_seed(case.seed)
        dtype = getattr(torch, case.dtype)
        c = self.normal(case.v, case.d) / case.d**0.5
        targets = self.draw_targets(case)
        e = self.draw_embeddings(case, c, targets)
        ignored = self.uniform(case.n) < {"none": 0.0, "few": 0.1, "most": 0.9}.get(case.ignored, 1.0)
        if case.ignored == "all but one":
            ignored[case.seed % case.n] = False
        targets[ignored] = IGNORE
        self.e, self.c = lay_out(e.to(dtype), case.e_layout), lay_out(c.to(dtype), case.c_layout)
        self.bias = spread_out(self.normal(case.v).to(dtype), case.stride, NAN) if case.bias else None
        # What lies between the targets is in no vocabulary.
        self.targets = spread_out(targets.to(getattr(torch, case.target_dtype)), case.stride, 2**30)
        self.labels = self.targets
        if case.shift:
            rows = self.targets.unflatten(0, (case.batch, -1))
            self.labels = F.pad(rows[:, case.shift :], (0, case.shift), value=IGNORE).flatten()
        self.draw_upstream(case, torch.promote_types(dtype, torch.float32))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g, device=self.g.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g, device=self.g.device)

    def draw_targets(self, case: Case) -> Tensor:
        """Of all columns, of one tile's, or of those of the last tile, which may be few."""
        last = (case.v - 1) // TILE_COLUMNS
        tile = {"one tile": case.seed % (last + 1), "last tile": last}.get(case.labels)
        first, end = (0, case.v) if tile is None else (tile * TILE_COLUMNS, min((tile + 1) * TILE_COLUMNS, case.v))
        return first + (self.uniform(case.n) * (end - first)).long().clamp(max=end - first - 1)

    def draw_embeddings(self, case: Case, c: Tensor, targets: Tensor) -> Tensor:
        """What gives the softmax its shape. Where a part of the vocabulary is far from everyone, c is changed too."""
        own = c[targets] / c[targets].square().sum(1, keepdim=True).clamp(min=0.5)  # makes the label's logit 1
        e = self.normal(case.n, case.d)
        if case.softmax == "uniform":
            e.zero_()
        elif case.softmax == "peaked":
            e = own * (4.0 * self.normal(case.n, 1) + 6.0) + 0.3 * e
            e[:, 0] *= 4.0
        elif case.softmax == "confident":
            e = 25.0 * own
        elif case.softmax == "one confident":
            e[case.n // 2] = 30.0 * own[case.n // 2]
        elif case.softmax.startswith("far"):
            part = max(1, case.v // 4)
            first = {"far head": 0, "far middle": (case.v - part) // 2, "far tail": case.v - part}[case.softmax]
            e[:, 0] = 4.0
            c[first : first + part, 0] -= 15.0
        return e

    def draw_upstream(self, case: Case, dtype: torch.dtype) -> None:
        weight, of_lse = torch.ones_like(self.labels, dtype=dtype), torch.full_like(self.labels, 0.3, dtype=dtype)
        if case.upstream != "equal":
            weight, of_lse = (self.uniform(case.n) + 0.5).to(dtype), 0.3 * self.normal(case.n).to(dtype)
        if case.upstream == "zeros":
            none = self.uniform(case.n) < 0.5
            weight[none], of_lse[none] = 0.0, 0.0
        self.g_lse = of_lse if case.lse else None
        self.loss_weight = self.g_nll = weight
        if case.reduction != "none":
            self.loss_weight = weight.sum() / case.n + 0.25
            divisor = (self.labels != IGNORE).sum() if case.reduction == "mean" else 1
            self.g_nll = (self.loss_weight / divisor).expand(case.n)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """x [rows, D] with other strides. What lies between the rows is NaN, so that it shows where it is read."""
    rows, d = x.shape
    if layout == "plain":
        return x
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "expanded":
        return x[:1].expand(rows, d)
    if layout == "offset":
        return x.new_full((rows * d + 1,), NAN)[1:].view(rows, d).copy_(x)
    # Rows of a wider tensor; those of "wide" begin at multiples of 16 bytes.
    first, width = (8, -(-d // 8) * 8 + 16) if layout == "wide" else (3, d + 5)
    return x.new_full((rows, width), NAN)[:, first : first + d].copy_(x)


def spread_out(x: Tensor, stride: int, between: float) -> Tensor:
    return x.new_full((len(x) * stride,), between)[::stride].copy_(x)
