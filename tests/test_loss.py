"""Loss and exact gradients of every impl against the fp64 oracle, over dtypes, options and odd shapes."""

from __future__ import annotations

import pytest
import torch
from support.problems import assert_as_good_as_dense, dense, error, gradients, oracle, peaked, upstream
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (300, 96, 1000),
    (129, 40, 128),
    (1, 8, 129),
    (17, 1, 5),
    (64, 33, 1),
    (130, 24, 5000),
]


def nll_and_lse(p, impl, **options):
    return linear_cross_entropy(
        p.e,
        p.c,
        p.targets,
        p.bias,
        softcap=p.softcap,
        reduction="none",
        return_lse=True,
        impl=impl,
        **options,
    )


def check(p, impl, **options):
    g_nll, g_lse = upstream(p)
    exact, same = oracle(p, g_nll, g_lse), dense(p, g_nll, g_lse)
    p = p.leaves()
    nll, lse = nll_and_lse(p, impl, **options)
    assert nll.dtype == lse.dtype == torch.promote_types(p.e.dtype, torch.float32)
    got = gradients(nll, lse, p, g_nll, g_lse)
    # nll is a difference of two numbers of lse's size: its rounding is lse's.
    tiny = 1e-6 * max(1.0, (exact[1].norm() / exact[0].norm().clamp(min=1e-30)).item())
    assert_as_good_as_dense(nll, same[0], exact[0], tiny)
    assert_as_good_as_dense(lse, same[1], exact[1])
    for x, s, t, leaf in zip(got, same[2], exact[2], p.inputs, strict=True):
        assert x.dtype == leaf.dtype and x.shape == leaf.shape
        assert_as_good_as_dense(x, s, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_matches_the_oracle(shape, dtype, device):
    check(peaked(*shape, dtype=dtype, device=device), "cce_exact")


@pytest.mark.parametrize("impl", ["cce_exact", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"bias": True}, {"softcap": 4.0}, {"ignored": 0.5}, {"bias": True, "softcap": 4.0, "ignored": 0.2}],
)
def test_options_match_the_oracle(options, dtype, impl, device):
    check(peaked(257, 48, 700, dtype=dtype, device=device, **options), impl)


def test_torch_compile_matches_the_oracle():
    check(peaked(65, 24, 300, bias=True, softcap=5.0, ignored=0.2), "torch_compile")


def test_shapes_past_one_block(device, monkeypatch):
    """Blocks small enough that every loop of the portable path runs several times, with tails."""
    from cce_ext import classifier

    monkeypatch.setattr(classifier, "BLOCK_LOGITS", {"cpu": 1 << 13, "cuda": 1 << 13})
    monkeypatch.setattr(classifier, "BLOCK_ROWS", 32)
    p = peaked(411, 32, 1500, device=device, ignored=0.1, bias=True)
    for impl in ("cce_exact", "cce_threshold"):
        check(p, impl)
    check(p, "cce", filter_e_grad=False, filter_c_grad=False)


def test_sides_can_be_exact(device):
    p = peaked(20, 32, 6000, device=device, dtype=torch.float64)
    g_nll, g_lse = upstream(p)
    d_e, d_c = oracle(p, g_nll, g_lse)[2]
    for impl, options, e_is_exact, c_is_exact in (
        ("cce", {"filter_e_grad": False}, True, False),
        ("cce", {"filter_c_grad": False}, False, True),
        ("cce_kahan", {}, False, False),
        ("cce_kahan_full_e", {}, True, False),
        ("cce_kahan_full_c", {}, False, True),
        ("cce_kahan_full_c", {"filter_e_grad": False}, True, True),
        ("cce", {"filter_eps": None}, True, True),
        ("cce_threshold", {"filter_eps": None}, True, True),
        ("cce_threshold", {"filter_eps": 1e-2, "filter_c_grad": False}, False, True),
    ):
        q = p.leaves()
        got = gradients(*nll_and_lse(q, impl, **options), q, g_nll, g_lse)
        assert (error(got[0], d_e) < 1e-12) == e_is_exact, (impl, options)
        assert (error(got[1], d_c) < 1e-12) == c_is_exact, (impl, options)


def test_threshold_drops_blocks_and_only_small_entries(device):
    """Against the filter written out densely: a 128 x 128 block goes where every |p - onehot| is under eps."""
    eps = 0.5
    p = peaked(300, 32, 12000, device=device, dtype=torch.float64, ignored=0.1)
    counts = p.targets != -100
    z = p.e @ p.c.T
    dz = z.softmax(1) - F.one_hot(p.targets.clamp(min=0), len(p.c))
    dz[~counts] = 0
    blocks = F.pad(dz, (0, -len(p.c) % 128, 0, -len(p.e) % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    keep = blocks.abs().amax((1, 3), keepdim=True) >= eps
    assert 0 < keep.float().mean() < 0.9
    dz = (blocks * keep).flatten(2).flatten(0, 1)[: len(p.e), : len(p.c)]
    q = p.leaves()
    linear_cross_entropy(q.e, q.c, q.targets, impl="cce_threshold", filter_eps=eps, reduction="sum").backward()
    torch.testing.assert_close(q.e.grad, dz @ p.c)
    torch.testing.assert_close(q.c.grad, dz.T @ p.e)


def test_large_offsets_of_the_logits_change_nothing(device):
    """The map is relative to the label: a shift of all logits costs the sampled gradient no precision."""
    p = peaked(100, 16, 1000, device=device, dtype=torch.float64, bias=True)
    results = []
    for offset in (0.0, 3000.0):
        q = p.leaves()
        torch.manual_seed(0)
        loss = linear_cross_entropy(q.e, q.c, q.targets, q.bias + offset)
        results.append([loss, *torch.autograd.grad(loss, [q.e, q.c])])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_threshold"])
def test_masked_vocabulary(impl, device):
    """A bias of -inf takes entries, here whole tiles and whole blocks, out of the vocabulary."""
    p = peaked(50, 16, 9000, device=device, bias=True)
    p.bias[100:8500] = -float("inf")
    p.targets.copy_(p.targets % 100)
    exact = oracle(p, *upstream(p))
    q = p.leaves()
    nll, lse = nll_and_lse(q, impl)
    got = gradients(nll, lse, q, *upstream(p))
    assert error(nll, exact[0]) < 1e-5 and error(lse, exact[1]) < 1e-5
    assert all(x.isfinite().all() for x in got)
    assert (got[1][100:8500] == 0).all()
