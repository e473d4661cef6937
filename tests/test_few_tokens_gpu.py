"""Calls of few tokens on a GPU: they are launched otherwise than those of many, and both meet at 64 tokens.

Up to there no product is cuBLAS's, one kernel finds the mean token, and another both lists the rows that count and
copies them where they are small; up to 128 no memset is launched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.graphs import captured
from support.ignored import alone, live_of, masked
from support.problems import Problem, error, full_of_nan, oracle, peaked, upstream
from torch import Tensor

from cce_ext import linear_cross_entropy

pytestmark = pytest.mark.gpu

ops = torch.ops.cce
# Around the mean token's 64 runs, and the 128 threads that make zeros and rows that one block copies.
TOKENS = [1, 2, 8, 63, 64, 65, 127, 128, 129]
# From V = 12 N on the sampled method lends dE's sums room in dC.
VOCABULARIES = [200, 513, 6000]

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def problem(n: int, d: int, v: int, dtype: torch.dtype = torch.bfloat16, **options) -> Problem:
    return peaked(n, d, v, dtype=dtype, device="cuda", bias=True, **options)


def forward(p: Problem) -> tuple[Tensor, ...]:
    with full_of_nan():
        return ops.lce_forward(p.e, p.c, p.bias, p.targets, None, ignore_index=p.ignore_index, softcap=p.softcap)[:3]


def backward(p: Problem, outputs: tuple[Tensor, ...], *, portable: bool = False, **needs: bool) -> list[Tensor]:
    """portable: by the implementation in plain torch, which has no memory to poison."""
    with nullcontext() if portable else full_of_nan():
        return list(
            (ops.lce_backward_portable if portable else ops.lce_backward)(
                *(*upstream(p), None, p.e, p.c, p.bias, p.targets, *outputs, None),
                torch.ones(1, dtype=torch.int64, device="cuda"),
                ignore_index=p.ignore_index,
                softcap=p.softcap,
                eps=2.0**-3,
                **({"need_bias": True} | needs),
            )
        )


@each_dtype
@pytest.mark.parametrize("d", [8, 100])
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("n", TOKENS)
def test_the_gradient_is_that_of_the_same_visits(n, v, d, dtype):
    """One seed, one map: of the portable implementation in fp64, from which only rounding differs."""
    for softcap, pattern in ((None, "none"), (6.0, "half at random"), (None, "all but the last")):
        p = masked(problem(n, d, v, dtype, softcap=softcap), pattern)
        outputs = forward(p)
        expected = backward(p.to(torch.float64), outputs, portable=True)
        for x, y in zip(backward(p, outputs), expected, strict=True):
            assert x.isfinite().all() and error(x, y) < 2e-2


@pytest.mark.parametrize("n", TOKENS)
def test_each_gradient_by_itself(n):
    p = problem(n, 40, 2000, ignored=0.3)
    outputs = forward(p)
    whole = backward(p, outputs)
    for k, name in enumerate(("need_e", "need_c", "need_bias")):
        needs = {"need_e": False, "need_c": False, "need_bias": False, name: True}
        one = backward(p, outputs, **needs)
        assert [x.numel() > 0 for x in one] == [k == 0, k == 1, k == 2]
        assert error(one[k], whole[k]) < 2e-3


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", ["half at random", "all but the last", "all but the first", "all"])
@pytest.mark.parametrize(("n", "d"), [(1, 8), (8, 64), (64, 512), (64, 520), (65, 64), (33, 4096)])
def test_what_ignored_rows_hold_reaches_nothing(n, d, pattern, value, dtype):
    p = masked(problem(n, d, 2000, dtype), pattern)
    live = live_of(p)
    dirty = replace(p, e=torch.where(live[:, None], p.e, value))
    outputs, others = forward(p), forward(dirty)
    for x, y in zip(outputs[:2], others[:2], strict=True):
        assert torch.equal(x, y) and (x[~live] == 0).all()
    if live.any():
        for x, y in zip(outputs, forward(alone(p)), strict=True):
            assert torch.equal(x[..., live], y)
    got = backward(dirty, others)
    for x, y in zip(got, backward(p, outputs), strict=True):
        assert x.isfinite().all() and error(x, y) < 2e-3
    assert (got[0][~live] == 0).all()


@pytest.mark.parametrize("n", [8, 64])
def test_a_row_that_is_not_finite_and_counts_shows(n):
    p = problem(n, 64, 2000)
    p.e[n // 2, 3] = float("nan")
    outputs = forward(p)
    assert outputs[0][n // 2].isnan() and outputs[0].isfinite().sum() == n - 1
    assert backward(p, outputs)[1].isnan().any()


def test_calls_one_after_the_other_share_nothing():
    """What a call leaves in its memory, the next one has in its own."""
    p, q = problem(8, 64, 2000), problem(100, 64, 9000)
    first = backward(p, forward(p))
    for _ in range(3):
        backward(q, forward(q))
        for x, y in zip(backward(p, forward(p)), first, strict=True):
            assert error(x, y) < 2e-3


@pytest.mark.parametrize("n", [1, 8, 64])
def test_a_step_on_a_side_stream(n):
    p = problem(n, 64, 3000).leaves()
    linear_cross_entropy(p.e, p.c, p.targets, p.bias).backward()  # a first launch waits for the device
    late = torch.zeros_like(p.e).requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            late.copy_(p.e)
        loss = linear_cross_entropy(late, p.c, p.targets, p.bias, impl="cce")
        (of_e,) = torch.autograd.grad(loss, late)
        busy = not stream.query()
    stream.synchronize()
    assert busy, "the host waited for the device"
    weights = torch.full((n,), 1 / n, device="cuda")
    exact = oracle(p, weights, torch.zeros(n, device="cuda"))
    assert abs(loss - exact[0].mean()) < 1e-4 and error(of_e, exact[2][0]) < 0.3


@pytest.mark.parametrize("n", [1, 8, 64])
def test_a_step_in_a_cuda_graph(n):
    p = problem(n, 64, 3000).leaves()

    def step():
        loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, filter_eps=2.0**-6)
        return loss, *torch.autograd.grad(loss, (p.e, p.c, p.bias))

    graph, held = captured(step)
    for seed in (1, 2):
        other = problem(n, 64, 3000, seed=seed)
        with torch.no_grad():
            for old, new in zip(
                (p.e, p.c, p.bias, p.targets), (other.e, other.c, other.bias, other.targets), strict=True
            ):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        exact = oracle(p, torch.full((n,), 1 / n, device="cuda"), torch.zeros(n, device="cuda"))
        assert abs(held[0] - exact[0].mean()) < 1e-4
        for x, y in zip(held[1:], exact[2], strict=True):
            assert error(x, y) < 0.4


@pytest.mark.skipif("CCE_KERNELS" in os.environ, reason="this is that run")
def test_all_of_this_on_the_kernels_of_older_gpus():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"CCE_KERNELS": "sm80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
