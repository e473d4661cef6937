"""Ignored tokens in the bf16 and fp16 CUDA kernels: what they hold reaches nothing, and their number may change.

The loss of a live token is the same bit for bit, whatever is in the rows of ignored ones, and without them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.graphs import captured
from support.ignored import CONTENTS, PATTERNS, alone, live_of, masked, with_rows
from support.problems import Problem, assert_as_good_as_dense, dense, error, full_of_nan, oracle, peaked, upstream
from torch import Tensor

from cce_ext import linear_cross_entropy, linear_logprobs
from cce_ext.measure import peak_memory
from cce_ext.options import Options, resolve_method

pytestmark = pytest.mark.gpu

ops = torch.ops.cce
DTYPES = [torch.bfloat16, torch.float16]
IMPLS = ["cce", "cce_exact", "cce_threshold"]
# N, D, V: whole and partial blocks of 128 tokens. From V = 12 N on the sampled method lends dE's sums room in dC.
SHAPES = [(1, 64, 700), (127, 64, 2000), (384, 64, 2000), (300, 72, 6000), (517, 64, 3000)]

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def problem(shape: tuple[int, int, int], pattern: str, dtype: torch.dtype = torch.bfloat16, **options) -> Problem:
    return masked(peaked(*shape, dtype=dtype, device="cuda", bias=True, **options), pattern)


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    with full_of_nan():
        return ops.lce_forward(p.e, p.c, p.bias, p.targets, None, ignore_index=p.ignore_index, softcap=p.softcap)[:3]


def backward(p: Problem, outputs: tuple[Tensor, ...], impl: str, seed: Tensor | None = None) -> list[Tensor]:
    """dE, dC and dbias. seed: of the sampled method, 1 by default."""
    method = resolve_method(Options(impl=impl), p.e.dtype)
    seed = torch.ones(1, dtype=torch.int64, device="cuda") if seed is None else seed
    with full_of_nan():
        return list(
            ops.lce_backward(
                *(*upstream(p), None, p.e, p.c, p.bias, p.targets, *outputs, None, seed if method.draws else None),
                ignore_index=p.ignore_index,
                softcap=p.softcap,
                method=method.name,
                eps=method.eps,
                need_bias=True,
            )
        )


def assert_same_loss(outputs: tuple[Tensor, ...], others: tuple[Tensor, ...], live: Tensor) -> None:
    """nll, lse and map of the live tokens bit for bit; 0 of the others."""
    for x, y in zip(outputs[:2], others[:2], strict=True):
        assert torch.equal(x[live], y[live]) and (x[~live] == 0).all() and (y[~live] == 0).all()
    assert torch.equal(outputs[2], others[2]) and (outputs[2][:, ~live] == 0).all()


@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (1100, 64, 40000), (20000, 8, 300)], ids=str)
@each_pattern
def test_a_live_token_has_the_loss_that_it_has_alone(pattern, shape, dtype):
    """The device chooses the splits of the columns as for so many tokens, so that all sums have the same order."""
    p = problem(shape, pattern, dtype)
    live = live_of(p)
    if not live.any():
        pytest.skip("no token is live")
    for x, y in zip(forward(p), forward(alone(p)), strict=True):
        assert torch.equal(x[..., live], y)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_pattern
def test_against_fp64(pattern, shape, dtype):
    """Loss and exact gradient of the live tokens are those that they have alone; all of the others' is 0."""
    p = problem(shape, pattern, dtype)
    live, outputs = live_of(p), forward(p)
    of_e, *others = backward(p, outputs, "cce_exact")
    assert all((x[~live] == 0).all() for x in (*outputs[:2], of_e))
    assert all(x.isfinite().all() for x in (of_e, *others))
    if not live.any():
        assert all((x == 0).all() for x in others)
        return
    q, ups = alone(p), [g[live] for g in upstream(p)]
    exact, same = oracle(q, *ups), dense(q, *ups)
    tiny = 1e-6 * max(1.0, (exact[1].norm() / exact[0].norm().clamp(min=1e-30)).item())
    assert_as_good_as_dense(outputs[0][live], same[0], exact[0], tiny)
    assert_as_good_as_dense(outputs[1][live], same[1], exact[1])
    for x, s, t in zip((of_e[live], *others), same[2], exact[2], strict=True):
        assert_as_good_as_dense(x, s, t)
    # Alone they are other blocks, and the loss may be rounded otherwise, but no more than that.
    for x, y in zip(outputs, forward(q)[:2], strict=False):
        torch.testing.assert_close(x[live], y, rtol=1e-5, atol=2e-5)


