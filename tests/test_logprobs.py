"""linear_logprobs: its values and gradients against dense fp64, of every impl, dtype and hard case."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.logprobs import ALL, DIFFERENTIABLE, FIELDS, confident, dense, gradients, ours, temperatures, upstream
from support.problems import assert_as_good_as_dense, error, peaked, uniform

from cce_ext import IMPLS, LogProbs, classifier, linear_cross_entropy, linear_logprobs

KERNELS = [x for x in IMPLS if x != "torch_compile"]
EXACT = ["cce_exact", "reference"]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap and scale": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3},
}
options_of = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def small_blocks(monkeypatch):
    """The portable kernels take some 16 tokens and a vocab tile at a time."""
    monkeypatch.setattr(classifier, "BLOCK_LOGITS", {"cpu": 1 << 12})
    monkeypatch.setattr(classifier, "BLOCK_LOGITS_DEFAULT", 1 << 12)
    monkeypatch.setattr(classifier, "BLOCK_ROWS", 16)


def both(p, softcap=None, **options):
    """Ours in p's dtype and the dense one's in fp64, with their leaves."""
    p = replace(p, softcap=softcap)
    leaf, exact = p.leaves(), p.to(torch.float64).leaves()
    given = {name: options.pop(name) for name in ("temperature", "logit_scale") if name in options}
    return leaf, ours(leaf, **given, **options), exact, dense(exact, **given)


def assert_close(out: LogProbs, expected: LogProbs, tolerance: float) -> None:
    """To a rounding of the largest number on the way: of logits, which are differences' terms."""
    largest = max(1.0, expected.lse.abs().max().item(), expected.logprobs.abs().max().item())
    for name, x, y in zip(FIELDS, out, expected, strict=True):
        if x.dtype == torch.bool:
            assert torch.equal(x, y), name
        else:
            worst = (x.double() - y).abs().max().item()
            assert worst <= tolerance * largest, f"{name}: {worst:.3g}"


# ---- values ----


@options_of
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values(options, impl, dtype, device):
    p = peaked(60, 24, 1500, dtype=dtype, device=device, bias=True, ignored=0.2)
    _, out, _, expected = both(p, impl=impl, **options)
    assert all(x.shape == p.targets.shape for x in out)
    assert all(x.dtype == (torch.bool if name == "is_top1" else dtype) for name, x in out._asdict().items())
    assert_close(out, expected, 1e-11 if dtype == torch.float64 else 1e-6)
    assert out.is_top1.any() and not out.is_top1.all()


@options_of
def test_blocks(options, device, small_blocks):
    """Of tokens and of columns, with tails, as they are at full size."""
    p = peaked(61, 24, 3001, dtype=torch.float64, device=device, bias=True, ignored=0.2)
    leaf, out, exact, expected = both(p, impl="cce_exact", **options)
    assert_close(out, expected, 1e-11)
    for x, y in zip(gradients(out, leaf, upstream(p)), gradients(expected, exact, upstream(p)), strict=True):
        assert error(x, y) < 1e-11


@pytest.mark.parametrize("impl", ["cce", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(impl, dtype, device):
    """No logit is rounded: of the rounded inputs, results are those of fp64. The dense product rounds them."""
    p = peaked(60, 24, 1500, dtype=dtype, device=device, ignored=0.2)
    _, out, _, expected = both(p, impl=impl, temperature=0.8)
    assert all(x.dtype == torch.float32 for x in out if x.dtype != torch.bool)
    if impl == "cce":
        assert_close(out, expected, 1e-6)
    else:
        assert error(out.logprobs, expected.logprobs) < 0.05


def test_what_is_not_asked_for_is_none(device):
    p = peaked(20, 16, 300, device=device)
    every = ours(p)
    assert ours(p, outputs=())[2:] == (None,) * 5
    assert linear_logprobs(p.e, p.c, p.targets)[3:] == (None,) * 4
    for name in ALL:
        out = ours(p, outputs=(name,))
        for field, x, y in zip(FIELDS, out, every, strict=True):
            if field in ("logprobs", "lse", name):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
            else:
                assert x is None
    assert not any(x.requires_grad for x in ours(p.leaves())[3:])


def test_logprobs_are_the_loss(device):
    p = peaked(60, 24, 1500, device=device, bias=True, ignored=0.2)
    nll, lse = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction="none", return_lse=True)
    out = ours(p, outputs=())
    assert torch.equal(out.logprobs, -nll) and torch.equal(out.lse, lse)
    assert not torch.signbit(out.logprobs[p.targets == -100]).any()


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2)], ids=str)
def test_shapes(shape, device):
    n = math.prod(shape)
    p = peaked(n, 16, 300, device=device, bias=True)
    e, targets, of_tokens = p.e.view(*shape, 16), p.targets.view(shape), temperatures(p).view(shape)
    out = linear_logprobs(e, p.c, targets, p.bias, temperature=of_tokens, outputs=ALL)
    flat = ours(p, temperature=temperatures(p))
    assert all(torch.equal(x, y.view(shape)) for x, y in zip(out, flat, strict=True))


