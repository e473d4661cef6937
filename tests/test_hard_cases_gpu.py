"""Hard cases of the bf16 and fp16 CUDA kernels, most of them about what nobody visits.

Release 0.1.0 lost gradients. Where V is at least 12 N and both e and c need their gradients, the sampled method keeps
dE's sums in the last rows of dC. The rows of a tile that nobody visited were written without waiting for the sums to be
read: parts of dE became 0, or the sums were left in dC, where they can be anything. 1300 tests missed it. Their labels,
and the rows that their tokens lie close to, were spread evenly over a vocabulary that was seldom large for its tokens,
so that some token visited every lending tile, or at least one of each chunk of work, and then the others wait with it.
Most asked for an eps of 2^-4, whose noise needs wide bounds. And an error was that of a whole gradient, in whose norm a
lost tail can disappear.

So here parts of the vocabulary are left out, tokens are sure of their labels, V lies around what the plans divide by,
eps is the default, what a call allocates is full of NaN, and errors are taken by vocab tile and by block of tokens. One
draw is held against the portable implementation in fp64 with the same seed and map, whose visits are the same, and the
mean of many against the exact gradient.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from support.problems import Problem, error, full_of_nan, oracle, peaked, upstream
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_cross_entropy, portable, reference
from cce_ext.options import Method, Options, resolve_method
from cce_ext.sampling import TILE_COLUMNS

pytestmark = pytest.mark.gpu

ops = torch.ops.cce
DEVICE = "cuda"
Upstream = tuple[Tensor, Tensor]  # the gradients of nll and lse
NAN, INF = float("nan"), float("inf")
TILE = TILE_COLUMNS
# What rounding dz and the result to 16 bits costs one block of a gradient, with room.
TOLERANCE = {dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}

each_impl = pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_threshold"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


# ---- Problems ----


def spread(n: int, v: int, dtype: torch.dtype, *, d: int = 64, **options) -> Problem:
    return peaked(n, d, v, dtype=dtype, device=DEVICE, **options)


def sure(n: int, v: int, dtype: torch.dtype, *, labels: Tensor | None = None, tokens=slice(None)) -> Problem:
    """The given tokens have p = 1 at their label but for 1e-6 or less; the others' softmax is nearly flat."""
    p = spread(n, v, torch.float32, d=128)
    targets = p.targets if labels is None else labels.to(DEVICE)
    e = 0.3 * torch.randn(n, 128, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    own = p.c[targets]
    own[:, 0] = 0.0  # what all rows have in common
    e[tokens] = (30.0 * own / own.square().sum(1, keepdim=True))[tokens]
    return replace(p, e=e, targets=targets).to(dtype)


def unseen(p: Problem, *stretches: slice) -> Problem:
    """The same with the logits of these rows of c lower by 64: too small a softmax for a visit. No label is there."""
    e, c = p.e.clone(), p.c.clone()
    e[:, -1], c[:, -1] = 8.0, 0.0
    seen = torch.ones(len(c), dtype=torch.bool, device=c.device)
    for rows in stretches:
        c[rows, -1] = -8.0
        seen[rows] = False
    others = seen.nonzero()[:, 0]
    counts = p.targets != p.ignore_index
    moved = torch.where(seen[p.targets.clamp(min=0)], p.targets, others[p.targets % len(others)])
    return replace(p, e=e, c=c, targets=moved.where(counts, p.targets))


# ---- Calls ----


def around(p: Problem) -> AbstractContextManager[None]:
    # In fp32 the operators are torch's own products, which refuse to run under deterministic algorithms.
    return nullcontext() if p.e.dtype == torch.float32 else full_of_nan()


def method_of(impl: str, dtype: torch.dtype, eps: float | str = "auto") -> Method:
    return resolve_method(Options(impl=impl, filter_eps=eps), dtype)


def seed_of(k: int) -> Tensor:
    return torch.tensor([k], device=DEVICE)


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    with around(p):
        return ops.lce_forward(p.e, p.c, p.bias, p.targets, None, ignore_index=p.ignore_index, softcap=p.softcap)[:3]


def arguments(p: Problem, outputs, method: Method, seed: int, ups: Upstream):
    seeds = seed_of(seed) if method.draws else None
    options = {"ignore_index": p.ignore_index, "softcap": p.softcap, "method": method.name, "eps": method.eps}
    return (*ups, None, p.e, p.c, p.bias, p.targets, *outputs, None, seeds), options


def backward(
    p: Problem, outputs, method: Method, seed: int = 1, *, ups: Upstream | None = None, need: str = "e c bias"
) -> list[Tensor]:
    """The gradients that are needed. Those that are not must be empty."""
    args, options = arguments(p, outputs, method, seed, upstream(p) if ups is None else ups)
    needs = [name in need.split() and x is not None for name, x in (("e", p.e), ("c", p.c), ("bias", p.bias))]
    with around(p):
        grads = ops.lce_backward(*args, **options, need_e=needs[0], need_c=needs[1], need_bias=needs[2])
    assert all(g.numel() == 0 for g, needed in zip(grads, needs, strict=True) if not needed)
    return [g for g, needed in zip(grads, needs, strict=True) if needed]


# ---- What is right ----


def pieces(p: Problem) -> list[slice]:
    """Tokens in pieces whose logits fit in fp64."""
    step = max(1, (1 << 26) // len(p.c))
    return [slice(i, i + step) for i in range(0, len(p.e), step)]


def exact_loss(p: Problem) -> tuple[Tensor, Tensor]:
    q = p.to(torch.float64)
    parts = [
        reference.forward(q.e[rows], q.c, q.bias, q.targets[rows], q.ignore_index, q.softcap) for rows in pieces(p)
    ]
    nll, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return nll, lse


def exact_gradients(p: Problem, ups: Upstream) -> list[Tensor]:
    """By dense torch in fp64."""
    parts = [oracle(replace(p, e=p.e[rows], targets=p.targets[rows]), *(g[rows] for g in ups))[2] for rows in pieces(p)]
    of_e, *others = zip(*parts, strict=True)
    return [torch.cat(of_e), *(sum(part) for part in others)]


def twin_gradients(p: Problem, outputs, method: Method, seed: int, ups: Upstream) -> list[Tensor]:
    """By the portable implementation in fp64, with the same map and seed: it visits, or drops, the same."""
    args, options = arguments(p.to(torch.float64), outputs, method, seed, ups)
    return [g for g in ops.lce_backward_portable(*args, **options, need_bias=p.bias is not None) if g.numel()]


def visits_alone(p: Problem, outputs, method: Method, seed: int, ups: Upstream) -> list[Tensor]:
    """The same without the control variate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            portable, "remainders", lambda a, live, lse, share, *_: torch.zeros_like(share.log2_mass, dtype=a.dtype)
        )
        return twin_gradients(p, outputs, method, seed, ups)


def norms(x: Tensor, rows: int) -> Tensor:
    """Norms of blocks of so many rows."""
    x = x.double().reshape(len(x), -1)
    return F.pad(x, (0, 0, 0, -len(x) % rows)).unflatten(0, (-1, rows)).flatten(1).norm(dim=1)


def assert_close(
    p: Problem,
    got: list[Tensor],
    expected: list[Tensor],
    tolerance: float | None = None,
    note: str = "",
    parts: list[Tensor] | None = None,
) -> None:
    """dE by blocks of 64 tokens, as it is rounded, dC and dbias by vocab tile. NaN is never close.

    parts: what the expected gradients are without the control variate, which takes from the visits most of what they
    have in common: both are rounded before they meet.
    """
    tolerance = TOLERANCE[p.e.dtype] if tolerance is None else tolerance
    assert len(got) == len(expected)
    for k, (x, y) in enumerate(zip(got, expected, strict=True)):
        what = f"gradient {k} at N, D, V = {len(p.e)}, {p.e.shape[1]}, {len(p.c)} {note}"
        assert x.shape == y.shape and x.dtype == p.e.dtype, what
        assert x.isfinite().all(), f"{what}: {(~x.isfinite()).sum()} elements are not finite"
        rows = 64 if k == 0 else TILE
        own, off = norms(y, rows), norms(x.double() - y.double(), rows)
        if parts is not None:
            own = own + norms(parts[k], rows)
        # fp16 has steps of 2^-24 near 0.
        steps = 2.0**-24 * (rows * x[0].numel()) ** 0.5 if x.dtype == torch.float16 else 0.0
        excess = off - tolerance * own - steps - 1e-7 * own.max()
        at = int(excess.argmax())
        assert excess[at] <= 0, f"{what}: block {at} of {rows} rows is off by {off[at]:.3g}, its norm is {own[at]:.3g}"


def check(p: Problem, impl: str, *, eps: float | str = "auto", draws: int = 1) -> None:
    """Loss and gradients of one method against fp64: the exact ones, or for the others those of their visits."""
    method, ups = method_of(impl, p.e.dtype, eps), upstream(p)
    outputs = forward(p)
    for x, y in zip(outputs, exact_loss(p), strict=False):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-4)
    for seed in range(draws):
        got = backward(p, outputs, method, seed, ups=ups)
        exact = impl == "cce_exact"
        expected = exact_gradients(p, ups) if exact else twin_gradients(p, outputs, method, seed, ups)
        parts = visits_alone(p, outputs, method, seed, ups) if impl == "cce" else None
        assert_close(p, got, expected, note=f"seed {seed}", parts=parts)


def test_memory_is_full_of_nan():
    """What the other tests rely on."""
    with full_of_nan():
        fresh = [torch.zeros(3, device=DEVICE, dtype=dtype).new_empty(1000) for dtype in (torch.float32, torch.half)]
    assert all(x.isnan().all() for x in fresh)


# ---- What nobody visits ----

# Of 6000 rows, for 100 tokens: the tiles from 5632 on lend, and the last, from 5888 on, is a partial one.
STRETCHES = {
    "the last row": [slice(-1, None)],  # its tile is visited all the same
    "less than a tile": [slice(-37, None)],
    "the last, partial tile": [slice(5888, None)],
    "2N rows": [slice(-200, None)],  # as many as dE's sums take
    "2N rows and their tiles": [slice(5632, None)],  # no lending tile has a visit
    "more than 2N rows": [slice(-1000, None)],
    "all but the first tile": [slice(TILE, None)],
    "the head": [slice(0, 500)],
    "the middle": [slice(2000, 4000)],
    "head and tail": [slice(0, 300), slice(-300, None)],
    "all but one lending tile": [slice(0, 5632), slice(5888, None)],
}


@each_dtype
@each_impl
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "softcap": 20.0, "ignored": 0.2}], ids=["plain", "bias-softcap-ignored"]
)
@pytest.mark.parametrize("stretch", STRETCHES)
def test_an_unvisited_stretch(stretch, options, impl, dtype):
    """Stretches of the vocabulary that no token visits, at either end and between, with V far above 12 N."""
    check(unseen(spread(100, 6000, dtype, d=72, **options), *STRETCHES[stretch]), impl, draws=2)


@each_dtype
@each_impl
def test_a_tail_masked_by_its_bias(impl, dtype):
    """A vocabulary padded with rows that a bias of -inf takes out: their dC and dbias are 0, not what memory held."""
    p = spread(50, 5000, dtype, bias=True)
    p.bias[-400:] = -INF
    p.targets.clamp_(max=4599)
    check(p, impl)
    _, grad_c, grad_bias = backward(p, forward(p), method_of(impl, dtype))
    assert (grad_c[-400:] == 0).all() and (grad_bias[-400:] == 0).all()


@each_dtype
@pytest.mark.parametrize("eps", [0.5, 2.0**-4, 2.0**-14])
def test_an_unvisited_tail_at_other_eps(eps, dtype):
    """Hardly a visit but the labels', and many to whatever is not in the tail."""
    check(unseen(spread(100, 6000, dtype), slice(-400, None)), "cce", eps=eps, draws=2)


# ---- Tokens that are sure ----


@each_dtype
@each_impl
@pytest.mark.parametrize("tail", [False, True])
def test_one_confident_token_among_flat_ones(tail, impl, dtype):
    """The one's gradient is its label's alone; the others visit here and there."""
    p = sure(150, 5000, dtype, tokens=slice(70, 71))
    p = unseen(p, slice(-500, None)) if tail else p
    check(p, impl, draws=3)
    # By itself too: 63 others share its block.
    got = backward(p, forward(p), method_of(impl, dtype))[0][70]
    expected = exact_gradients(p, upstream(p))[0][70]
    assert error(got, expected) < 1e-2


@each_dtype
@each_impl
@pytest.mark.parametrize("n", [3, 150])
def test_all_tokens_confident(n, impl, dtype):
    """Only the labels' tiles are visited: with few tokens that leaves most tiles, lending ones too, without a visit."""
    check(sure(n, 5000, dtype), impl, draws=2)


# The first row, the rows and the vocabulary's size. Of 5000 rows the last tile has 136; of 5120 it is whole.
LABELS = {
    "in one tile": (1280, 256, 5000),
    "in the first tile": (0, 256, 5000),
    "in the last tile, a partial one": (4864, 136, 5000),
    "in the last tile, a whole one": (4864, 256, 5120),
    "the last row": (4999, 1, 5000),
    "the last row, alone in its tile": (4864, 1, 4865),
    "one row": (2000, 1, 5000),
    "in the first lending tile": (4608, 256, 5000),  # for 150 tokens
}


@each_dtype
@each_impl
@pytest.mark.parametrize("make", [sure, spread], ids=["confident", "peaked elsewhere"])
@pytest.mark.parametrize("where", LABELS)
def test_all_labels_in_one_place(where, make, impl, dtype):
    """One tile has a visit of every token. Confident tokens leave all others without any."""
    n, (first, rows, v) = 150, LABELS[where]
    labels = (first + torch.arange(n) % rows).to(DEVICE)
    p = sure(n, v, dtype, labels=labels) if make is sure else replace(spread(n, v, dtype), targets=labels)
    check(p, impl)


# ---- Sizes ----


def sizes_around(n: int) -> list[int]:
    """V next to what the plans divide by: 12 N (from there on dE's sums are lent room), vocab tiles, blocks of two."""
    near = [12 * n] + [-(-12 * n // width) * width + more for width in (TILE, 2 * TILE) for more in (0, width)]
    return sorted({v + k for v in near for k in (-1, 0, 1)})


@each_dtype
@each_impl
@pytest.mark.parametrize("n", [1, 2, 127, 129])
def test_vocabularies_around_every_threshold(n, impl, dtype):
    """One below, at and above each: plain, with the last 2 N rows unvisited, and with all of the tile they begin in.

    Of one token's vocabulary all tiles lend.
    """
    for v in sizes_around(n):
        p = spread(n, v, dtype, seed=v)
        for q in (p, *(unseen(p, slice(-tail, None)) for tail in (2 * n, 2 * n + TILE) if tail < v)):
            check(q, impl, draws=3 if n < 100 and impl == "cce" else 1)


@each_dtype
@each_impl
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("v", [4095, 4096, 4097, 4225])
def test_few_tokens_of_a_plain_problem(v, n, impl, dtype):
    """N = 1, V = 4097 gave a dC that was not finite: in 0.1.0 no special data were needed."""
    for seed in range(4):
        check(spread(n, v, dtype, seed=seed), impl, draws=2)


# N, V and the rows of the tail, at least 2 N, that nobody visits.
REPORTED = [
    (8, 1024, 200),
    (8, 151936, 300),
    (64, 32000, 200),
    (128, 128256, 256),  # Llama 3's reserved tokens
    (512, 50257, 1200),
    (2048, 32768, 4096),
    (2048, 151936, 8192),
    (4096, 131072, 8192),
]


@each_dtype
@pytest.mark.parametrize(
    ("shape", "impl"),
    [
        (shape, impl)
        for shape in REPORTED
        for impl in ("cce", "cce_exact", "cce_threshold")
        # The others know no borrowing: the smaller shapes will do.
        if impl == "cce" or shape[0] * shape[1] < 1 << 25
    ],
    ids=str,
)
def test_reported_losses(shape, impl, dtype):
    """Shapes of which users would have met the loss in training: a tail of reserved or padded tokens."""
    n, v, tail = shape
    check(unseen(spread(n, v, dtype), slice(-tail, None)), impl)


@each_dtype
@each_impl
@pytest.mark.parametrize("shape", REPORTED[:4], ids=str)
def test_reported_losses_as_a_user_meets_them(shape, impl, dtype):
    """The same by the function and autograd, whose draws are near enough to the exact gradient here."""
    n, v, tail = shape
    p = unseen(spread(n, v, dtype), slice(-tail, None)).leaves()
    torch.manual_seed(0)
    linear_cross_entropy(p.e, p.c, p.targets, reduction="sum", impl=impl).backward()
    ones = torch.ones(n, device=DEVICE)
    expected = exact_gradients(p, (ones, torch.zeros_like(ones)))
    for x, y in zip((p.e.grad, p.c.grad), expected, strict=True):
        assert x.isfinite().all() and error(x, y) < 0.2
    assert p.c.grad[-tail:].abs().max() <= 1e-6 * p.c.grad.abs().max()


def test_an_unvisited_tail_past_2_to_31():
    """Elements of C and of dC, and pairs of tokens and rows, that 32 bits cannot count; dE's sums lie there too."""
    n, d, v, tail = 2200, 2056, 1_050_000, 5000
    assert n * v > 2**31 and (v - tail) * d > 2**31 and v >= 12 * n and tail >= 2 * n
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    check_three_rows_a_token(n, d, v, tail)


def check_three_rows_a_token(n: int, d: int, v: int, tail: int) -> None:
    """The sampled gradient where a token's softmax is on three rows: one draw is nearly exact, and cheap to know."""
    g = torch.Generator(DEVICE).manual_seed(0)
    c = torch.empty(v, d, device=DEVICE, dtype=torch.bfloat16).normal_(0, d**-0.5, generator=g)
    c[:, -1] = 0.0
    c[v - tail :, -1] = -8.0
    near = torch.randint(0, v - tail, (n, 3), generator=g, device=DEVICE)
    near[n // 2 :] = torch.randint(v - tail - 400, v - tail, (n - n // 2, 3), generator=g, device=DEVICE)
    # Random rows have logits of 0 +- 1 or so with such a token, its own three 24: all of them together weigh 1e-4.
    e = (24.0 * c[near].sum(1, dtype=torch.float32)).bfloat16()
    e[:, -1] = 8.0
    p = Problem(e, c, near[:, 0].contiguous())
    outputs, ups = forward(p), upstream(p)
    grad_e, grad_c = backward(p, outputs, method_of("cce", torch.bfloat16), ups=ups)
    assert grad_e.isfinite().all() and all(x.isfinite().all() for x in grad_c.split(1 << 16))
    assert grad_c[v - tail :].abs().max() < 1e-15  # where labels share the tail's first tile: not quite 0

    some = torch.arange(0, n, max(1, n // 64), device=DEVICE)
    a, b = ups[0] + ups[1], ups[0]
    lse = torch.full((len(some),), -INF, device=DEVICE)
    for block in c.split(1 << 16):
        lse = torch.logaddexp(lse, (e[some].float() @ block.float().T).logsumexp(1))
    torch.testing.assert_close(outputs[1][some], lse, rtol=1e-5, atol=1e-3)
    expected = -b[some, None] * c[p.targets[some]].float()
    for block in c.split(1 << 16):
        softmax = (e[some].float() @ block.float().T - lse[:, None]).exp_()
        expected += a[some, None] * (softmax @ block.float())
    assert_close(replace(p, e=e[some]), [grad_e[some]], [expected], tolerance=2e-2)

    rows = torch.cat([near[some].flatten().unique(), torch.arange(v - tail - 400, v - tail, device=DEVICE)])
    dz = a[:, None] * (e.float() @ c[rows].float().T - outputs[1][:, None]).exp_()
    dz -= b[:, None] * (p.targets[:, None] == rows)
    assert_close(p, [grad_e, grad_c[rows]], [grad_e, dz.T @ e.float()], tolerance=2e-2)


# ---- The two ways of the sampled method ----


@each_dtype
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 4097), (2, 24), (8, 1024), (100, 6000), (129, 1547), (129, 1548), (500, 6000), (700, 30000)], ids=str
)
def test_gradients_together_and_one_by_one(shape, tail, dtype):
    """Alone dE has memory for its sums; with dC they are in it from V = 12 N on. The visits are the same."""
    n, v = shape
    p = spread(n, v, dtype, bias=True)
    p = unseen(p, slice(-2 * n, None)) if tail else p
    outputs, method = forward(p), method_of("cce", dtype)
    for seed in range(4):
        both = backward(p, outputs, method, seed)
        alone = [backward(p, outputs, method, seed, need=name)[0] for name in ("e", "c", "bias")]
        # dC and dbias are summed in a fixed order, dE in none.
        assert torch.equal(both[1], alone[1]) and torch.equal(both[2], alone[2])
        assert_close(p, both, alone, tolerance=2e-3)
        for x, y in zip(backward(p, outputs, method, seed, need="e c"), alone, strict=False):
            assert error(x, y) < 2e-3


@each_dtype
@pytest.mark.parametrize("case", ["a tail", "a masked middle", "one sure token", "sure tokens", "labels in a tile"])
def test_the_mean_of_many_draws(case, dtype):
    """Unbiased in each part of the vocabulary: the mean's distance from the exact gradient is its own noise."""
    p = {
        "a tail": lambda: unseen(spread(100, 6000, dtype), slice(-400, None)),
        "a masked middle": lambda: unseen(spread(100, 6000, dtype), slice(2000, 4000)),
        "one sure token": lambda: sure(100, 5000, dtype, tokens=slice(70, 71)),
        "sure tokens": lambda: sure(100, 5000, dtype),
        "labels in a tile": lambda: replace(
            spread(100, 6000, dtype), targets=1280 + torch.arange(100, device=DEVICE) % TILE
        ),
    }[case]()
    outputs, method, draws = forward(p), method_of("cce", dtype), 32
    stacks = zip(*(backward(p, outputs, method, seed) for seed in range(draws)), strict=True)
    n, v = len(p.e), len(p.c)
    parts = ([slice(0, n // 2), slice(n // 2, n)], [slice(0, v - 2 * n), slice(v - 2 * n, v)])
    for stack, exact, slices in zip(stacks, exact_gradients(p, upstream(p)), parts, strict=True):
        for rows in slices:
            x, y = torch.stack(stack)[:, rows].double().flatten(1), exact[rows].flatten()
            noise = (x.var(0).sum() / draws).sqrt()
            steps = 2.0**-24 * len(y) ** 0.5 if dtype == torch.float16 else 0.0
            assert noise <= 0.1 * y.norm() + steps + 1e-7 * exact.norm(), "so noisy that nothing would be tested"
            assert (x.mean(0) - y).norm() <= 4 * noise + TOLERANCE[dtype] * y.norm() + steps + 1e-7 * exact.norm()


# ---- What must not get in ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_impl
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("why", ["ignored", "no gradient"])
def test_the_e_of_tokens_that_do_not_count_gets_nowhere(why, value, softcap, impl, dtype):
    """Padding may hold anything: single tokens, a block of 128, and one element only. fp32 is the portable path.

    A token whose loss is weighed with 0 has a loss that is not finite, but no part in any gradient either.
    """
    clean = spread(300, 2000, dtype, bias=True, softcap=softcap)
    out = torch.tensor([0, 77, *range(128, 256), 299], device=DEVICE)
    others = torch.ones(300, dtype=torch.bool, device=DEVICE)
    others[out] = False
    clean.e[out] = 0.0
    if why == "ignored":
        clean.targets[out] = clean.ignore_index
    dirty = replace(clean, e=clean.e.clone())
    dirty.e[out] = value
    dirty.e[77] = clean.e[76]
    dirty.e[77, 3] = value
    method, ups = method_of(impl, dtype), tuple(g * others for g in upstream(clean))
    outputs, expected_outputs = forward(dirty), forward(clean)
    for x, y in zip(outputs[:2], expected_outputs, strict=False):
        assert why != "ignored" or (x[out] == 0).all()
        torch.testing.assert_close(x[others], y[others], rtol=1e-5, atol=1e-5)
    for need in ("e c bias", "e", "c", "bias"):
        got = backward(dirty, outputs, method, ups=ups, need=need)
        for x, y in zip(got, backward(clean, expected_outputs, method, ups=ups, need=need), strict=True):
            assert x.isfinite().all() and error(x, y) < 2e-3
        assert need.split()[0] != "e" or (got[0][out] == 0).all()
    if dtype != torch.float32:
        check(clean, impl)


@pytest.mark.parametrize("method", ["sampled", "exact", "threshold"])
@pytest.mark.parametrize("name", ["nll", "lse", "g_nll", "g_lse"])
def test_a_tensor_on_the_cpu_is_named(name, method):
    """A kernel that took the address for its own would fail later, and for all that the process still does."""
    assert_refused(name, method, f"{name} must be on e's device, cuda:0, but is float32 [3] on cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tile_map", "tile_map must be on e's device, cuda:0, but is int16 [1, 3] on cpu"),
        ("seed", "seed must be one int64 on e's device for the sampled method, but is int64 [1] on cpu"),
    ],
)
def test_what_the_sampled_method_reads_on_the_cpu_is_named(name, message):
    """What only this method reads."""
    assert_refused(name, "sampled", message)


def assert_refused(name: str, method: str, message: str) -> None:
    a = {x: torch.zeros(3, device="cuda:0") for x in ("g_nll", "g_lse", "nll", "lse")}
    a["tile_map"] = torch.zeros(1, 3, device="cuda:0").short()
    a["seed"] = torch.tensor([1], device="cuda:0")
    e, c = torch.zeros(3, 8, device="cuda:0").bfloat16(), torch.zeros(200, 8, device="cuda:0").bfloat16()
    targets = torch.zeros(3, device="cuda:0", dtype=torch.long)

    def call():
        ops.lce_backward(
            *(a["g_nll"], a["g_lse"], None, e, c, None, targets, a["nll"], a["lse"], a["tile_map"], None, a["seed"]),
            method=method,
            eps=2.0**-9,
        )

    call()
    a[name] = a[name].cpu()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()
    torch.cuda.synchronize()


# ---- What is empty, or hardly wanted ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_impl
@pytest.mark.parametrize("bias", [False, True])
def test_an_empty_vocabulary(bias, impl, dtype):
    """A shard without rows: no column, no label, lse = log 0. fp32 is the portable path, which says the same."""
    n, d = 5, 64
    e, c = torch.randn(n, d, device=DEVICE).to(dtype), torch.zeros(0, d, device=DEVICE, dtype=dtype)
    targets = torch.tensor([0, -100, 3, -100, 7], device=DEVICE)
    p = Problem(e, c, targets, c.new_zeros(0) if bias else None)
    nll, lse, tile_map = forward(p)
    counts = targets != -100
    assert (lse[counts] == -INF).all() and (lse[~counts] == 0).all()
    assert nll[counts].isnan().all() and (nll[~counts] == 0).all()
    assert tile_map.shape == (0, n)
    method = method_of(impl, dtype)
    args, options = arguments(p, (nll, lse, tile_map), method, 1, upstream(p))
    for need_e, need_c, need_bias in ((True, True, bias), (True, False, False), (False, True, False)):
        with around(p):
            grads = ops.lce_backward(*args, **options, need_e=need_e, need_c=need_c, need_bias=need_bias)
        assert not need_e or (grads[0].shape == (n, d) and (grads[0] == 0).all())
        assert not need_c or grads[1].shape == (0, d)
        assert not need_bias or grads[2].shape == (0,)
    torch.cuda.synchronize()


@each_dtype
@each_impl
@pytest.mark.parametrize("tail", [False, True])
def test_dbias_alone(tail, impl, dtype):
    """Nothing else is needed: no product has to be done, and still every row is written."""
    p = spread(100, 3000, dtype, bias=True)
    p = unseen(p, slice(-500, None)) if tail else p
    outputs, method = forward(p), method_of(impl, dtype)
    alone = backward(p, outputs, method, need="bias")[0]
    assert alone.isfinite().all() and error(alone, backward(p, outputs, method)[2]) < 1e-5
    if impl == "cce_exact":
        assert error(alone, exact_gradients(p, upstream(p))[2]) < TOLERANCE[dtype]
        q = replace(p, bias=p.bias.clone().requires_grad_())
        linear_cross_entropy(q.e, q.c, q.targets, q.bias, impl=impl, reduction="sum").backward()
        ones = torch.ones(len(p.e), device=DEVICE)
        assert error(q.bias.grad, exact_gradients(p, (ones, torch.zeros_like(ones)))[2]) < TOLERANCE[dtype]


@pytest.mark.skipif("CCE_KERNELS" in os.environ, reason="this is that run")
def test_all_of_this_on_the_kernels_of_older_gpus():
    """Hopper has kernels of its own for logits, so that nothing else here would run the other ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"CCE_KERNELS": "sm80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