@each_impl
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("content", CONTENTS)
@each_pattern
def test_what_ignored_rows_hold_reaches_nothing(pattern, content, softcap, impl):
    p = problem((300, 72, 6000), pattern, softcap=softcap)
    live = live_of(p)
    q = with_rows(p, CONTENTS[content])
    outputs, others = forward(p), forward(q)
    assert_same_loss(outputs, others, live)
    expected, got = backward(p, outputs, impl), backward(q, others, impl)
    for x, y in zip(got, expected, strict=True):
        assert x.isfinite().all() and error(x, y) < 2e-3
    assert (got[0][~live] == 0).all() and (expected[0][~live] == 0).all()
    assert live.any() or all((x == 0).all() for x in got)


@each_dtype
@each_impl
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", ["half at random", "spans", "all but one in the middle", "the last block"])
def test_nan_at_other_shapes(pattern, shape, impl, dtype):
    p = problem(shape, pattern, dtype)
    live, q = live_of(p), with_rows(p, CONTENTS["NaN"])
    outputs, others = forward(p), forward(q)
    assert_same_loss(outputs, others, live)
    got = backward(q, others, impl)
    for x, y in zip(got, backward(p, outputs, impl), strict=True):
        assert x.isfinite().all() and error(x, y) < 2e-3
    assert (got[0][~live] == 0).all()


@each_impl
@pytest.mark.parametrize("where", ["nll", "lse", "both"])
@pytest.mark.parametrize("pattern", ["half at random", "spans", "all but the last", "all"])
def test_what_flows_into_ignored_tokens_reaches_nothing(pattern, where, impl):
    """Gradients of their nll and lse that are NaN, together with rows of e that are."""
    p = with_rows(problem((300, 72, 6000), pattern), CONTENTS["NaN"]).leaves()
    live = live_of(p)
    results = []
    for value in (0.0, float("nan")):
        torch.manual_seed(0)
        nll, lse = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction="none", return_lse=True, impl=impl)
        named = zip(("nll", "lse"), upstream(p), strict=True)
        ups = [g.where(live, value if where in (name, "both") else 0.0) for name, g in named]
        results.append(torch.autograd.grad((nll, lse), p.inputs, ups))
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all() and error(y, x) < 2e-3
    assert all((x[0][~live] == 0).all() for x in results)


# ---- ignore_index=None ----


@each_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (1100, 64, 40000), (20000, 8, 300)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"stats": 15}, {"stats": 9, "need_map": False, "batch_invariant": True}], ids=str
)
def test_where_all_count_e_itself_is_read(shape, options, dtype):
    """As with an ignore_index that no token has, bit for bit. Targets that are no classes make NaN, -100 as well."""
    p = problem(shape, "none", dtype, softcap=9.0)

    def outputs(targets: Tensor, ignore_index: int | None) -> list[Tensor]:
        with full_of_nan():
            given = {"ignore_index": ignore_index, "softcap": p.softcap, **options}
            return ops.lce_forward(p.e, p.c, p.bias, targets, None, **given)

    expected = outputs(p.targets, -100)
    for x, y in zip(outputs(p.targets, None), expected, strict=True):
        assert torch.equal(x, y)
    targets = p.targets.clone()
    targets[-1] = -100
    nll, lse, *_ = outputs(targets, None)
    assert nll[-1].isnan() and torch.equal(lse, expected[1]) and torch.equal(nll[:-1], expected[0][:-1])


@each_impl
def test_gradients_where_all_count(impl):
    p = problem((300, 72, 6000), "none").leaves()
    results = []
    for ignore_index in (None, -100):
        torch.manual_seed(0)
        loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, impl=impl, ignore_index=ignore_index)
        results.append([loss.detach(), *torch.autograd.grad(loss, p.inputs)])
    (loss, d_e, *others), expected = results
    assert torch.equal(loss, expected[0]) and error(d_e, expected[1]) < 2e-3  # a draw's sums have no order
    assert all(torch.equal(x, y) for x, y in zip(others, expected[2:], strict=True))