def test_shift_moves_targets_and_their_temperatures(device):
    p = peaked(24, 16, 300, dtype=torch.float64, device=device)
    e, targets, of_tokens = p.e.view(2, 12, 16), p.targets.view(2, 12), temperatures(p).view(2, 12)
    for shift in (1, 5):
        out = linear_logprobs(e, p.c, targets, shift=shift, temperature=of_tokens, outputs=ALL)
        cut = replace(p, e=e[:, :-shift].flatten(0, 1), targets=targets[:, shift:].flatten())
        expected = dense(cut, temperature=of_tokens[:, shift:].flatten())
        assert out.logprobs.shape == (2, 12 - shift)
        assert_close(LogProbs(*(x.flatten() for x in out)), expected, 1e-11)


@pytest.mark.parametrize("impl", ["cce", "reference"])
@pytest.mark.parametrize("columns", [(5, 90, 1500, 2999), (300, 310, 1500, 2999), (2000, 2001, 2300, 2999)], ids=str)
def test_the_first_of_equal_logits_is_the_top(impl, columns, device, small_blocks):
    """In one vocab tile, in several blocks of columns, and at the end."""
    p = peaked(6, 8, 3000, device=device)
    e, c = torch.ones_like(p.e), -p.c.abs()
    c[list(columns)] = 1.0
    targets = torch.tensor([*columns, columns[0], 7], device=device)
    out = ours(replace(p, e=e, c=c, targets=targets), impl=impl)
    assert out.is_top1.tolist() == [True, False, False, False, True, False]


# ---- gradients ----


@options_of
@pytest.mark.parametrize("impl", ["cce_exact", "reference"])
@pytest.mark.parametrize("which", ["logprobs lse entropy", "entropy", "logprobs", "lse entropy"])
def test_gradients(options, impl, which, device):
    p = peaked(60, 24, 1500, dtype=torch.float64, device=device, bias=True, ignored=0.2)
    leaf, out, exact, expected = both(p, impl=impl, **options)
    ups = [g if name in which else None for name, g in zip(DIFFERENTIABLE, upstream(p), strict=True)]
    for x, y in zip(gradients(out, leaf, ups), gradients(expected, exact, ups), strict=True):
        assert error(x, y) < 1e-11


@options_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_good_as_dense_ones(options, dtype, device):
    p = peaked(200, 40, 1500, dtype=dtype, device=device, bias=True, ignored=0.2)
    leaf, out, exact, expected = both(p, impl="cce_exact", **options)
    same, its, _, _ = both(p, impl="reference", **options)
    ups = upstream(p)
    results = (gradients(out, leaf, ups), gradients(its, same, ups), gradients(expected, exact, ups))
    for x, y, z in zip(*results, strict=True):
        assert x.dtype == dtype
        assert_as_good_as_dense(x, y, z, tiny=5e-5)


@pytest.mark.parametrize("impl", KERNELS)
def test_gradients_of_every_impl(impl, device):
    p = peaked(60, 24, 3000, device=device, bias=True, ignored=0.2)
    leaf, out, exact, expected = both(p, impl=impl, temperature=temperatures(p))
    for x, y in zip(gradients(out, leaf, upstream(p)), gradients(expected, exact, upstream(p)), strict=True):
        assert error(x, y) < (1e-4 if impl in EXACT else 0.15)


