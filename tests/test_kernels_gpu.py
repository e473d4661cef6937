"""The bf16 and fp16 CUDA kernels: against the fp64 oracle, the portable implementation, and their own promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.graphs import captured
from support.problems import Problem, assert_as_good_as_dense, dense, error, oracle, peaked, uniform, upstream
from torch.nn import functional as F

from cce_ext import linear_cross_entropy
from cce_ext.sampling import LOG2_E, TILE_COLUMNS, decode_tiles, encode_tiles

pytestmark = pytest.mark.gpu

ops = torch.ops.cce
DTYPES = [torch.bfloat16, torch.float16]
METHODS = ["sampled", "exact", "threshold"]
IMPLS = ["cce", "cce_exact", "cce_threshold"]
EPS = {"sampled": 2.0**-4, "exact": 0.5, "threshold": 2.0**-12}


def problem(*shape, dtype=torch.bfloat16, **options) -> Problem:
    return peaked(*shape, dtype=dtype, device="cuda", **options)


def poison():
    """Fill what the allocator hands out next with NaN, so that what a kernel does not write shows."""
    blocks = [torch.full((2**k,), float("nan"), device="cuda") for k in (9, 12, 15, 18, 20, 22, 24) for _ in range(6)]
    del blocks


def seed_of(k: int) -> torch.Tensor:
    return torch.tensor([k], device="cuda")


def forward(p: Problem, **options):
    poison()
    given = {"ignore_index": p.ignore_index, "softcap": p.softcap}
    return ops.lce_forward(p.e, p.c, p.bias, p.targets, None, **given, **options)[:3]


def backward(p: Problem, outputs, method: str, *, op=ops.lce_backward, seed=1, upstream_of=None, **options):
    poison()
    g_nll, g_lse = upstream(p) if upstream_of is None else upstream_of
    options = {"eps": EPS[method], "need_bias": p.bias is not None} | options
    grads = op(
        *(g_nll, g_lse, None, p.e, p.c, p.bias, p.targets),
        *(*outputs, None, seed_of(seed) if method == "sampled" else None),
        ignore_index=p.ignore_index,
        softcap=p.softcap,
        method=method,
        **options,
    )
    return [g for g in grads if g.numel()]


def check(p: Problem):
    """Forward and exact backward against the oracle, with upstream gradients as small as a mean's."""
    ups = [g / len(p.e) for g in upstream(p)]
    exact, same = oracle(p, *ups), dense(p, *ups)
    outputs = forward(p)
    # nll is a difference of two numbers of lse's size: its rounding is lse's.
    tiny = 1e-6 * max(1.0, (exact[1].norm() / exact[0].norm().clamp(min=1e-30)).item())
    assert_as_good_as_dense(outputs[0], same[0], exact[0], tiny)
    assert_as_good_as_dense(outputs[1], same[1], exact[1])
    for x, s, t in zip(backward(p, outputs, "exact", upstream_of=ups), same[2], exact[2], strict=True):
        assert x.dtype == p.e.dtype
        assert_as_good_as_dense(x, s, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (256, 128, 512),
        (252, 128, 507),
        (252, 123, 507),
        (8192, 1024, 32000),
        (1, 8, 1),
        (1, 8, 5),
        (1, 1, 2),
        (129, 72, 257),
    ],
    ids=str,
)
def test_shapes(shape, dtype):
    check(problem(*shape, dtype=dtype))


@pytest.mark.parametrize("seed", range(3))
def test_fresh_random_shapes(seed):
    g = torch.Generator().manual_seed(100 + seed)
    n, d, v = (int(torch.randint(1, most, (), generator=g)) for most in (700, 500, 5000))
    check(problem(n, d, v, seed=seed, bias=bool(seed % 2), softcap=6.0 if seed else None, ignored=0.1))


def test_a_real_shape():
    check(problem(1024, 4096, 128256))


