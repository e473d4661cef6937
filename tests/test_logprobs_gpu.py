"""The CUDA kernels of log-probabilities: scaled logits, statistics of the softmax, and the entropy's gradient.

Values against dense torch in fp64; exact gradients against its autograd; sampled ones against the portable
implementation in fp64 with the same map and seed, and in the mean against the exact gradient.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.graphs import captured
from support.problems import Problem, error, full_of_nan, peaked
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_logprobs, portable, reference
from cce_ext.sampling import TILE_COLUMNS

pytestmark = pytest.mark.gpu

ops = torch.ops.cce
DEVICE = "cuda"
ALL = 15
TOLERANCE = {dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPES = [
    (1, 8, 1),
    (1, 64, 257),
    (5, 64, 300),
    (130, 72, 1000),
    (257, 136, 20011),
    (1100, 64, 40000),
    (600, 520, 50257),
]
KINDS = {
    "plain": {},
    "bias-softcap-ignored": {"bias": True, "softcap": 20.0, "ignored": 0.2},
}
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))


def problem(n: int, d: int, v: int, dtype: torch.dtype, **options) -> Problem:
    p = peaked(n, d, v, dtype=dtype, device=DEVICE, **options)
    # What an ignored token holds reaches nobody.
    e = p.e.clone()
    e[p.targets == p.ignore_index] = float("nan")
    return replace(p, e=e)


def scales(n: int, seed: int = 0) -> Tensor:
    """From 0.1 to 10, but for logits of hundreds."""
    g = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(n, generator=g) * 4 - 3.3).to(DEVICE)


def ups_of(n: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of nll, lse and entropy; some tokens have those of the entropy alone, or of the others."""
    g = torch.Generator().manual_seed(seed)
    nll, lse, entropy = torch.randn(n, generator=g), 0.3 * torch.randn(n, generator=g), torch.randn(n, generator=g)
    kind = torch.arange(n) % 5
    entropy[kind == 0] = 0.0
    nll[kind == 1] = 0.0
    lse[kind == 1] = 0.0
    return nll.to(DEVICE), lse.to(DEVICE), entropy.to(DEVICE)


def forward(p: Problem, scale: Tensor | None, stats: int = ALL, **options):
    with full_of_nan():
        return ops.lce_forward(
            *(p.e, p.c, p.bias, p.targets, None),
            ignore_index=p.ignore_index,
            softcap=p.softcap,
            scale=scale,
            stats=stats,
            **options,
        )


def backward(op, p: Problem, outputs, ups, scale: Tensor | None, method: str, seed: int = 1, eps: float = 2.0**-6):
    nll, lse, tile_map, stats, _ = outputs
    return op(
        *(*ups, p.e, p.c, p.bias, p.targets, nll, lse, tile_map, stats[0]),
        torch.tensor([seed], device=DEVICE),
        ignore_index=p.ignore_index,
        softcap=p.softcap,
        method=method,
        eps=eps,
        scale=scale,
        need_bias=p.bias is not None,
    )


def dense(p: Problem, scale: Tensor | None):
    """nll, lse, stats and argmax in fp64, and the leaves."""
    q = p.to(torch.float64)
    q = replace(q, e=q.e.masked_fill((q.targets == q.ignore_index)[:, None], 0.0)).leaves()
    scale = None if scale is None else scale.double()
    return q, reference.with_statistics(q.e, q.c, q.bias, q.targets, q.ignore_index, q.softcap, scale, ALL)


def norms(x: Tensor, rows: int) -> Tensor:
    x = x.double().reshape(len(x), -1)
    return F.pad(x, (0, 0, 0, -len(x) % rows)).unflatten(0, (-1, rows)).flatten(1).norm(dim=1)


def assert_close(got, expected, dtype: torch.dtype, parts=None) -> None:
    """By blocks: dE of 64 tokens, dC and dbias by vocab tile. parts: of the expected ones, that are rounded alone."""
    for k, (x, y) in enumerate(zip([g for g in got if g.numel()], expected, strict=True)):
        assert x.shape == y.shape and x.dtype == dtype and x.isfinite().all()
        rows = 64 if k == 0 else TILE_COLUMNS
        own, off = norms(y, rows), norms(x.double() - y.double(), rows)
        if parts is not None:
            own = own + norms(parts[k], rows)
        steps = 2.0**-24 * (rows * x[0].numel()) ** 0.5 if dtype == torch.float16 else 0.0
        excess = off - TOLERANCE[dtype] * own - steps - 1e-6 * own.max()
        at = int(excess.argmax())
        assert excess[at] <= 0, f"gradient {k}: block {at} of {rows} is off by {off[at]:.3g}, its norm is {own[at]:.3g}"


