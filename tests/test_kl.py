"""linear_kl: the divergences of two heads and their gradient, as dense torch has them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.heads import KINDS, Heads, dense, gradients, heads
from support.problems import assert_as_good_as_dense, error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cce_ext import kl, kl_blocks, linear_kl

each_kind = pytest.mark.parametrize("kind", KINDS)
INF = float("inf")
SHAPES = [(37, 16, 701, 24), (1, 8, 1, 3), (1, 7, 257, 7), (5, 3, 256, 90), (130, 33, 1111, 5)]
OPTIONS = {
    "plain": {},
    "bias-softcaps-temperature": {"bias": True, "student_softcap": 9.0, "teacher_softcap": 14.0, "temperature": 1.7},
    "masked": {"masked": True, "bias": True, "temperature": 0.6},
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Ten tokens by 256 columns, with tails."""
    monkeypatch.setattr(kl_blocks, "_BLOCK_LOGITS", {"cpu": 2560, "cuda": 2560})


def compare(h: Heads, rtol: float = 1e-10, **options) -> None:
    h = h.leaves()
    loss, expected = h.ours(**options), h.dense(**options)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(gradients(loss, h), gradients(expected, h), rtol=100 * rtol, atol=1e-11)


# ---- values and gradients ----


@each_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_dense(kind, options, shape, device):
    h = heads(*shape, device=device, kind=kind, **options)
    for reduction in ("none", "mean", "sum"):
        compare(h, reduction=reduction)


@each_kind
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_past_one_block(kind, options, device, small_blocks):
    compare(heads(43, 16, 1111, device=device, kind=kind, **options), reduction="none")


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_beta(beta, device):
    compare(heads(kind="jsd", beta=beta, device=device), reduction="none")


