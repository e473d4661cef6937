"""Few tokens on CUDA: the forward keeps their logits in 16 bits, and the gradient is exact."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from support.graphs import captured
from support.ignored import CONTENTS, PATTERNS, live_of, masked, with_rows
from support.problems import Problem, assert_as_good_as_dense, dense, full_of_nan, oracle, peaked, upstream
from torch import Tensor

from cce_ext import linear_cross_entropy
from cce_ext.few_tokens import LEAST_WIDTH_OF_A_TOKEN, MOST_TOKENS

pytestmark = pytest.mark.gpu

ops = torch.ops.cce
DTYPES = [torch.bfloat16, torch.float16]
# N, D, V: whole and partial blocks of 128 tokens and of 256 columns, and a vocabulary of several chunks.
SHAPES = [(1, 64, 700), (7, 64, 255), (127, 1024, 2000), (128, 1032, 5000), (129, 1040, 1), (256, 2048, 70001)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(p: Problem, seed: int = 1, **options) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """nll, lse, what the forward kept, and dE, dC and dbias."""
    keywords = {"ignore_index": p.ignore_index, "softcap": p.softcap, "method": "exact", **options}
    with full_of_nan():
        nll, lse, kept, *_ = ops.lce_forward(p.e, p.c, p.bias, p.targets, None, keep_logits=True, **keywords)
        found = ops.lce_backward(
            *(*upstream(p, seed), None, p.e, p.c, p.bias, p.targets, nll, lse, kept, None, None),
            need_bias=p.bias is not None,
            **keywords,
        )
    return nll, lse, kept, [g for g in found if g.numel()]


def assert_right(p: Problem) -> None:
    # Codes are as coarse as 2^-11 log 2 of p, which shows beside fp16.
    tiny = 1e-3 if p.e.dtype == torch.float16 else 1e-5
    nll, lse, _, found = run(p)
    g = upstream(p)
    exact, same = oracle(p, *g), dense(p, *g)
    live = p.targets != p.ignore_index
    # A loss is a difference of two numbers of the log-sum-exp's size.
    size = exact[1].abs().max().clamp(min=1).item()
    for ours, truth in zip((nll, lse), exact[:2], strict=True):
        torch.testing.assert_close(ours[live], truth[live].float(), rtol=0, atol=1e-5 * size)
    for ours, theirs, truth in zip(found, same[2], exact[2], strict=True):
        assert_as_good_as_dense(ours, theirs, truth, tiny)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, options, dtype):
    assert_right(peaked(*shape, dtype=dtype, device="cuda", ignored=0.2, **options))


@each_dtype
@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_improbable_labels_and_large_logits(scale, dtype):
    """Codes end 64 factors of two below a tile's largest logit; a label's gradient must not, nor its slope."""
    p = peaked(40, 512, 3000, dtype=dtype, device="cuda", softcap=50.0, bias=True)
    p = replace(p, e=(p.e * scale / 9).to(dtype), targets=p.targets.flip(0))
    assert_right(p)
    assert_right(replace(p, softcap=None))


def test_one_confident_token():
    """p - 1 of a label that has nearly all of p."""
    p = peaked(1, 256, 4096, dtype=torch.bfloat16, device="cuda")
    assert_right(replace(p, e=3 * p.c[p.targets] / p.c[p.targets].norm() * 9))


@each_dtype
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ignored_tokens_reach_nothing(pattern, content, dtype):
    p = masked(peaked(200, 1600, 3000, dtype=dtype, device="cuda", bias=True), pattern)
    clean, other = run(p), run(with_rows(p, CONTENTS[content]))
    for x, y in zip(clean[:2] + tuple(clean[3]), other[:2] + tuple(other[3]), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)
    torch.testing.assert_close(other[2], clean[2], rtol=0, atol=0)
    assert other[3][0][~live_of(p)].count_nonzero() == 0


def test_masked_columns_have_no_gradient():
    p = peaked(64, 512, 3000, dtype=torch.bfloat16, device="cuda", bias=True)
    hidden = torch.zeros(3000, dtype=torch.bool, device="cuda")
    hidden[100:900] = True
    hidden[p.targets] = False
    p = replace(p, bias=p.bias.masked_fill(hidden, -torch.inf))
    *_, (d_e, d_c, d_bias) = run(p)
    assert d_c[hidden].count_nonzero() == d_bias[hidden].count_nonzero() == 0
    assert d_e.isfinite().all() and d_c.isfinite().all()


def test_what_is_not_a_number_shows():
    p = peaked(64, 512, 3000, dtype=torch.bfloat16, device="cuda")
    p.e[3, 7] = torch.nan
    nll, _, _, (d_e, d_c) = run(p)
    assert nll.isnan().nonzero().flatten().tolist() == [3]
    assert d_e[3].isnan().all() and d_c.isnan().all() and d_e[:3].isfinite().all() and d_e[4:].isfinite().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_logits_that_are_infinite_show(value):
    """With -inf all of a row's logits are, and its codes say that there is nothing in any tile."""
    p = peaked(64, 512, 3000, dtype=torch.bfloat16, device="cuda")
    p.c[:, 0] = p.c[:, 0].abs() + 0.1
    p.e[3, 0] = value
    nll, _, _, (d_e, d_c) = run(p)
    assert nll.isfinite().logical_not().nonzero().flatten().tolist() == [3]
    assert d_e[3].isnan().all() and d_c.isnan().all() and d_e[:3].isfinite().all() and d_e[4:].isfinite().all()