@pytest.mark.parametrize("method", METHODS)
def test_the_forward_is_bitwise_the_same(method):
    p = problem(700, 200, 9000)
    first = forward(p)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(forward(p, method=method), first, strict=True))
    nll, lse, no_map = forward(p, need_map=False)
    assert torch.equal(nll, first[0]) and torch.equal(lse, first[1]) and no_map.numel() == 0


@pytest.mark.skipif("CCE_KERNELS" in os.environ, reason="this is that run")
def test_all_of_this_on_the_kernels_of_older_gpus():
    """Hopper has kernels of its own for logits, so that nothing else here would run the other ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"CCE_KERNELS": "sm80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_inference_needs_little_memory():
    p = problem(8192, 64, 64000)
    forward(p, need_map=False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.lce_forward(p.e, p.c, None, p.targets, None, need_map=False)
    # Partial sums, the live rows' copy of e, and four numbers a token.
    partials, live_e, tokens = 3 * 2**19, p.e.nbytes, 4 * 8192 * 4
    assert torch.cuda.max_memory_allocated() - before <= partials + live_e + tokens + 4096


def test_the_map_has_mass_and_norm_of_each_tile():
    """Within a code step of those in fp64, and hardly a code differs from the portable path's."""
    p = problem(300, 64, 3000, bias=True, softcap=9.0, ignored=0.1)
    nll, _, tile_map = forward(p)
    logits = F.linear(p.e.double(), p.c.double(), p.bias.double())
    logits = 9.0 * torch.tanh(logits / 9.0)
    tiles = F.pad(logits, (0, -3000 % TILE_COLUMNS), value=-float("inf")).unflatten(1, (-1, TILE_COLUMNS))
    counts = p.targets != -100
    label = logits.gather(1, p.targets.clamp(min=0)[:, None])[:, 0].where(counts, torch.tensor(0.0, device="cuda"))
    assert tile_map.dtype == torch.int16
    share = decode_tiles(tile_map, torch.zeros_like(nll))
    log2_mass = ((tiles.logsumexp(2) - label[:, None]) * LOG2_E).T
    log2_norm = (((2 * tiles).logsumexp(2) / 2 - label[:, None]) * LOG2_E).T
    off_mass, off_norm = (share.log2_mass - log2_mass)[:, counts], (share.log2_norm - log2_norm)[:, counts]
    assert off_mass.abs().max() <= 1 / 16 + 1e-3
    # Rounded down, but for the flattest tiles: the code ends at 15/4 of a bit below the mass.
    flat = (share.log2_mass - log2_norm)[:, counts] > 15 / 4
    assert flat.any() and off_norm[~flat].max() <= 1e-3 and off_norm[flat].max() <= 1 / 4 + 1 / 16 + 1e-3
    assert off_norm.min() >= -1 / 4 - 1e-3
    twin = ops.lce_forward_portable(p.e.float(), p.c.float(), p.bias.float(), p.targets, None, softcap=9.0)[2]
    other = decode_tiles(twin, torch.zeros_like(nll))
    for x, y, step in ((share.log2_mass, other.log2_mass, 1 / 8), (share.log2_norm, other.log2_norm, 1 / 4 + 1 / 8)):
        assert (x - y)[:, counts].abs().max() <= step
    assert (tile_map != twin)[:, counts].double().mean() < 0.01
    assert torch.allclose(nll.double(), (logits.logsumexp(1) - label) * counts, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["sampled", "threshold"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "softcap": 5.0, "ignored": 0.3}], ids=["plain", "bias-softcap-ignored"]
)
def test_the_visits_are_those_of_the_portable_path(options, method, dtype):
    """One seed, one map: the same pairs with the same weights, so that only rounding differs."""
    p = problem(700, 96, 5000, dtype=dtype, **options)
    outputs = forward(p)
    eps = 2.0**-5 if method == "sampled" else 0.3
    got = backward(p, outputs, method, eps=eps)
    expected = backward(p.to(torch.float32), outputs, method, op=ops.lce_backward_portable, eps=eps)
    exact = oracle(p, *upstream(p))[2]
    for x, y, z in zip(got, expected, exact, strict=True):
        assert error(y, z) > 0.01, "the method leaves nothing out: nothing was tested"
        assert error(x, y) < 4e-3


