"""The sampled gradient of several ranks together."""

from __future__ import annotations

import torch
from support.problems import Problem, oracle, upstream
from support.sharded import R, S, all_differ, peaked, rows_of, run, spiked, visits_alone
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from cce_ext import linear_cross_entropy
from cce_ext.distributed import VocabParallelOptions


def sampled(p: Problem, draws: int, **options) -> list[torch.Tensor]:
    """Gradients of the whole problem, a draw each along the first dimension: e's, and c's of all ranks."""
    cut = VocabParallelOptions.from_vocab(len(p.c))
    d_e, d_c = [], []
    for _ in range(draws):
        grads = run(p, cut, upstream(p), **options)[2]
        d_e.append(grads[0])
        whole = torch.zeros_like(p.c)
        rows_of(whole, cut).copy_(grads[1])
        dist.all_reduce(whole)
        d_c.append(whole)
    return [torch.stack(d_e), torch.stack(d_c)]


def test_the_sampled_gradient_is_unbiased():
    """The mean's error falls as its own spread says, and stays within it."""
    p = peaked(24, 8, 1500)
    exact = oracle(p, *upstream(p))[2]
    for draws, expected in zip(sampled(p, 240, filter_eps=2.0**-3), exact, strict=True):
        noise = (draws - draws.mean(0)).square().sum().div(len(draws) - 1).sqrt().item()
        bias = (draws.mean(0) - expected).norm().item()
        assert noise > 0.005 * expected.norm()
        # A few directions have most of the noise, so that the mean's error is not always near its expectation.
        assert bias < 2 * noise / len(draws) ** 0.5


def test_ranks_draw_of_their_own(ranks):
    """Shards that are alike, ranks that are seeded alike. A token's visits are the group's, not each rank's."""
    p = spiked(3, 32768 * ranks)
    options = VocabParallelOptions.from_vocab(len(p.c))
    with visits_alone():
        d_c = run(p, options, upstream(p), filter_eps=2.0**-4)[2][1]
    assert all_differ(d_c) < 1.4 * 3 * 15


def test_ranks_of_other_tokens_draw_of_their_own(mesh):
    """The same tokens on all ranks, seeded alike."""
    p = spiked(3, 16384)
    e, targets = (DTensor.from_local(x, mesh, [S(0)]) for x in (p.e, p.targets))
    c = distribute_tensor(p.c, mesh, [R]).requires_grad_()
    with visits_alone():
        (d_c,) = torch.autograd.grad(linear_cross_entropy(e, c, targets, filter_eps=2.0**-4), c)
    assert all_differ(d_c.to_local()) > 0
