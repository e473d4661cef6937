"""The CUDA kernels of 16 bits on ranks that have a GPU each: CCE_RANKS_DEVICE=cuda pytest tests/ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import error, oracle, upstream
from support.sharded import DEVICE, R, S, assert_same_everywhere, mine, peaked, run
from torch import distributed as dist
from torch.distributed.tensor import distribute_tensor

from cce_ext import linear_cross_entropy, linear_logprobs
from cce_ext.distributed import VocabParallelOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="the ranks have no GPU each: CCE_RANKS_DEVICE=cuda gives them"),
]

N, D, V = 512, 128, 40000
each_impl = pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_threshold"])


def problem(**options):
    return peaked(N, D, V, dtype=torch.bfloat16, bias=True, ignored=0.2, **options)


@each_impl
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_loss_and_gradients(impl, softcap):
    p = problem(softcap=softcap)
    options = VocabParallelOptions.from_vocab(V)
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    nll_64, lse_64, grads_64 = oracle(p, *g)
    torch.testing.assert_close(nll.double(), nll_64, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(lse.double(), lse_64, rtol=1e-5, atol=2e-4)
    for x in (nll, lse, grads[0]):
        assert_same_everywhere(x)
    for x, y in zip(grads, mine(grads_64, options), strict=True):
        assert error(x, y) < (0.1 if impl == "cce" else 0.01)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_8_bit_scan(softcap):
    """Each shard is corrected by draws of its own, before the ranks' sums are joined."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the 8-bit scan takes compute capability 9.0")
    p = problem(softcap=softcap)
    options = VocabParallelOptions.from_vocab(V)
    g = upstream(p)
    nll, lse, grads = run(p, options, g, scan="fp8")
    nll_64, lse_64, grads_64 = oracle(p, *g)
    for x, y in ((nll, nll_64), (lse, lse_64)):
        off = x.double() - y
        assert off.abs().max() < 0.06 and off.square().mean().sqrt() < 0.01
    for x in (nll, lse, grads[0]):
        assert_same_everywhere(x)
    for x, y in zip(grads, mine(grads_64, options), strict=True):
        assert error(x, y) < 0.1


def test_unbiased_over_the_ranks():
    """The control variate of each shard, and draws of its own."""
    p = problem()
    options = VocabParallelOptions.from_vocab(V)
    g = upstream(p)
    exact = mine(oracle(p, *g)[2], options)
    means, errors = [torch.zeros_like(x, dtype=torch.float32) for x in exact], {}
    for k in range(64):
        for mean, x in zip(means, run(p, options, g, filter_eps=2.0**-4)[2], strict=True):
            mean += x.float()
        if k + 1 in (4, 64):
            errors[k + 1] = [error(mean / (k + 1), x) for mean, x in zip(means, exact, strict=True)]
    for few, many in zip(errors[4], errors[64], strict=True):
        assert many < 0.35 * few + 0.01, errors


@each_impl
def test_logprobs(impl):
    p = problem()
    whole, part = p.leaves(), p.leaves()
    cut = VocabParallelOptions.from_vocab(V)
    rows = slice(cut.start, cut.stop)
    outputs = ("entropy", "is_top1", "log_sum_sq_probs", "mean_logits", "max_logprob")
    exact = linear_logprobs(
        whole.e.double(), whole.c.double(), whole.targets, whole.bias.double(), temperature=0.7, outputs=outputs,
        impl="reference",
    )  # fmt: skip
    c, bias = (x.detach()[rows].clone().requires_grad_() for x in (part.c, part.bias))
    got = linear_logprobs(
        part.e, c, part.targets, bias, temperature=0.7, outputs=outputs, impl=impl, vocab_parallel_options=cut
    )
    for x, y in zip(got, exact, strict=True):
        if x.dtype != torch.bool:
            torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=3e-4)
        assert_same_everywhere(x.detach())
    assert (got.is_top1 == exact.is_top1).float().mean() > 0.99
    (exact.logprobs - 0.1 * exact.entropy).sum().backward()
    (got.logprobs - 0.1 * got.entropy).sum().backward()
    for x, y in ((part.e.grad, whole.e.grad), (c.grad, whole.c.grad[rows]), (bias.grad, whole.bias.grad[rows])):
        assert error(x, y) < (0.1 if impl == "cce" else 0.01)


@pytest.mark.parametrize("placements", [([R], [S(0)], [R]), ([S(0)], [S(0)], [S(0)]), ([S(0)], [R], [S(0)])], ids=str)
def test_dtensors(mesh, placements):
    p = replace(problem(), bias=None)
    e, c, targets = (distribute_tensor(x, mesh, at) for x, at in zip((p.e, p.c, p.targets), placements, strict=True))
    e.requires_grad_()
    c.requires_grad_()
    linear_cross_entropy(e, c, targets, impl="cce_exact", reduction="sum").full_tensor().backward()
    g = torch.where(p.targets == p.ignore_index, 0.0, 1.0)
    exact = oracle(p, g, torch.zeros_like(g))[2]
    for x, y in zip((e.grad, c.grad), exact, strict=True):
        assert error(x.full_tensor(), y) < 0.01


def test_replicated_ranks_are_bitwise_the_same():
    """Seeded alike, with the same tokens and rows: as data-parallel ranks that only mirror each other are."""
    p = problem().leaves()
    torch.manual_seed(7)
    linear_cross_entropy(p.e, p.c, p.targets, p.bias).backward()
    assert_same_everywhere(p.c.grad)


def test_ranks_of_other_tokens_draw_of_their_own():
    """With mean_group, ranks that are seeded alike."""
    p = problem().leaves()
    torch.manual_seed(7)
    linear_cross_entropy(p.e, p.c, p.targets, p.bias, mean_group=dist.group.WORLD).backward()
    others = [torch.empty_like(p.c.grad) for _ in range(dist.get_world_size())]
    dist.all_gather(others, p.c.grad)
    assert not any(x.equal(others[0]) for x in others[1:])
