"""cce_ext.verl with a classifier whose rows are cut over the ranks, as Megatron cuts them for verl."""

from __future__ import annotations

import pytest
import torch
from support.sharded import DEVICE, assert_same_everywhere
from torch import distributed as dist
from torch.nn import functional as F

from cce_ext.verl import linear_cross_entropy

ROWS, WIDTH, TOKENS = 150, 16, 24


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_tensor_parallel(ranks, reduction):
    """Outputs of the whole vocabulary, on all ranks. Of hidden's gradient each rank has a part, as verl's have."""
    torch.manual_seed(4)
    hidden = torch.randn(TOKENS, 1, WIDTH, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(ranks * ROWS, WIDTH, dtype=torch.float64, device=DEVICE)
    labels = torch.randint(ranks * ROWS, (1, TOKENS), device=DEVICE)
    at = dist.get_rank() * ROWS
    own = weight[at : at + ROWS].clone().requires_grad_()
    found = linear_cross_entropy(hidden, own, labels, 0.7, reduction, dist.group.WORLD, impl="cce_exact")
    upstream = [torch.randn_like(x) for x in found]
    of_hidden, of_rows = torch.autograd.grad(found, (hidden, own), upstream)

    weight.requires_grad_()
    logp = F.log_softmax(hidden[:, 0] @ weight.T / 0.7, -1)
    logprobs, entropy = logp.gather(-1, labels.T)[:, 0], -(logp.exp() * logp).sum(-1)
    expected = (logprobs if reduction == "none" else logprobs.mean()), entropy
    expected_of_hidden, of_weight = torch.autograd.grad(expected, (hidden, weight), upstream)
    torch.testing.assert_close(found, expected)
    for x in found:
        assert_same_everywhere(x)
    torch.testing.assert_close(of_rows, of_weight[at : at + ROWS])
    assert not torch.allclose(of_hidden, expected_of_hidden)
    dist.all_reduce(of_hidden)
    torch.testing.assert_close(of_hidden, expected_of_hidden)


def test_a_group_of_one():
    """Which is what Megatron gives without tensor parallelism."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    torch.manual_seed(4)
    hidden, weight = (torch.randn(n, WIDTH, device=DEVICE) for n in (TOKENS, ROWS))
    labels = torch.randint(ROWS, (TOKENS,), device=DEVICE)
    found = linear_cross_entropy(hidden, weight, labels, 1.0, "none", groups[dist.get_rank()])
    torch.testing.assert_close(found[0], -F.cross_entropy(hidden @ weight.T, labels, reduction="none"))