@pytest.mark.parametrize("frozen", ["e", "c", "e c", "bias"])
def test_frozen_inputs(frozen, device):
    p = peaked(60, 24, 700, dtype=torch.float64, device=device, bias=True)
    leaf, out, exact, expected = both(p, impl="cce_exact")
    ups = upstream(p)
    for name in frozen.split():
        getattr(leaf, name).requires_grad_(False)
    out = ours(leaf, impl="cce_exact")
    names = [name for name in ("e", "c", "bias") if name not in frozen.split()]
    got = torch.autograd.grad(
        sum((x * g.double()).sum() for x, g in zip(out, ups, strict=False)), [getattr(leaf, x) for x in names]
    )
    wanted = dict(zip(("e", "c", "bias"), gradients(expected, exact, ups), strict=True))
    assert all(error(x, wanted[name]) < 1e-11 for name, x in zip(names, got, strict=True))


# ---- hard cases ----


@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_temperatures_of_tokens(impl, device):
    """0.1 to 10. What an ignored token has is not looked at."""
    p = peaked(60, 24, 1500, dtype=torch.float64, device=device, bias=True, ignored=0.2)
    of_tokens = temperatures(p).double()
    nothing = torch.tensor([0.0, float("nan"), -1.0] * 20, dtype=torch.float64, device=device)
    of_tokens = of_tokens.where(p.targets != -100, nothing)
    leaf, out, exact, expected = both(p, impl=impl, temperature=of_tokens, softcap=8.0)
    assert_close(out, expected, 1e-11)
    for x, y in zip(gradients(out, leaf, upstream(p)), gradients(expected, exact, upstream(p)), strict=True):
        assert error(x, y) < (0.2 if impl == "cce" else 1e-11)


@pytest.mark.parametrize("impl", ["cce", *EXACT])
@pytest.mark.parametrize("gap", [16.0, 23.0, 60.0])
def test_confident_tokens(impl, gap, device):
    """p = 1 - 1e-4 to 1 - 1e-23: the entropy and its gradient are those of fp64, to a rounding of logits."""
    torch.manual_seed(0)
    p = confident(20, 700, gap, device)
    leaf, out, exact, expected = both(p.to(torch.float32), impl=impl)
    assert_close(out, expected, 1e-6)
    assert ((out.entropy - expected.entropy).abs() <= 2e-6 + 1e-5 * expected.entropy).all()
    ups = [None, None, upstream(p)[2]]
    for x, y in zip(gradients(out, leaf, ups), gradients(expected, exact, ups), strict=True):
        # log p is a difference of two numbers of gap's size, and e is as large. A draw has its own noise besides.
        assert (x - y).abs().max() <= 2.0**-21 * gap * gap * (4 if impl == "cce" else 1)


@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_labels_far_below_the_peak(impl, device):
    """nll up to 1e4, which the map must reach."""
    p = peaked(30, 24, 3000, device=device)
    c = p.c.clone()
    c[7] = -p.e.mean(0)
    scale = 1e4 / (p.e @ (c[p.targets] - c[7]).T).abs().max()
    q = replace(p, e=p.e * scale, c=c, targets=torch.full_like(p.targets, 7))
    leaf, out, exact, expected = both(q, impl=impl)
    assert out.logprobs.min() < -5e3
    assert_close(out, expected, 1e-6)
    for x, y in zip(gradients(out, leaf, upstream(p)), gradients(expected, exact, upstream(p)), strict=True):
        assert error(x, y) < 1e-3


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("n", [1, 40])
def test_flat_and_single(impl, n, device):
    """E = 0: H = log V, and its gradient is 0."""
    p = uniform(n, 24, 3000, device=device)
    leaf, out, _, expected = both(p, impl=impl)
    assert_close(out, expected, 1e-6)
    torch.testing.assert_close(out.entropy, torch.full_like(out.entropy, math.log(3000)))
    # Sampled, it is what masses and norms in the map's steps are off by.
    limit = 1e-4 if impl in EXACT or impl == "cce_threshold" else 2.0
    for x in gradients(out, leaf, [None, None, upstream(p)[2]]):
        assert x.abs().max() < limit


