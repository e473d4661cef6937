"""ignore_index=None: all tokens count."""

from __future__ import annotations

import pytest
import torch
from support.problems import peaked
from torch import Tensor
from torch.nn import functional as F

from cce_ext import compute_z_loss, linear_cross_entropy, linear_logprobs

EAGER = ["cce", "cce_exact", "cce_threshold", "reference"]
ALL = ("entropy", "is_top1", "log_sum_sq_probs", "mean_logits", "max_logprob")


def results(function, p, ignore_index, impl, **options) -> list[Tensor]:
    """What it returns, and gradients of its first result, of the same draws."""
    torch.manual_seed(0)
    given = {"ignore_index": ignore_index, "impl": impl, **options}
    out = function(p.e, p.c, p.targets, p.bias, **given)
    return [*out, *torch.autograd.grad(out[0].sum(), p.inputs)]


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("n", [1, 64])
def test_the_same_bits_as_with_one(impl, n, device):
    """Where no token is ignored."""
    p = peaked(n, 24, 700, device=device, bias=True).leaves()
    for function, options in (
        (linear_cross_entropy, {"reduction": "mean", "return_lse": True}),
        (linear_cross_entropy, {"reduction": "none", "return_lse": True, "label_smoothing": 0.1}),
        (linear_logprobs, {"outputs": ALL, "temperature": torch.full((n,), 0.7, device=device)}),
    ):
        got, expected = (results(function, p, index, impl, **options) for index in (None, -100))
        for x, y in zip(got, expected, strict=True):
            # On a GPU a draw adds to dE in no fixed order.
            assert torch.equal(x, y) or (device == "cuda" and torch.allclose(x, y, rtol=1e-4, atol=1e-6))


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1, "weight": True}], ids=["", "weight"])
def test_what_a_shift_leaves_without_a_label(impl, reduction, more, device):
    """It counts for nothing, and what its hidden state holds reaches nothing."""
    p = peaked(24, 16, 300, device=device)
    e, targets = p.e.view(2, 12, 16).clone(), p.targets.view(2, 12)
    weight = {"weight": torch.rand(300, device=device)} if more.get("weight") else {}
    options = {**more, **weight, "reduction": reduction}
    given = {**options, "shift": 2, "impl": impl, "return_stats": ("correct",), "return_lse": True}
    if impl != "reference":
        e[:, -2:] = float("nan")
    e.requires_grad_()
    c = p.c.clone().requires_grad_()
    out = linear_cross_entropy(e, c, targets, ignore_index=None, **given)
    expected = F.cross_entropy((e[:, :-2] @ c.T).flatten(0, 1), targets[:, 2:].flatten(), **options)
    torch.testing.assert_close(out.loss.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    assert out.lse.shape == out.correct.shape == (2, 10)
    z_loss = compute_z_loss(out.lse, targets, 2, None, "none")
    assert torch.equal(z_loss, out.lse.square())
    if impl in ("cce_exact", "reference"):
        for x, y in zip(*(torch.autograd.grad(x.sum(), (e, c)) for x in (out.loss, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", EAGER)
def test_no_target_is_ignored(impl):
    """-100 is as any other that is no class."""
    p = peaked(9, 8, 50)
    p.targets[3] = -100
    with pytest.raises(IndexError, match=r"targets: -100 at flat position 3: not in \[0, 50\)$"):
        linear_cross_entropy(p.e, p.c, p.targets, ignore_index=None, impl=impl)
    with pytest.raises(IndexError, match="targets: -100 at flat position 3"):
        linear_logprobs(p.e, p.c, p.targets, ignore_index=None, impl=impl)
    with pytest.raises(TypeError, match=r"ignore_index: expected an integer or None, got 'none'"):
        linear_cross_entropy(p.e, p.c, p.targets, ignore_index="none", impl=impl)


@pytest.mark.parametrize("shift", [0, 1])
def test_of_several_labels_all_are_there(shift, device):
    p = peaked(24, 16, 300, device=device, bias=True).leaves()
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(300, (24, 3), generator=g).to(device)
    weights = torch.rand(24, 3, generator=g).to(device)

    def loss(index: int | None, **options) -> Tensor:
        more = {"target_weights": weights, "shift": shift, "impl": "cce_exact", "ignore_index": index, **options}
        return linear_cross_entropy(p.e.view(2, 12, 16), p.c, targets.view(2, 12, 3), p.bias, **more)

    weights = weights.view(2, 12, 3)
    for reduction in ("mean", "none"):
        got, expected = loss(None, reduction=reduction), loss(-100, reduction=reduction)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        for x, y in zip(*(torch.autograd.grad(x.sum(), p.inputs) for x in (got, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    targets[4, 1] = -100
    with pytest.raises(IndexError, match="targets: -100"):
        loss(None) if device == "cpu" else pytest.skip("a GPU does not look")


def test_operators(device):
    """As an argument of the operators, also where they are traced."""
    p = peaked(20, 16, 300, device=device)
    expected = linear_cross_entropy(p.e, p.c, p.targets, impl="cce_exact")
    op = torch.ops.cce.linear_cross_entropy
    assert torch.equal(op(p.e, p.c, p.targets, None, None, impl="cce_exact"), expected)
    seed = torch.tensor([1], device=device)
    leaf = p.leaves()
    torch.library.opcheck(
        torch.ops.cce.lce_forward.default, (leaf.e, leaf.c, None, p.targets, seed), {"ignore_index": None}
    )