@pytest.mark.parametrize("outputs, most", [((), 2.0), (("entropy",), 3.2)], ids=["logprobs", "entropy"])
def test_scoring_needs_no_copy(outputs, most):
    """MB besides the outputs, where a copy of e takes 16: up to 1.5 for each kind of partial sums, and the tokens'."""
    g = torch.Generator("cuda").manual_seed(0)
    e, c = (torch.randn(n, 1024, generator=g, device="cuda", dtype=torch.bfloat16) for n in (8192, 151936))
    targets = torch.randint(151936, (8192,), generator=g, device="cuda")

    def score():
        with torch.no_grad():
            return linear_logprobs(e, c, targets, ignore_index=None, outputs=outputs)

    held = sum(x.untyped_storage().nbytes() for x in score() if x is not None)
    assert peak_memory(score, "cuda") - held / 2**20 <= most


# ---- CUDA graphs ----

# One after the other: more ignored tokens, fewer, none, all, and some again.
REPLAYS = ["none", "half at random", "spans", "all but one in the middle", "all", "the first block", "none", "one"]


@each_impl
@pytest.mark.parametrize("first", ["none", "nine tenths at random", "all"])
def test_a_graph_whose_targets_change(first, impl):
    """The number of ignored tokens is the replay's and not the capture's; the draws of a seed are the eager call's."""
    p = problem((517, 64, 7000), first)
    whole = peaked(517, 64, 7000, device="cuda", dtype=torch.bfloat16, bias=True)
    seed = torch.ones(1, dtype=torch.int64, device="cuda")
    method = resolve_method(Options(impl=impl), p.e.dtype)
    ups = upstream(p)

    def step():
        outputs = ops.lce_forward(p.e, p.c, p.bias, p.targets, None)[:3]
        seeds = seed if method.draws else None
        options = {"method": method.name, "eps": method.eps, "need_bias": True}
        args = (*ups, None, p.e, p.c, p.bias, p.targets, *outputs, None, seeds)
        return *outputs, *ops.lce_backward(*args, **options)

    graph, results = captured(step)
    for k, pattern in enumerate(REPLAYS):
        target = with_rows(masked(whole, pattern), CONTENTS["NaN"])
        p.targets.copy_(target.targets)
        p.e.copy_(target.e)
        seed.fill_(k)
        for x in results:
            x.fill_(-7)
        graph.replay()
        torch.cuda.synchronize()
        live = live_of(p)
        outputs = forward(p)
        gradients = backward(p, outputs, impl, seed)
        assert_same_loss(tuple(results[:3]), outputs, live)
        for x, y in zip(results[3:], gradients, strict=True):
            assert x.isfinite().all() and error(x, y) < 2e-3, pattern
        assert (results[3][~live] == 0).all(), pattern


@each_impl
def test_a_graph_of_the_function(impl):
    """The mean of what counts in each replay, NaN where nothing does, as eager."""
    p = problem((517, 64, 3000), "none").leaves()
    whole = p.targets.clone()

    def step():
        loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, impl=impl)
        return loss, *torch.autograd.grad(loss, p.inputs)

    graph, results = captured(step)
    for pattern in REPLAYS:
        p.targets.copy_(masked(replace(p, targets=whole), pattern).targets)
        graph.replay()
        torch.cuda.synchronize()
        live = live_of(p)
        loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, impl=impl)
        torch.testing.assert_close(results[0], loss, rtol=0.0, atol=0.0, equal_nan=True)
        assert results[0].isnan() == (not live.any())
        if live.any():
            assert (results[1][~live] == 0).all() and all(x.isfinite().all() for x in results[1:])
            expected = torch.autograd.grad(
                linear_cross_entropy(p.e, p.c, p.targets, p.bias, impl="cce_exact"), p.inputs
            )
            for x, y in zip(results[1:], expected, strict=True):
                assert error(x, y) < (0.2 if impl == "cce" else 1e-2), pattern


@pytest.mark.skipif("CCE_KERNELS" in os.environ, reason="this is that run")
def test_all_of_this_on_the_kernels_of_older_gpus():
    """Hopper has kernels of its own for logits, so that nothing else here would run the other ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"CCE_KERNELS": "sm80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