def test_more_tiles_than_one_grid_has_rows():
    """The codes of ignored tokens are written by a loop over tiles: all of them, also beyond its first round."""
    tiles = 1026
    p = masked(peaked(3, 64, (tiles - 1) * 256 + 1, dtype=torch.bfloat16, device="cuda"), "all but the last")
    _, _, kept, _ = run(p)
    codes, largest = kept.flatten().tensor_split([tiles * 3 * 256])
    assert codes.view(tiles, 3, 256)[:, :2].count_nonzero() == 0
    assert largest.view(tiles, 3, 2)[:, :2].count_nonzero() == 0
    assert_right(p)


@each_dtype
def test_each_side_alone(dtype):
    p = peaked(100, 1024, 3000, dtype=dtype, device="cuda", bias=True)
    *_, both = run(p)
    for needs in ({"need_c": False, "need_bias": False}, {"need_e": False}, {"need_e": False, "need_c": False}):
        keywords = {"method": "exact", "need_e": True, "need_c": True, "need_bias": True, **needs}
        nll, lse, kept, *_ = ops.lce_forward(p.e, p.c, p.bias, p.targets, None, method="exact", keep_logits=True)
        found = ops.lce_backward(
            *(*upstream(p), None, p.e, p.c, p.bias, p.targets, nll, lse, kept, None, None), **keywords
        )
        for one, x, need in zip(found, both, ("need_e", "need_c", "need_bias"), strict=True):
            assert torch.equal(one, x) if keywords[need] else one.numel() == 0