@each_kind
def test_gradcheck(kind):
    h = heads(4, 3, 9, 5, kind=kind, bias=True, student_softcap=5.0, temperature=0.8, masked=True).leaves()
    # The difference quotient sees no gradient of a NaN.
    e = torch.where(h.mask[:, None], h.e, 0.0).detach().requires_grad_()
    loss = lambda *inputs: replace(h, e=inputs[0], c=inputs[1], bias=inputs[2]).ours(reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(loss, (e, h.c, h.bias))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(kind, dtype, device):
    """No logit is rounded, so that 16 bits are far better than dense torch's. Sums and results are fp32."""
    h = heads(200, 40, 1500, 56, dtype=dtype, kind=kind, masked=True, bias=True, device=device)
    exact, same, h = h.to(torch.float64).leaves(), h.leaves(), h.leaves()
    ours, theirs, expected = h.ours(reduction="none"), same.dense(reduction="none"), exact.dense(reduction="none")
    assert ours.dtype == torch.float32
    assert_as_good_as_dense(ours.detach(), theirs.detach(), expected.detach(), tiny=2e-6)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    for x, y, z in zip(gradients(ours, h), gradients(theirs, same), gradients(expected, exact), strict=True):
        assert x.dtype == dtype
        # p has the rounding of a lse, not that of a maximum.
        assert_as_good_as_dense(x, y, z, tiny=1e-5)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_blocks_are_not_rounded_to_16_bits(kind, dtype, device, small_blocks):
    h = heads(400, 24, 1111, dtype=dtype, kind=kind, bias=True, device=device)
    exact, h = h.to(torch.float64).leaves(), h.leaves()
    for x, y in zip(gradients(h.ours(reduction="sum"), h), gradients(exact.dense(reduction="sum"), exact), strict=True):
        # One rounding is a fifth of eps to three tenths. On CUDA dz has one as well.
        assert error(x, y) < (0.35 if device == "cpu" else 0.7) * torch.finfo(dtype).eps


def test_dtypes_of_the_sides_may_differ(device):
    h = heads(device=device, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        teacher = tuple(None if x is None else x.to(dtype) for x in h.teacher)
        for kind in KINDS:
            q = replace(h, teacher=teacher, options={"kind": kind}).leaves()
            loss = q.ours()
            assert loss.dtype == dtype
            torch.testing.assert_close(loss.double(), q.to(torch.float64).dense(), rtol=1e-4, atol=1e-6)
            assert [x.dtype for x in gradients(loss, q)] == [torch.bfloat16] * 2


@each_kind
def test_a_close_teacher(kind, device):
    """Of what fp32 has of a difference of 1e-3, little is lost: logits of 12 have steps of 1e-6."""
    h = heads(60, 16, 1500, 16, kind=kind, device=device)
    noise = 1e-3 * torch.randn(h.c.shape, generator=torch.Generator().manual_seed(3), dtype=h.c.dtype).to(device)
    e, c, noisy = h.e.float(), h.c.float(), (h.c + noise).float()
    exact = dense(e.double(), c.double(), None, (e.double(), noisy.double(), None), kind=kind, reduction="none")
    ours = linear_kl(e, c, e, noisy, kind=kind, reduction="none")
    assert exact.max() < 2e-3
    assert (ours - exact).abs().max() < 1e-6


@each_kind
def test_the_same_head_twice(kind, device, small_blocks):
    for dtype in (torch.float32, torch.bfloat16):
        h = heads(43, 16, 1111, dtype=dtype, device=device, kind=kind, bias=True).leaves()
        h = replace(h, teacher=(h.e.detach(), h.c.detach(), h.bias.detach()))
        loss = h.ours(reduction="none")
        assert torch.equal(loss, torch.zeros_like(loss))
        for x in gradients(loss, h):
            assert torch.equal(x, torch.zeros_like(x))


@each_kind
def test_logits_of_hundreds(kind, device, small_blocks):
    """A bias of all columns changes nothing, and a block whose logits are far above those before it fades them."""
    h = heads(43, 16, 1111, device=device, kind=kind, bias=True)
    expected = h.dense(reduction="none")
    moved = replace(h, bias=h.bias + 900.0, teacher=(*h.teacher[:2], h.teacher[2] - 900.0))
    torch.testing.assert_close(moved.ours(reduction="none"), expected, rtol=1e-9, atol=1e-9)
    steps = torch.arange(1111, device=device).div(256, rounding_mode="floor") * 900.0
    for of_student, of_teacher in ((steps, 0.0), (0.0, steps), (steps, steps), (-steps, -steps)):
        compare(replace(h, bias=h.bias + of_student, teacher=(*h.teacher[:2], h.teacher[2] + of_teacher)), rtol=1e-8)


def test_repeats_to_the_bit(device, small_blocks):
    h = heads(43, 16, 1111, dtype=torch.float32, device=device, masked=True).leaves()
    results = [[loss, *gradients(loss, h)] for loss in (h.ours(), h.ours())]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---- columns that are masked ----


@each_kind
@pytest.mark.parametrize("where", ["first", "last", "both"])
def test_columns_that_neither_has(kind, where, device, small_blocks):
    """As without them; they get no gradient."""
    h = heads(43, 16, 1111, device=device, kind=kind, bias=True)
    keep = torch.ones(1111, dtype=torch.bool, device=device)
    keep[: 600 if where in ("first", "both") else 0] = False
    keep[1000 if where in ("last", "both") else 1111 :] = False
    masked = replace(
        h,
        bias=h.bias.masked_fill(~keep, -INF),
        teacher=(*h.teacher[:2], h.teacher[2].masked_fill(~keep, -INF)),
    ).leaves()
    less = replace(
        h, c=h.c[keep], bias=h.bias[keep], teacher=(h.teacher[0], *(x[keep] for x in h.teacher[1:]))
    ).leaves()
    loss, expected = masked.ours(reduction="none"), less.dense(reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    (d_e, d_c, d_bias), wanted = gradients(loss, masked), gradients(expected, less)
    torch.testing.assert_close([d_e, d_c[keep], d_bias[keep]], wanted, rtol=1e-8, atol=1e-12)
    assert d_c[~keep].count_nonzero() == d_bias[~keep].count_nonzero() == 0


@pytest.mark.parametrize("kind, absent", [("forward", 1), ("reverse", 0), ("jsd", 0), ("jsd", 1)])
def test_columns_that_only_the_other_has(kind, absent, device, small_blocks):
    """A term whose weight is 0 is 0. absent: from the student, 0, or from the teacher, 1."""
    h = heads(43, 16, 1111, device=device, kind=kind, bias=True)
    gone = torch.arange(1111, device=device) % 3 == 0
    gone[:512] = True
    bias = h.bias if absent else h.bias.masked_fill(gone, -INF)
    of_teacher = h.teacher[2].masked_fill(gone, -INF) if absent else h.teacher[2]
    compare(replace(h, bias=bias, teacher=(*h.teacher[:2], of_teacher)), rtol=1e-9, reduction="none")


@pytest.mark.parametrize("block", [0, 3])
def test_what_the_second_has_not_is_infinitely_far(block, device, small_blocks):
    """Wherever the column is, and though larger logits follow. forward has a gradient all the same: p - q."""
    h = heads(43, 16, 1111, device=device, bias=True)
    at = 256 * block + 5
    low = h.bias.clone()
    low[at] = -INF
    forward = replace(h, bias=low).leaves()
    loss = forward.ours(reduction="none")
    assert torch.equal(loss, torch.full_like(loss, INF))
    p, q = (torch.nn.functional.linear(*x).softmax(1) for x in ((h.e, h.c, low), h.teacher))
    d_bias = torch.autograd.grad(loss.sum(), forward.bias)[0]
    torch.testing.assert_close(d_bias, (p - q).sum(0), rtol=1e-9, atol=1e-12)
    assert d_bias[at] < 0

    teacher_low = h.teacher[2].clone()
    teacher_low[at] = -INF
    reverse = replace(h, teacher=(*h.teacher[:2], teacher_low)).leaves()
    loss = reverse.ours(reduction="none", kind="reverse")
    assert torch.equal(loss, torch.full_like(loss, INF))
    assert torch.autograd.grad(loss.sum(), reverse.e)[0].isnan().all()


def test_infinitely_far_with_a_weight_that_fades_to_0(device, small_blocks):
    """The teacher's later logits are 900 above: of a column that only it has, exp leaves nothing."""
    h = heads(43, 16, 1111, device=device, bias=True)
    low, teacher_high = h.bias.clone(), h.teacher[2].clone()
    low[5] = -INF
    teacher_high[512:] += 900.0
    compare(replace(h, bias=low, teacher=(*h.teacher[:2], teacher_high)), rtol=1e-9, reduction="none")


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_disjoint_supports(beta, device, small_blocks):
    """The largest JSD there is: the entropy of (beta, 1 - beta). Its gradient is 0."""
    h = heads(43, 16, 1111, device=device, bias=True)
    even = torch.arange(1111, device=device) % 2 == 0
    h = replace(h, bias=h.bias.masked_fill(even, -INF), teacher=(*h.teacher[:2], h.teacher[2].masked_fill(~even, -INF)))
    for kind in ("forward", "reverse"):
        assert (h.ours(kind=kind, reduction="none") == INF).all()
    h = h.leaves()
    loss = h.ours(kind="jsd", beta=beta, reduction="none")
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    torch.testing.assert_close(loss, torch.full_like(loss, entropy), rtol=1e-12, atol=0)
    for x in gradients(loss, h):
        torch.testing.assert_close(x, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [1e-9, 1 - 2**-30])
def test_a_beta_that_fp32_does_not_know_from_0_or_1(beta, device):
    h = heads(9, 5, 300, device=device, bias=True, dtype=torch.float32)
    even = torch.arange(300, device=device) % 2 == 0
    h = replace(h, bias=h.bias.masked_fill(even, -INF), teacher=(*h.teacher[:2], h.teacher[2].masked_fill(~even, -INF)))
    h = h.leaves()
    loss = h.ours(kind="jsd", beta=beta)
    assert loss.abs() < 1e-6
    assert all(x.isfinite().all() for x in gradients(loss, h))


# ---- tokens that do not count ----


@each_kind
@pytest.mark.parametrize("gathered", [True, False])
def test_tokens_that_do_not_count(kind, gathered, device, monkeypatch, small_blocks):
    """They are 0 and get 0, whatever they hold and whatever comes back to them. gathered: as on a CPU, or in place."""
    if not gathered:
        monkeypatch.setattr(kl, "live_rows", lambda mask: None)
    h = heads(43, 16, 1111, device=device, kind=kind, masked=True, bias=True).leaves()
    loss = h.ours(reduction="none")
    assert torch.equal(loss[~h.mask], torch.zeros_like(loss[~h.mask]))
    compare(h, reduction="none")
    g = torch.ones_like(loss).masked_fill(~h.mask, float("nan"))
    d_e, d_c, d_bias = torch.autograd.grad(loss, h.inputs, g)
    assert torch.equal(d_e[~h.mask], torch.zeros_like(d_e[~h.mask]))
    expected = torch.autograd.grad(h.dense(reduction="sum"), h.inputs)
    torch.testing.assert_close([d_e, d_c, d_bias], list(expected), rtol=1e-9, atol=1e-12)


@each_kind
@pytest.mark.parametrize("gathered", [True, False])
def test_biases_that_are_infinitely_far_apart_reach_no_token_that_does_not_count(kind, gathered, device, monkeypatch):
    """In place a token that does not count has the biases alone for logits."""
    if not gathered:
        monkeypatch.setattr(kl, "live_rows", lambda mask: None)
    h = heads(9, 5, 300, device=device, kind=kind, bias=True).leaves()
    h = replace(h, mask=torch.zeros(9, dtype=torch.bool, device=device))
    low, teacher_low = h.bias.detach().clone(), h.teacher[2].clone()
    low[3], teacher_low[4] = -INF, -INF
    h = replace(h, bias=low, teacher=(*h.teacher[:2], teacher_low)).leaves()
    loss = h.ours(reduction="sum")
    assert loss == 0
    for x in torch.autograd.grad(loss, h.inputs):
        assert torch.equal(x, torch.zeros_like(x))


@each_kind
def test_no_token_counts(kind, device):
    h = heads(device=device, kind=kind)
    none = replace(h, mask=torch.zeros(37, dtype=torch.bool, device=device))
    assert none.ours().isnan()
    assert none.ours(reduction="sum") == 0
    empty = replace(h, e=h.e[:0], teacher=(h.teacher[0][:0], *h.teacher[1:])).leaves()
    loss = empty.ours(reduction="none")
    assert loss.shape == (0,)
    d_e, d_c = torch.autograd.grad(loss.sum(), empty.inputs)
    assert d_e.shape == (0, 16)
    assert torch.equal(d_c, torch.zeros_like(d_c))


# ---- shapes, and which inputs have gradients ----


@each_kind
def test_leading_dimensions(kind, device):
    h = heads(24, device=device, kind=kind, masked=True).leaves()
    flat = h.ours(reduction="none")
    teacher = (h.teacher[0].view(2, 3, 4, -1), *h.teacher[1:])
    shaped = replace(h, e=h.e.view(2, 3, 4, -1), teacher=teacher, mask=h.mask.view(2, 3, 4))
    assert torch.equal(shaped.ours(reduction="none"), flat.view(2, 3, 4))
    assert torch.equal(shaped.ours(), h.ours())
    assert torch.equal(torch.autograd.grad(shaped.ours(), h.e)[0], torch.autograd.grad(h.ours(), h.e)[0])
    at = int(h.mask.nonzero()[0])
    alone = replace(h, e=h.e[at], teacher=(h.teacher[0][at], *h.teacher[1:]), mask=h.mask[at])
    torch.testing.assert_close(alone.ours(reduction="none"), flat[at])


@each_kind
def test_any_strides(kind, device):
    h = heads(24, device=device, kind=kind).leaves()
    e, c, teacher_e, teacher_c = (x.detach().T.contiguous().T for x in (h.e, h.c, *h.teacher[:2]))
    strided = replace(h, e=e, c=c, teacher=(teacher_e, teacher_c, None)).leaves()
    strided = replace(strided, e=e.requires_grad_(), c=c.requires_grad_())
    torch.testing.assert_close(gradients(strided.ours(), strided), gradients(h.ours(), h))


@each_kind
@pytest.mark.parametrize("wanted", [("e",), ("c",), ("bias",), ("e", "bias"), ()], ids=str)
def test_frozen_inputs(kind, wanted, device, monkeypatch):
    h = heads(device=device, kind=kind, bias=True, masked=True).leaves()
    for name in {"e", "c", "bias"} - set(wanted):
        getattr(h, name).requires_grad_(False)
    loss, expected = h.ours(), h.dense()
    assert loss.requires_grad == bool(wanted)
    found = {}
    computed = kl_blocks.gradients
    monkeypatch.setattr(kl_blocks, "gradients", lambda *args, **needs: found.update(needs) or computed(*args, **needs))
    if wanted:
        inputs = [getattr(h, name) for name in wanted]
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))
        assert found == {f"need_{name}": name in wanted for name in ("e", "c", "bias")}


@each_kind
def test_the_teacher_gets_no_gradient(kind, device):
    """A module's parameters may require one. A hidden that does would have a graph for nothing."""
    h = heads(device=device, kind=kind, bias=True).leaves()
    hidden, weight, bias = h.teacher
    h = replace(h, teacher=(hidden, weight.requires_grad_(), bias.requires_grad_()))
    h.ours().backward()
    assert h.c.grad is not None
    assert weight.grad is None and bias.grad is None
    graph = replace(h, teacher=(hidden.clone().requires_grad_(), weight, bias))
    with pytest.raises(ValueError, match="teacher_hidden: expected a tensor that requires no gradient"):
        graph.ours()
    with torch.no_grad():
        assert torch.equal(graph.ours(), h.ours())


@each_kind
def test_one_classifier_for_both(kind, device):
    """Its gradient is that of the student's logits."""
    h = heads(24, 16, 701, 16, device=device, kind=kind).leaves()
    shared = replace(h, teacher=(h.teacher[0], h.c, None))
    apart = replace(h, teacher=(h.teacher[0], h.c.detach(), None))
    torch.testing.assert_close(gradients(shared.ours(), h), gradients(apart.dense(), h))


# ---- memory ----


class Largest(TorchDispatchMode):
    """The most entries that a result of an operation has."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.numel())
        return out


@each_kind
def test_no_block_is_larger_than_the_budget(kind, monkeypatch):
    """But for what has the size of an input, fp32 sums of dE included."""
    budget = 1 << 13
    monkeypatch.setattr(kl_blocks, "_BLOCK_LOGITS", {"cpu": budget})
    n, d, v = 300, 4, 20000
    h = heads(n, d, v, 4, dtype=torch.float32)
    student = kl_blocks.Head(h.e, h.c, None, None, 1.0)
    teacher = kl_blocks.Head(*h.teacher[:2], None, None, 1.0)
    with Largest() as seen:
        found = kl_blocks.divergence(kind, 0.5, student, teacher)
    # The forward of the log-sum-exps has blocks of its own, of 2^20.
    assert seen.entries <= (1 << 20 if kind == "jsd" else budget) < n * v
    g = torch.ones(n)
    with Largest() as seen:
        kl_blocks.gradients(kind, 0.5, g, student, teacher, found, need_e=True, need_c=True, need_bias=False)
    assert seen.entries <= max(budget, v * d) < n * v