def test_visits_past_one_chunk():
    """At a large eps all is visited: several chunks of the ring, and tiles that need more than one item."""
    p = problem(300, 64, 20000)
    outputs = forward(p)
    wrong_map = encode_tiles(*2 * [torch.full(outputs[2].shape, 100.0, device="cuda")])
    got = backward(p, (*outputs[:2], wrong_map), "sampled")
    exact, same = oracle(p, *upstream(p))[2], dense(p, *upstream(p))[2]
    for x, s, t in zip(got, same, exact, strict=True):
        assert_as_good_as_dense(x, s, t)


def test_unbiased():
    p = problem(200, 48, 3000, bias=True)
    outputs = forward(p)
    exact = oracle(p, *upstream(p))[2]
    draws = [[g.double() for g in backward(p, outputs, "sampled", seed=k)] for k in range(256)]
    for k, target in enumerate(exact):
        deviation = torch.stack([draw[k] - target for draw in draws]) / target.norm()
        one = deviation.flatten(1).norm(dim=1).square().mean().sqrt()
        many = deviation.unflatten(0, (-1, 64)).mean(1).flatten(1).norm(dim=1).square().mean().sqrt()
        # The rounding of each draw to bf16 is common to all and stays.
        assert one > 0.02 and 6.0 < one / (many.square() - 0.002**2).clamp(min=1e-12).sqrt() < 10.5


def test_a_seed_says_all():
    p = problem(500, 64, 6000)
    outputs = forward(p)
    first, again, other = (backward(p, outputs, "sampled", seed=k) for k in (5, 5, 6))
    # The sums of dE are taken in no order; dC is written once.
    assert torch.equal(first[1], again[1]) and error(first[0], again[0]) < 2e-3
    assert error(first[1], other[1]) > 0.01 and error(first[0], other[0]) > 0.01
    # The upper half of the seed counts as well.
    assert error(backward(p, outputs, "sampled", seed=5 + (1 << 40))[1], first[1]) > 0.01


@pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_threshold"])
def test_deterministic_algorithms(impl):
    """Where they are asked for, e's sampled gradient, which is summed in no fixed order, is the exact one instead."""
    p = problem(300, 64, 3000).leaves()

    def gradients(impl):
        torch.manual_seed(0)
        return torch.autograd.grad(linear_cross_entropy(p.e, p.c, p.targets, impl=impl), (p.e, p.c))

    sampled = gradients("cce")
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(impl)
        assert all(torch.equal(x, y) for x, y in zip(first, gradients(impl), strict=True))
        if impl == "cce":
            assert torch.equal(first[0], gradients("cce_exact")[0]) and torch.equal(first[1], sampled[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sides", [(True, True), (False, True), (True, False), (False, False)], ids=str)
def test_each_gradient_by_itself(method, sides):
    p = problem(300, 40, 2000, bias=True)
    outputs = forward(p)
    options = {"filter_e": sides[0], "filter_c": sides[1]}
    whole = backward(p, outputs, method, **options)
    for k, name in enumerate(("need_e", "need_c", "need_bias")):
        needs = {"need_e": False, "need_c": False, "need_bias": False, name: True}
        (alone,) = backward(p, outputs, method, **needs, **options)
        assert alone.shape == whole[k].shape and error(alone, whole[k]) < 2e-3
    exact = backward(p, outputs, "exact")
    for x, y, filtered in zip(whole, exact, (sides[0], sides[1], sides[1]), strict=True):
        if method == "sampled":
            assert (error(x, y) < 2e-3) == (not filtered)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 32, 12000), (129, 72, 3001), (1, 8, 300)], ids=str)
