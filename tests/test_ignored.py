"""Ignored tokens, wherever they are: the others have the loss and gradients that they have alone.

In fp32, which is the portable path on a GPU as well; the CUDA kernels' own test is test_ignored_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from support.ignored import CONTENTS, PATTERNS, alone, live_of, masked, with_rows
from support.problems import Problem, error, peaked
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

IMPLS = ["cce", "cce_exact", "cce_threshold"]
SIZES = [1, 128, 300]


def outcome(p: Problem, impl: str, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """nll, lse and the gradients of (3 nll + lse / 2) summed."""
    q = p.leaves()
    torch.manual_seed(seed)
    nll, lse = linear_cross_entropy(q.e, q.c, q.targets, q.bias, reduction="none", return_lse=True, impl=impl)
    gradients = torch.autograd.grad((3 * nll + lse / 2).sum(), q.inputs)
    return nll.detach(), lse.detach(), list(gradients)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", SIZES)
def test_as_the_live_tokens_alone(n, pattern, device):
    p = masked(peaked(n, 24, 700, device=device, bias=True), pattern)
    live = live_of(p)
    nll, lse, (of_e, of_c, of_bias) = outcome(p, "cce_exact")
    for x, y in zip((nll, lse), outcome(alone(p), "cce_exact"), strict=False):
        assert (x[~live] == 0).all()
        torch.testing.assert_close(x[live], y, rtol=1e-5, atol=1e-5)
    assert (of_e[~live] == 0).all()
    expected = outcome(alone(p), "reference")[2]
    for x, y in zip((of_e[live], of_c, of_bias), expected, strict=True):
        assert error(x, y) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_ignored_rows_hold_reaches_nothing(pattern, content, impl, device):
    """Bit for bit, the sampled gradient of one seed as well."""
    p = masked(peaked(300, 24, 700, device=device, bias=True), pattern)
    ignored = ~live_of(p)
    nll, lse, gradients = outcome(p, impl)
    other_nll, other_lse, others = outcome(with_rows(p, CONTENTS[content]), impl)
    assert torch.equal(nll, other_nll) and torch.equal(lse, other_lse)
    assert all(torch.equal(x, y) for x, y in zip(gradients, others, strict=True))
    assert (gradients[0][ignored] == 0).all() and all(g.isfinite().all() for g in gradients)
    if ignored.all():
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pattern", [x for x in PATTERNS if x != "all"])
def test_the_mean_is_over_the_live_tokens(pattern, impl, device):
    p = masked(peaked(300, 24, 700, device=device), pattern).leaves()
    loss = linear_cross_entropy(p.e, p.c, p.targets, impl=impl)
    expected = F.cross_entropy(p.e @ p.c.T, p.targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    of_e, of_c = torch.autograd.grad(loss, (p.e, p.c))
    exact_e, exact_c = torch.autograd.grad(expected, (p.e, p.c))
    tolerance = {"cce": 0.1, "cce_exact": 1e-4, "cce_threshold": 0.1}[impl]
    assert error(of_e, exact_e) < tolerance and error(of_c, exact_c) < tolerance