@pytest.mark.parametrize("impl", KERNELS)
def test_a_masked_vocabulary(impl, device):
    """A bias of -inf: columns, and a whole vocab tile, that nobody has."""
    p = peaked(30, 24, 1500, dtype=torch.float64, device=device, bias=True)
    p.bias[256:512] = -float("inf")
    p.bias[1400:] = -float("inf")
    p = replace(p, targets=p.targets % 200)
    leaf, out, exact, expected = both(p, impl=impl)
    assert (out.mean_logits == -float("inf")).all()
    rest = [x for name, x in out._asdict().items() if name != "mean_logits"]
    others = [x for name, x in expected._asdict().items() if name != "mean_logits"]
    assert_close(LogProbs(*rest, rest[0]), LogProbs(*others, others[0]), 1e-11)
    for x, y in zip(gradients(out, leaf, upstream(p)), gradients(expected, exact, upstream(p)), strict=True):
        assert x.isfinite().all()
        assert error(x, y.nan_to_num(nan=0.0)) < (1e-10 if impl in EXACT else 0.2)


@pytest.mark.parametrize("impl", [x for x in KERNELS if x != "reference"])
@pytest.mark.parametrize("pattern", ["some", "all"])
def test_nan_in_ignored_rows(impl, pattern, device):
    """It reaches nothing, nor what flows into the tokens."""
    p = peaked(40, 24, 1500, dtype=torch.float64, device=device, bias=True)
    ignored = torch.arange(40, device=device) % 3 == 0 if pattern == "some" else torch.ones(40, device=device) > 0
    p = replace(p, targets=p.targets.masked_fill(ignored, -100), e=p.e.masked_fill(ignored[:, None], float("nan")))
    torch.manual_seed(0)
    leaf, out, _, _ = both(p, impl=impl, temperature=temperatures(p))
    ups = [g.masked_fill(ignored, float("nan")) for g in upstream(p)]
    got = gradients(out, leaf, ups)
    torch.manual_seed(0)
    clean = replace(p, e=p.e.nan_to_num(nan=0.0))
    other, its, _, _ = both(clean, impl=impl, temperature=temperatures(p))
    assert all(torch.equal(x, y) for x, y in zip(out, its, strict=True))
    assert all(not x[ignored].any() for x in out)
    for x, y in zip(got, gradients(its, other, upstream(p)), strict=True):
        assert torch.equal(x, y)


def test_no_tokens(device):
    out = linear_logprobs(
        torch.zeros(0, 8, device=device),
        torch.zeros(30, 8, device=device),
        torch.zeros(0, device=device).long(),
        outputs=ALL,
    )
    assert all(x.shape == (0,) for x in out)


# ---- TRL's ----


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_as_trl(softcap, device):
    """The fields of ChunkedLogProbFunction (TRL 1.16), and the gradients of its two differentiable ones."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL is not installed")
    p = peaked(60, 24, 1500, device=device, bias=True)
    theirs_of, ours_of = p.leaves(), p.leaves()
    more = (p.targets, 0.7, 512, softcap, 1.2)
    found = chunked.ChunkedLogProbFunction.apply(theirs_of.e, theirs_of.c, theirs_of.bias, *more)
    theirs = dict(zip(("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), found, strict=True))
    out = ours(replace(ours_of, softcap=softcap), temperature=0.7, logit_scale=1.2, impl="cce_exact")
    for name, x in theirs.items():
        torch.testing.assert_close(
            getattr(out, name), x, rtol=2e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    ups = upstream(p)
    wanted = torch.autograd.grad((theirs["logprobs"] * ups[0] + theirs["entropy"] * ups[2]).sum(), theirs_of.inputs)
    for x, y in zip(gradients(out, ours_of, [ups[0], None, ups[2]]), wanted, strict=True):
        assert error(x, y) < 2e-5