def test_threshold_drops_blocks_and_only_small_entries(shape, dtype):
    """Against the filter written out densely: a 128 x 128 block goes where every |p - onehot| is under eps."""
    eps, p = 0.5, problem(*shape, ignored=0.1 if shape[0] > 1 else 0.0, dtype=dtype)
    q = p.to(torch.float64)
    dz = (q.e @ q.c.T).softmax(1) - F.one_hot(q.targets.clamp(min=0), len(q.c))
    dz[q.targets == -100] = 0
    blocks = F.pad(dz, (0, -len(q.c) % 128, 0, -len(q.e) % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    keep = blocks.abs().amax((1, 3), keepdim=True) >= eps
    assert 0 < keep.double().mean() < 0.9
    dz = (blocks * keep).flatten(2).flatten(0, 1)[: len(q.e), : len(q.c)]
    ones, none = torch.ones(len(p.e), device="cuda"), torch.zeros(len(p.e), device="cuda")
    got = backward(p, forward(p), "threshold", eps=eps, upstream_of=(ones, none))
    for x, y in zip(got, (dz @ q.c, dz.T @ q.e), strict=True):
        assert error(x, y) < 4e-3


@pytest.mark.parametrize("confident", [False, True])
def test_threshold_judges_the_label_by_its_distance_from_one(confident):
    """A block in which only a label's entry is large: 1 - p decides, not p."""
    e = torch.zeros(128, 8, device="cuda").bfloat16()
    c = torch.zeros(256, 8, device="cuda").bfloat16()
    e[:, 0], c[3, 0] = 1.0, 16.0 if confident else 8.0  # p of column 3: 1 - 3e-5, or 1 - 0.08
    p = Problem(e, c, torch.full((128,), 3, device="cuda"))
    outputs = forward(p)
    ups = torch.ones(128, device="cuda"), torch.zeros(128, device="cuda")
    got = backward(p, outputs, "threshold", eps=0.01, upstream_of=ups)
    exact = backward(p, outputs, "exact", upstream_of=ups)
    # The entries of the filter's second block are far below eps in any case.
    assert (got[1][128:] == 0).all() and exact[1][128:, 0].any()
    assert torch.equal(got[1][:128], torch.zeros_like(exact[1][:128]) if confident else exact[1][:128])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["exact", "threshold"])
def test_rows_that_overlap(method, dtype):
    """Expanded e, and c whose rows overlap: no product of cuBLAS takes them as they lie."""
    p = problem(200, 64, 1500, dtype=dtype)
    p = replace(p, e=p.e[:1].expand(200, 64), c=p.c.flatten().as_strided((1500, 64), (8, 1)))
    copied = replace(p, e=p.e.contiguous(), c=p.c.contiguous())
    for x, y in zip(backward(p, forward(p), method), backward(copied, forward(copied), method), strict=True):
        assert error(x, y) < 2e-3


@pytest.mark.parametrize("impl", ["cce_exact", "cce_threshold"])
def test_under_autocast(impl):
    p = problem(300, 64, 3000).leaves()
    results = []
    for enabled in (False, True):
        with torch.autocast("cuda", torch.float16, enabled=enabled):
            loss = linear_cross_entropy(p.e, p.c, p.targets, impl=impl)
            results.append(torch.autograd.grad(loss, (p.e, p.c)))
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype and error(x, y) < 1e-2


@pytest.mark.parametrize("impl", IMPLS)
def test_shift_reductions_and_ignored_tokens(impl):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(3, 50, 64, generator=g).cuda().bfloat16().requires_grad_()
    c = torch.randn(500, 64, generator=g).cuda().bfloat16().requires_grad_()
    t = torch.randint(0, 500, (3, 50), generator=g).cuda()
    t[1, ::3] = -100
    exact = [x.detach().double().requires_grad_() for x in (e, c)]
    for shift in (0, 1, 4):
        for reduction in ("none", "mean", "sum"):
            loss = linear_cross_entropy(e, c, t, shift=shift, reduction=reduction, impl=impl)
            z = (exact[0] @ exact[1].T)[:, : 50 - shift].flatten(0, 1)
            expected = F.cross_entropy(z, t[:, shift:].flatten(), reduction=reduction)
            torch.testing.assert_close(loss.double().flatten(), expected.flatten(), rtol=1e-5, atol=1e-4)
            grads = torch.autograd.grad(loss.sum(), (e, c))
            for x, y in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
                # These logits are random, and all blocks hold large entries: none is dropped, few are thinned.
                assert error(x, y) < 1e-2
            if shift == 0:
                assert (grads[0][1, ::3] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_whatever_flows_into_an_ignored_token_stops_there(impl):
    p = problem(60, 16, 300)
    p = replace(p, ignore_index=7, targets=p.targets.clone())
    p.targets[::3] = 7
    q = p.leaves()
    loss = linear_cross_entropy(q.e, q.c, q.targets, ignore_index=7, reduction="none", impl=impl)
    g = torch.full_like(loss, float("nan"))
    g[torch.arange(60) % 3 != 0] = 1.0
    loss.backward(g)
    assert (q.e.grad[::3] == 0).all() and q.e.grad.isfinite().all() and q.c.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [5, 0])
def test_nothing_counts(impl, n):
    e = torch.randn(n, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(200, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.full((n,), -100, device="cuda")
    assert linear_cross_entropy(e, c, t, impl=impl).isnan()
    poison()
    loss = linear_cross_entropy(e, c, t, impl=impl, reduction="sum")
    loss.backward()
    assert loss == 0 and (e.grad == 0).all() and (c.grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_targets(impl, monkeypatch):
    q = problem(40, 16, 200).leaves()
    for bad in (200, -1, 2**40):
        q.targets[2] = bad
        loss = linear_cross_entropy(q.e, q.c, q.targets, reduction="none", impl=impl)
        assert loss.isnan().nonzero().tolist() == [[2]]
        grads = torch.autograd.grad(loss.sum(), (q.e, q.c))
        assert grads[0][2].isnan().all() and grads[0][3:].isfinite().all()
    monkeypatch.setenv("CCE_DEBUG", "1")
    with pytest.raises(IndexError, match=f"targets: {2**40} at flat position 2"):
        linear_cross_entropy(q.e, q.c, q.targets, impl=impl)


def layouts(x):
    """x with other strides; the second keeps its rows at multiples of 16 bytes."""
    yield x.T.contiguous().T
    yield torch.cat([x, x], 1)[:, : x.shape[1]]
    yield torch.stack([x, x], 1).flatten(0, 1)[::2]
    yield torch.cat([x[:, :1], x], 1)[:, 1:]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("d", [64, 20])
def test_any_layout(impl, d):
    p = problem(70, d, 900)
    results = []
    for e, c in [(p.e, p.c), *zip(layouts(p.e), layouts(p.c), strict=True)]:
        e, c = e.detach().requires_grad_(), c.detach().requires_grad_()
        torch.manual_seed(0)
        loss = linear_cross_entropy(e, c, p.targets.repeat_interleave(2)[::2].int(), impl=impl)
        results.append([loss, *torch.autograd.grad(loss, (e, c))])
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        # dE of the sampled method is summed in no order, and cuBLAS may choose by the strides.
        assert all(error(x, y) < 2e-3 for x, y in zip(other[1:], results[0][1:], strict=True))
        assert impl != "cce" or torch.equal(other[2], results[0][2])


def test_strided_rows_are_not_copied():
    """Rows of a wider tensor, 16 bytes aligned: forward and backward take them where they are."""
    wide_e, wide_c = (torch.randn(rows, 768, device="cuda").bfloat16() for rows in (512, 131072))
    e, c = wide_e[:, 128:640], wide_c[:, 128:640]
    t = torch.randint(0, 131072, (512,), device="cuda")
    outputs = ops.lce_forward(e, c, None, t, None, need_map=False)[:3]
    calls = [
        lambda: ops.lce_forward(e, c, None, t, None, need_map=False),
        lambda: ops.lce_backward(
            *(outputs[0], None, None, e, c, None, t, *outputs, None, None), method="exact", eps=0.5, need_c=False
        ),
    ]
    for call in calls:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        assert torch.cuda.max_memory_allocated() - before < 131072 * 512 * 2


@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_vocabulary(impl):
    p = problem(50, 16, 9000, bias=True)
    p.bias[100:8500] = -float("inf")
    p.targets.copy_(p.targets % 100)
    exact = oracle(p, *upstream(p))
    outputs = forward(p)
    assert error(outputs[0], exact[0]) < 1e-5 and error(outputs[1], exact[1]) < 1e-5
    got = backward(p, outputs, {"cce": "sampled", "cce_exact": "exact", "cce_threshold": "threshold"}[impl])
    assert all(x.isfinite().all() for x in got) and (got[1][100:8500] == 0).all()


def test_small_gradients_survive_fp16():
    """A mean over many tokens, without a loss scale, and one of 2^16: dz is scaled before it is rounded."""
    p = problem(400, 64, 2000, dtype=torch.float16)
    outputs = forward(p)
    for method in ("exact", "sampled"):
        plain = [g.double() for g in backward(p, outputs, method)]
        for factor in (2.0**-14, 2.0**7):
            scaled = backward(p, outputs, method, upstream_of=[g * factor for g in upstream(p)])
            for x, y in zip(scaled, plain, strict=True):
                # The result itself is fp16, whose steps are 2^-24 near 0; dE's sums are taken in no order.
                assert ((x.double() - y * factor).abs() <= 2.0**-24 + 2e-3 * y.abs().amax() * factor).all()
                assert error(x, y * factor) < 0.02


@pytest.mark.parametrize("impl", IMPLS)
def test_on_the_current_stream(impl):
    p = problem(500, 256, 4000)
    ready = linear_cross_entropy(p.e, p.c, p.targets, impl=impl)  # a first launch waits for the device
    late = torch.zeros_like(p.e).requires_grad_()
    linear_cross_entropy(late, p.c, p.targets, impl=impl).backward()
    late.grad = None
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            late.copy_(p.e)
        loss = linear_cross_entropy(late, p.c, p.targets, impl=impl)
        loss.backward()
        busy = not stream.query()
    stream.synchronize()
    assert busy, "the host waited for the device"
    assert torch.equal(loss, ready)
    own = p.e.clone().requires_grad_()
    linear_cross_entropy(own, p.c, p.targets, impl="cce_exact").backward()
    assert error(late.grad, own.grad) < (0.3 if impl == "cce" else 1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_in_a_cuda_graph(impl):
    """Forward and backward captured once; each replay reads new inputs and draws a new seed."""
    p = problem(400, 64, 5000).leaves()

    def step():
        loss = linear_cross_entropy(p.e, p.c, p.targets, impl=impl, filter_eps=2.0**-6 if impl == "cce" else "auto")
        return loss, *torch.autograd.grad(loss, (p.e, p.c))

    graph, held = captured(step)
    results = []
    for k in (1, 1, 2):
        with torch.no_grad():
            other = problem(400, 64, 5000, seed=k)
            p.e.copy_(other.e), p.c.copy_(other.c), p.targets.copy_(other.targets)
        graph.replay()
        torch.cuda.synchronize()
        results.append([x.clone() for x in held])
        exact = oracle(p, torch.full_like(held[0], 1 / 400).expand(400), torch.zeros(400, device="cuda"))
        assert abs(held[0] - exact[0].mean()) < 1e-4
        for x, y in zip(held[1:], exact[2], strict=True):
            assert error(x, y) < (0.2 if impl == "cce" else 1e-2)
    assert torch.equal(results[0][0], results[1][0])
    assert (error(results[0][2], results[1][2]) > 0.005) == (impl == "cce"), "a replay must draw anew"


def test_offsets_past_2_to_31():
    n, d, v = 2200, 2056, 1_050_000
    assert n * v > 2**31 and v * d > 2**31
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(n, d, generator=g, device="cuda").bfloat16()
    c = torch.empty(v, d, device="cuda", dtype=torch.bfloat16).normal_(0, 0.03, generator=g)
    targets = torch.randint(0, v, (n,), generator=g, device="cuda")
    targets[-1] = v - 1
    c[targets] += (e * (8.0 / d)).to(torch.bfloat16)
    lse = torch.full((n,), -float("inf"), device="cuda")
    for block in c.split(65536):
        lse = torch.logaddexp(lse, (e @ block.T).float().logsumexp(1))
    outputs = ops.lce_forward(e, c, None, targets, None)[:3]
    assert error(outputs[1], lse) < 1e-3
    ones = torch.ones(n, device="cuda")
    tail = slice(v - 3000, v)
    dz = ((e.float() @ c[tail].float().T) - outputs[1][:, None]).exp()
    inside = targets >= v - 3000
    dz[inside.nonzero()[:, 0], targets[inside] - (v - 3000)] -= 1
    expected = dz.T @ e.float()
    for method in METHODS:
        seed = seed_of(3) if method == "sampled" else None
        grad_e, grad_c, _ = ops.lce_backward(
            *(ones, None, None, e, c, None, targets, *outputs, None, seed), method=method, eps=EPS[method]
        )
        if method == "exact":
            assert error(grad_c[tail], expected) < 1e-2
        assert error(grad_c[v - 1], expected[-1]) < 5e-2
        assert grad_e.isfinite().all() and grad_e[-1].any()


def test_more_vocab_tiles_than_a_grid_is_high():
    """268 million entries are 65536 groups of 32 tiles, more than a grid's second dimension takes."""
    d, v = 8, 2**28 + 1000
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    c = torch.empty(v, d, device="cuda", dtype=torch.bfloat16).normal_(0, 0.1, generator=g)
    e = 200.0 * c[-1:]
    targets = torch.tensor([v - 1], device="cuda")
    outputs = ops.lce_forward(e, c, None, targets, None)[:3]
    lse = torch.stack([(e.float() @ block.float().T).logsumexp(1) for block in c.split(1 << 26)]).logsumexp(0)
    assert error(outputs[1], lse) < 1e-3
    ones = torch.ones(1, device="cuda")
    grad_e, grad_c, _ = ops.lce_backward(ones, None, None, e, c, None, targets, *outputs, None, seed_of(1))
    expected = ((e.float() @ c[-1:].float().T - lse).exp() - 1) * e.float()
    assert error(grad_c[-1:], expected) < 1e-2 and grad_e.isfinite().all() and grad_e.any()
    assert all(block.isfinite().all() for block in grad_c.split(1 << 26))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", IMPLS)
def test_another_device_than_the_current(impl):
    expected = None
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            p = peaked(200, 64, 3000, dtype=torch.bfloat16, device=device).leaves()
            loss = linear_cross_entropy(p.e, p.c, p.targets, impl=impl)
            grads = torch.autograd.grad(loss, (p.e, p.c))
            assert torch.cuda.current_device() == 0 and all(x.device == p.e.device for x in grads)
            expected = loss.item() if expected is None else expected
            assert loss.item() == expected
            if impl == "cce_exact":
                ups = torch.full((200,), 1 / 200, device=device), torch.zeros(200, device=device)
                assert error(grads[0], oracle(p, *ups)[2][0]) < 1e-2


def test_a_device_that_is_not_there_is_named_and_forgotten():
    """CUDA keeps an error until it is asked for: the next launch must not report this one as its own."""
    with pytest.raises(RuntimeError, match=r"cce::device_info: CUDA failed on cuda:99: invalid device ordinal$"):
        ops.device_info(99)
    check(problem(30, 8, 300))
    info = json.loads(ops.device_info(torch.cuda.current_device()))
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert info["multiprocessors"] == properties.multi_processor_count
    assert tuple(info["compute_capability"]) == (properties.major, properties.minor)


# Every pair is visited, in more chunks of work than there are buffers, so that blocks must wait for each other.
WAITING = """
import torch, cce_ext
e, c = torch.zeros(300, 64, device="cuda").bfloat16(), torch.zeros(20000, 64, device="cuda").bfloat16()
t = torch.zeros(300, device="cuda").long()
nll, lse, tiles, *_ = torch.ops.cce.lce_forward(e, c, None, t, None)
seed = torch.zeros(1, device="cuda").long()
everywhere = torch.full(tiles.shape, 100.0, device="cuda")
everywhere = cce_ext.sampling.encode_tiles(everywhere, everywhere)
torch.ops.cce.lce_backward(nll, None, None, e, c, None, t, nll, lse, everywhere, None, seed)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("milliseconds", [0, 20000])
def test_the_watchdog_says_what_a_block_waits_for(milliseconds):
    environment = os.environ | {"CCE_DEBUG": "1", "CCE_WATCHDOG_MS": str(milliseconds)}
    done = subprocess.run([sys.executable, "-c", WAITING], env=environment, capture_output=True, text=True)
    if milliseconds:
        assert done.stdout == "done\n", done.stderr
    else:
        assert re.search(
            r"lce_backward: CUDA failed on cuda:0: the watchdog of CCE_DEBUG=1 stopped the visits: item \d+ "
            r"\(work \d, strip \d+, part \d+, gate \d+\) waits for gate \d+, which \d+ items keep shut",
            done.stderr,
        ), done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": torch.zeros(5, 16).bfloat16()}, r"c must be \[V, D\] with D = 8 as in e, but is bfloat16 \[5, 16\]"),
        ({"nll": torch.zeros(4)}, r"nll must be float32 \[N\] with N = 3, but is float32 \[4\]"),
        ({"tile_map": torch.zeros(2, 3).short()}, r"tile_map must be int16 \[1, 3\], but is int16 \[2, 3\]"),
        ({"tile_map": torch.zeros(1, 3).bfloat16()}, r"tile_map must be int16 \[1, 3\], but is bfloat16 \[1, 3\]"),
        ({"seed": None}, r"seed must be one int64 on e's device for the sampled method, but is None"),
        ({"method": "best"}, r"method must be sampled, exact or threshold, but is best"),
        ({"eps": 2.0}, r"eps of the sampled method must be in \(0, 0.5\], but is 2"),
    ],
)
def test_errors_of_the_operator_name_the_argument(change, message):
    a = dict(
        e=torch.zeros(3, 8).bfloat16(),
        c=torch.zeros(5, 8).bfloat16(),
        targets=torch.zeros(3).long(),
        nll=torch.zeros(3),
        lse=torch.zeros(3),
        tile_map=torch.zeros(1, 3).short(),
        seed=torch.tensor([1]),
        method="sampled",
        eps=2.0**-7,
    )
    a.update(change)
    a = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    with pytest.raises(RuntimeError, match=message):
        ops.lce_backward(
            *(a["nll"], None, None, a["e"], a["c"], None, a["targets"], a["nll"], a["lse"], a["tile_map"], None),
            a["seed"],
            method=a["method"],
            eps=a["eps"],
        )


def test_the_worst_data_is_right_too():
    """E = 0: flat tiles, whose share of dE the control variate has, visited or not. (Its dC is 0.)"""
    p = uniform(1000, 64, 20000, dtype=torch.bfloat16, device="cuda")
    outputs = forward(p)
    draws = [backward(p, outputs, "sampled", seed=k, need_c=False)[0].double() for k in range(16)]
    exact = oracle(p, *upstream(p))[2][0]
    for draw in draws:
        assert error(draw, exact) < 4e-3
