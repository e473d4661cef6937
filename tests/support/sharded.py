"""What the files of tests/ranks share: a problem, its shards, and the comparison with one process's loss."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from torch.distributed.tensor import Replicate, Shard

from cce_ext import linear_cross_entropy, portable
from cce_ext.distributed import VocabParallelOptions
from cce_ext.sampling import TILE_COLUMNS
from support import problems
from support.problems import Problem, gradients, oracle, upstream

EXACT = ["cce_exact", "reference"]
BATCH, LENGTH, WIDTH, VOCAB = 4, 12, 16, 701
R, S = Replicate(), Shard

# Where the ranks' tensors are: CCE_RANKS_DEVICE=cuda gives each a GPU, and their group NCCL.
DEVICE = os.environ.get("CCE_RANKS_DEVICE", "cpu")
peaked = functools.partial(problems.peaked, device=DEVICE)

# Compiling takes long, and what is compiled does not depend on how many ranks there are.
two_ranks = pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2_ranks"])


def problem(dtype=torch.float64, **options) -> Problem:
    """Tokens are [N]; sequences() makes [BATCH, LENGTH] of them."""
    return peaked(BATCH * LENGTH, WIDTH, VOCAB, **{"dtype": dtype, "bias": True, "ignored": 0.2, **options})


def sequences(p: Problem) -> Problem:
    return replace(p, e=p.e.view(BATCH, LENGTH, WIDTH), targets=p.targets.view(BATCH, LENGTH))


def rows_of(x: torch.Tensor, options: VocabParallelOptions) -> torch.Tensor:
    return x[options.start : options.stop]


def shard_of(p: Problem, options: VocabParallelOptions) -> Problem:
    bias = None if p.bias is None else rows_of(p.bias, options)
    return replace(p, c=rows_of(p.c, options), bias=bias).leaves()


def run(p: Problem, options: VocabParallelOptions, g, function=linear_cross_entropy, **more):
    """nll, lse and gradients, of e, and of this rank's rows of c and bias."""
    q = shard_of(p, options)
    nll, lse = function(
        q.e,
        q.c,
        q.targets,
        q.bias,
        ignore_index=p.ignore_index,
        softcap=p.softcap,
        reduction="none",
        return_lse=True,
        vocab_parallel_options=options,
        **more,
    )
    return nll.detach(), lse.detach(), gradients(nll, lse, q, *g)


def mine(expected: list[torch.Tensor], options: VocabParallelOptions) -> list[torch.Tensor]:
    return [expected[0], *(rows_of(x, options) for x in expected[1:])]


def assert_matches(p: Problem, options: VocabParallelOptions, rtol: float = 1e-9, **more) -> None:
    g = upstream(p)
    nll, lse, grads = run(p, options, g, **more)
    nll_64, lse_64, grads_64 = oracle(p, *g)
    for x, y in zip([nll, lse, *grads], [nll_64, lse_64, *mine(grads_64, options)], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=rtol)


def assert_same_everywhere(x: torch.Tensor) -> None:
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x.contiguous())
    assert all(torch.equal(x, y) for y in others)


def spiked(n: int, v: int) -> Problem:
    """All of the probability is one column's of each tile, the same in each. All labels are in the first tile."""
    p = peaked(n, 8, v)
    c = torch.full_like(p.c, -8.0)
    c[::TILE_COLUMNS] = 0.0
    return replace(p, e=torch.ones_like(p.e), c=c, targets=p.targets % 100)


@contextmanager
def visits_alone() -> Iterator[None]:
    """No control variate, which here would have all of what is not visited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "remainders", lambda a, live, lse, share, *_: torch.zeros_like(share.log2_mass).to(a))
        yield


def all_differ(d_c: torch.Tensor) -> int:
    """Visited tiles but the first, of the ranks' gradients of as many rows, which must not be the same tiles."""
    others = [torch.empty_like(d_c) for _ in range(dist.get_world_size())]
    dist.all_gather(others, d_c)
    rest = torch.stack(others)[:, TILE_COLUMNS:]
    visited = rest.reshape(len(others), -1, TILE_COLUMNS * d_c.shape[1]).ne(0).any(2)
    assert visited.any(1).all() and not visited.all(1).any()
    assert len(visited.unique(dim=0)) == len(others)
    return int(visited.sum())
