"""What the loss is called within: torch.func.vmap, and reentrant checkpoints of models whose classifier is frozen."""

from __future__ import annotations

import pytest
import torch
from support.problems import peaked
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from cce_ext import linear_cross_entropy


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_with_a_frozen_classifier_draw_anew_each_step(reentrant):
    """Reentrant checkpointing's first forward then has nothing that requires a gradient."""
    p = peaked(200, 16, 4000)

    def gradient(run):
        e = p.e.detach().requires_grad_()
        run(lambda x: linear_cross_entropy(2 * x, p.c.detach(), p.targets, filter_eps=2.0**-4), e).backward()
        return e.grad

    torch.manual_seed(3)
    plain = [gradient(lambda loss, e: loss(e)) for _ in range(2)]
    torch.manual_seed(3)
    saved = [gradient(lambda loss, e: checkpoint(loss, e, use_reentrant=reentrant)) for _ in range(2)]
    assert not torch.equal(*plain)
    assert all(torch.equal(x, y) for x, y in zip(plain, saved, strict=True))


@pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_threshold", "reference"])
def test_the_gradient_of_vmap(impl):
    """Of tensors that require it outside of the vmap, which they do not show inside of it."""
    p = peaked(30, 16, 2000)
    targets = torch.stack([p.targets, p.targets.flip(0)])

    def loss(e, t):
        return linear_cross_entropy(e, p.c, t, impl=impl, filter_eps=2.0**-4 if impl == "cce" else "auto")

    def gradients(several):
        e = torch.stack([p.e, 2 * p.e]).detach().requires_grad_()
        losses = several(e)
        return losses, *torch.autograd.grad(losses.sum(), e)

    looped = gradients(lambda e: torch.stack([loss(e[i], targets[i]) for i in range(2)]))
    batched = gradients(lambda e: vmap(loss, randomness="different")(e, targets))
    error = 0.3 if impl == "cce" else 1e-5  # of two draws
    for x, y in zip(batched, looped, strict=True):
        assert (x - y).norm() <= error * y.norm()
    if impl == "cce":
        assert not torch.equal(batched[1], looped[1])
        with pytest.raises(RuntimeError, match="'same' or 'different' randomness flags"):
            gradients(lambda e: vmap(loss)(e, targets))


@pytest.mark.parametrize("impl", ["cce", "reference"])
def test_targets_in_vmap(impl):
    p = peaked(30, 16, 300)
    targets = torch.stack([p.targets, p.targets.flip(0)])

    def loss(t):
        return linear_cross_entropy(p.e, p.c, t, impl=impl)

    torch.testing.assert_close(vmap(loss)(targets), torch.stack([loss(t) for t in targets]))
    targets[1, 3] = 300
    with pytest.raises(IndexError, match="targets: 300 at flat position"):
        vmap(loss)(targets)


def test_gradients_of_samples():
    """As DP-SGD takes them, of the impl that torch.func.grad is referred to."""
    p = peaked(6, 16, 300)

    def loss(c, e, t):
        return linear_cross_entropy(e[None], c, t[None], impl="reference")

    expected = [grad(loss)(p.c, e, t) for e, t in zip(p.e, p.targets, strict=True)]
    of_samples = vmap(grad(loss), in_dims=(None, 0, 0))(p.c, p.e, p.targets)
    torch.testing.assert_close(of_samples, torch.stack(expected), rtol=1e-5, atol=1e-4)