@each_dtype
@each_kind
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, scaled, options, dtype):
    p = problem(*shape, dtype, **options)
    scale = scales(shape[0]) if scaled else None
    nll, lse, _, stats, argmax = forward(p, scale)
    _, (exact_nll, exact_lse, exact_stats, *_) = dense(p, scale)
    for name, x, y in (("nll", nll, exact_nll), ("lse", lse, exact_lse)):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    for k, name in enumerate(("entropy", "log_sum_sq_probs", "mean_logits", "max")):
        torch.testing.assert_close(
            stats[k].double(),
            exact_stats[k].detach(),
            rtol=2e-5,
            atol=3e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    # Logits that are all but equal may change places.
    counts = p.targets != p.ignore_index
    z = torch.nn.functional.linear(p.e.double(), p.c.double(), None if p.bias is None else p.bias.double())
    z = z if p.softcap is None else p.softcap * torch.tanh(z / p.softcap)
    at = z.gather(1, argmax[:, None])[:, 0]
    assert ((at - z.amax(1)).abs() <= 1e-4)[counts].all()
    assert (argmax[~counts] == 0).all()


@each_dtype
def test_what_is_not_asked_for_is_zero_and_the_rest_the_same(dtype):
    p, scale = problem(200, 64, 5000, dtype, ignored=0.3), scales(200)
    everything = forward(p, scale)
    for stats in range(ALL):
        out = forward(p, scale, stats)
        for x, y in zip(out[:3], everything[:3], strict=True):
            assert x.equal(y)
        if stats == 0:
            assert out[3].shape == (0, 0)
        for k in range(4 if stats else 0):
            assert out[3][k].equal(everything[3][k] if stats >> k & 1 else torch.zeros_like(out[3][k]))
        assert out[4].equal(everything[4]) if stats & 8 else out[4].numel() == 0


@each_dtype
def test_a_scale_of_one_is_none(dtype):
    p = problem(300, 64, 9000, dtype, bias=True)
    with_one, without = forward(p, torch.ones(300, device=DEVICE)), forward(p, None)
    for x, y in zip(with_one, without, strict=True):
        assert x.equal(y)
    # The kernels of the plain loss are others.
    for x, y in zip(forward(p, None, 0)[:2], without[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("n", [3, 700])
def test_the_first_of_equal_maxima(n, dtype):
    """In one tile, in the next, in another run of columns: logits that are bitwise the same."""
    v = 70000
    p = problem(n, 64, v, dtype)
    for places in ([5, 6], [200, 300], [255, 256], [1000, 69999], [7, 40000, 69000]):
        c = p.c.clone()
        c[places] = 100 * p.e[0].sign()
        argmax = forward(replace(p, e=p.e[:1].expand(n, -1).contiguous(), c=c), None)[4]
        assert (argmax == places[0]).all(), places


@each_dtype
def test_masked_columns_and_confident_tokens(dtype):
    p = problem(257, 64, 4000, dtype, bias=True)
    p.bias[::2] = float("-inf")
    p.bias[256:512] = float("-inf")
    targets = p.targets // 2 * 2 + 1
    targets = torch.where((targets >= 256) & (targets < 512), 1, targets)
    e = p.e.clone()
    e[::3] = (60.0 * p.c[targets].float() / p.c[targets].float().square().sum(1, keepdim=True)).to(dtype)[::3]
    p = replace(p, targets=targets, e=e)
    scale = scales(257)
    out = forward(p, scale)
    q, (_, _, exact, *_) = dense(p, scale)
    for k in (0, 1, 3):
        torch.testing.assert_close(out[3][k].double(), exact[k].detach(), rtol=2e-5, atol=3e-4)
    assert (out[3][2] == -float("inf")).all()
    ups = ups_of(257)
    objective = sum((x * g.double()).sum() for x, g in zip((*dense_outputs(q, scale),), ups, strict=True))
    expected = torch.autograd.grad(objective, q.inputs)
    assert_close(backward(ops.lce_backward, p, out, ups, scale, "exact"), expected, dtype)


def dense_outputs(q: Problem, scale: Tensor | None):
    scale = None if scale is None else scale.double()
    nll, lse, stats, *_ = reference.with_statistics(q.e, q.c, q.bias, q.targets, q.ignore_index, q.softcap, scale, 1)
    return nll, lse, stats[0]


@each_dtype
@each_kind
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_gradients(shape, scaled, options, dtype):
    p = problem(*shape, dtype, **options)
    scale = scales(shape[0]) if scaled else None
    out, ups = forward(p, scale), ups_of(shape[0])
    q, _ = dense(p, scale)
    objective = sum((x * g.double()).sum() for x, g in zip(dense_outputs(q, scale), ups, strict=True))
    expected = torch.autograd.grad(objective, q.inputs)
    with full_of_nan():
        got = backward(ops.lce_backward, p, out, ups, scale, "exact")
    # Two roundings of what may nearly cancel: of p (a - h (log p + H)) over a row.
    assert_close(got, expected, dtype)


def without_variate(monkeypatch) -> None:
    monkeypatch.setattr(
        portable, "remainders", lambda a, live, lse, share, *_: torch.zeros_like(share.log2_mass, dtype=a.dtype)
    )


@each_dtype
@each_kind
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["sampled", "threshold"])
def test_one_draw_is_that_of_the_portable_path(method, shape, scaled, options, dtype, monkeypatch):
    p = problem(*shape, dtype, **options)
    scale = scales(shape[0]) if scaled else None
    out, ups = forward(p, scale), ups_of(shape[0])
    with full_of_nan():
        got = backward(ops.lce_backward, p, out, ups, scale, method)
    twin = p.to(torch.float64)
    scale64 = None if scale is None else scale.double()
    nll, lse, tile_map, stats, _ = out
    given = (nll.double(), lse.double(), tile_map, stats.double(), None)
    ups64 = [g.double() for g in ups]
    expected = [g for g in backward(ops.lce_backward_portable, twin, given, ups64, scale64, method) if g.numel()]
    without_variate(monkeypatch)
    parts = [g for g in backward(ops.lce_backward_portable, twin, given, ups64, scale64, method) if g.numel()]
    assert_close(got, expected, dtype, parts)


@each_dtype
def test_unbiased(dtype):
    p, scale = problem(256, 128, 16384, dtype, softcap=20.0), scales(256)
    out, ups = forward(p, scale), ups_of(256)
    exact = backward(ops.lce_backward, p, out, ups, scale, "exact")
    means, errors = [torch.zeros_like(g, dtype=torch.float32) for g in exact[:2]], {}
    for k in range(64):
        for mean, g in zip(means, backward(ops.lce_backward, p, out, ups, scale, "sampled", seed=k), strict=False):
            mean += g.float()
        if k + 1 in (4, 64):
            errors[k + 1] = [error(mean / (k + 1), g) for mean, g in zip(means, exact, strict=False)]
    for few, many in zip(errors[4], errors[64], strict=True):
        assert few < 0.25 and many < 0.3 * few + 2 * torch.finfo(dtype).eps, errors


@each_dtype
def test_a_seed_says_all(dtype):
    """dC's sums have one order. dE's are added as they come."""
    p, scale = problem(500, 64, 20000, dtype), scales(500)
    out, ups = forward(p, scale), ups_of(500)
    first, again, other = (backward(ops.lce_backward, p, out, ups, scale, "sampled", seed=k) for k in (3, 3, 4))
    assert first[1].equal(again[1]) and not first[1].equal(other[1])
    assert error(again[0], first[0]) < 2 * torch.finfo(dtype).eps


@each_dtype
def test_batch_invariance(dtype):
    """Bitwise the same alone, in another order, in a longer batch, and beside ignored tokens."""
    p, scale = problem(700, 64, 50257, dtype), scales(700)
    whole = forward(p, scale, batch_invariant=True)
    g = torch.Generator().manual_seed(0)
    for picked in (torch.arange(1), torch.arange(64), torch.arange(130, 259), torch.randperm(700, generator=g)):
        picked = picked.to(DEVICE)
        q = replace(p, e=p.e[picked], targets=p.targets[picked])
        part = forward(q, scale[picked], batch_invariant=True)
        for k, (x, y) in enumerate(zip(part, whole, strict=True)):
            assert x.equal(y[..., picked] if k in (2, 3) else y[picked])
    ignored = torch.where(torch.arange(700, device=DEVICE) % 3 == 0, p.targets, -100)
    part = forward(replace(p, targets=ignored), scale, batch_invariant=True)
    assert part[0][::3].equal(whole[0][::3]) and part[3][:, ::3].equal(whole[3][:, ::3])


@each_dtype
def test_in_a_graph_on_another_stream(dtype):
    p = problem(300, 64, 5000, dtype)
    e, c = p.e.clone().requires_grad_(), p.c.clone().requires_grad_()
    temperature = scales(300)

    def step():
        out = linear_logprobs(
            e, c, p.targets, temperature=temperature, outputs=("entropy", "is_top1"), impl="cce_exact"
        )
        assert out.entropy is not None
        return *torch.autograd.grad((out.logprobs - 0.1 * out.entropy).sum(), (e, c)), out.logprobs, out.is_top1

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, got = captured(step)
    graph.replay()
    for x, y in zip(got, expected, strict=True):
        assert x.equal(y)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": torch.ones(3, device=DEVICE if torch.cuda.is_available() else "cpu")}, "scale must be contiguous"),
        ({"stats": 16}, "stats must be in"),
    ],
)
def test_errors_name_the_argument(change, message):
    p = problem(4, 8, 10, torch.bfloat16)
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.lce_forward(p.e, p.c, None, p.targets, None, **change)