def loss_and_gradients(p: Problem, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    q = p.leaves()
    loss = linear_cross_entropy(q.e, q.c, q.targets, **options)
    return loss.detach(), torch.autograd.grad(loss, q.inputs)


@pytest.mark.parametrize(
    ("n", "d", "few"),
    [
        (MOST_TOKENS, MOST_TOKENS * LEAST_WIDTH_OF_A_TOKEN, True),
        (MOST_TOKENS + 1, MOST_TOKENS * LEAST_WIDTH_OF_A_TOKEN * 2, False),
        (16, 16 * LEAST_WIDTH_OF_A_TOKEN, True),
        (17, 16 * LEAST_WIDTH_OF_A_TOKEN, False),
    ],
)
def test_the_function_chooses(n, d, few):
    """Of few tokens the gradient has no noise, whatever the seed; a filter_eps that is a number samples."""
    p = peaked(n, d, 20000, dtype=torch.bfloat16, device="cuda")

    def drawn(seed, **options):
        torch.manual_seed(seed)
        return loss_and_gradients(p, **options)

    same = [torch.equal(x, y) for x, y in zip(drawn(0)[1], drawn(1)[1], strict=True)]
    assert same == [few, few]
    sampled = drawn(0, filter_eps=2**-4)[1], drawn(1, filter_eps=2**-4)[1]
    assert not torch.equal(sampled[0][1], sampled[1][1])


def test_without_a_gradient_nothing_is_kept():
    p = peaked(64, 512, 256 * 1024, dtype=torch.bfloat16, device="cuda")
    linear_cross_entropy(p.e, p.c, p.targets)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_cross_entropy(p.e.requires_grad_(), p.c, p.targets)
    assert torch.cuda.max_memory_allocated() - before < 2 * 64 * 256 * 1024 / 4


def test_memory_is_what_the_docs_say():
    """Beside the gradients: 2 N V bytes of logits, and 32 MB each of dz and of cuBLAS's workspace."""
    n, d, v = 256, 2048, 131072
    p = peaked(n, d, v, dtype=torch.bfloat16, device="cuda").leaves()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = torch.autograd.grad(linear_cross_entropy(p.e, p.c, p.targets), p.inputs)
        peak = torch.cuda.max_memory_allocated() - before
        gradients = sum(x.numel() * x.element_size() for x in found)
        del found
    assert peak <= gradients + 2.02 * n * v + 72 * 2**20


@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_compiled_and_in_a_graph(impl):
    p = peaked(96, 1024, 5000, dtype=torch.bfloat16, device="cuda")

    def step():
        q = p.leaves()
        loss = linear_cross_entropy(q.e, q.c, q.targets, impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss, q.inputs)]

    wanted = step()
    for x, y in zip(torch.compile(step)(), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    graph, found = captured(step)
    graph.replay()
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoint_that_enters_twice(frozen):
    """Its first pass trains nothing; both draw alike, or dropout behind the loss would have two masks."""
    p = peaked(32, 512, 3000, dtype=torch.bfloat16, device="cuda").leaves()
    c, masks = p.c.detach() if frozen else p.c, []

    def segment(e):
        loss = linear_cross_entropy(2 * e, c, p.targets, reduction="none")
        masks.append(torch.rand(32, device="cuda"))
        return (loss * masks[-1]).sum()

    torch.utils.checkpoint.checkpoint(segment, p.e, use_reentrant=True).backward()
    assert len(masks) == 2 and torch.equal(*masks)


def test_opcheck():
    p = peaked(20, 256, 700, dtype=torch.bfloat16, device="cuda").leaves()
    arguments = (p.e, p.c, None, p.targets, None)
    torch.library.opcheck(ops.lce_forward.default, arguments, {"method": "exact", "keep_logits": True})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stats": 1}, "neither stats, scale nor scan"),
        ({"scale": True}, "neither stats, scale nor scan"),
        ({}, "for method exact, but method is sampled"),
    ],
)
def test_what_the_forward_refuses(options, said):
    p = peaked(20, 256, 700, dtype=torch.bfloat16, device="cuda")
    if "scale" in options:
        options = {"scale": torch.ones(20, device="cuda")}
    with pytest.raises(RuntimeError, match=said):
        ops.lce_forward(p.e, p.c, None, p.targets, None, keep_logits=True, **options)


def test_what_the_backward_refuses():
    p = peaked(20, 256, 700, dtype=torch.bfloat16, device="cuda")
    nll, lse, kept, *_ = ops.lce_forward(p.e, p.c, None, p.targets, None, method="exact", keep_logits=True)
    one = torch.ones(20, device="cuda")
    rest = (p.e, p.c, None, p.targets, nll, lse)
    with pytest.raises(RuntimeError, match="method exact takes, but method is sampled"):
        ops.lce_backward(one, None, None, *rest, kept, None, torch.ones(1, dtype=torch.int64, device="cuda"))
    with pytest.raises(RuntimeError, match=r"must be int16 \[3, 20, 258\]"):
        ops.lce_backward(one, None, None, *rest, kept[:2], None, None, method="exact")


@pytest.mark.skipif("CCE_KERNELS" in os.environ, reason="this is that run")
def test_the_kernels_of_older_gpus():
    """All that looks at numbers."""
    numbers = "fp64 or large_logits or infinite or confident or reach_nothing or masked or number or each_side or tiles"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", numbers]
    done = subprocess.run(command, env=os.environ | {"CCE_KERNELS": "sm80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
