"""return_stats: accuracy and entropy of the loss's own pass over the logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import Problem, peaked
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cce_ext import LinearCrossEntropy, LossStats, linear_cross_entropy, linear_logprobs

EAGER = ["cce", "cce_exact", "cce_threshold", "reference"]
BOTH = ("correct", "entropy")


def dense(p: Problem) -> tuple[Tensor, Tensor]:
    """By argmax and by the definition, in fp64."""
    p = p.to(torch.float64)
    counts = p.targets != p.ignore_index
    z = F.linear(p.e.masked_fill(~counts[:, None], 0.0), p.c, p.bias)
    z = z if p.softcap is None else p.softcap * torch.tanh(z / p.softcap)
    log_p = z.log_softmax(1)
    return (z.argmax(1) == p.targets) & counts, -(log_p.exp() * log_p).sum(1).masked_fill(~counts, 0.0)


def stats(p: Problem, **options) -> LossStats:
    options = {"softcap": p.softcap, "reduction": "none", "return_stats": BOTH, **options}
    return linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("n", [1, 60])
def test_as_dense(impl, softcap, n, device):
    """Ignored tokens hold NaN, and are neither correct nor uncertain."""
    p = peaked(n, 24, 1500, device=device, bias=True, softcap=softcap, ignored=0.2 if n > 1 else 0.0)
    p = replace(p, e=p.e.masked_fill((p.targets == -100)[:, None], float("nan"))).leaves()
    found = stats(p, impl=impl, return_lse=True)
    correct, entropy = dense(p)
    assert torch.equal(found.correct, correct) and (n == 1 or correct.any())
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=2e-5)
    loss, lse = linear_cross_entropy(
        *(p.e, p.c, p.targets, p.bias), softcap=softcap, reduction="none", return_lse=True, impl=impl
    )
    torch.testing.assert_close((found.loss, found.lse), (loss, lse), rtol=1e-6, atol=1e-6)
    assert found.loss.requires_grad and found.lse.requires_grad
    assert not found.correct.requires_grad and not found.entropy.requires_grad


def test_what_is_not_asked_for_is_none(device):
    p = peaked(20, 16, 300, device=device)
    assert stats(p)[1] is None
    assert stats(p, return_stats=("correct",))[3] is None
    assert stats(p, return_stats=("entropy",), reduction="mean")[2] is None
    assert isinstance(stats(p, return_stats=()), Tensor)
    assert len(stats(p, return_stats=(), return_lse=True)) == 2


def test_the_first_of_equal_ones_is_the_largest(device):
    p = peaked(8, 16, 600, device=device)
    c = p.c.clone()
    c[3] = c[77] = c[401] = 20 * p.e[0]
    p = replace(p, e=p.e[:1].expand(8, -1), c=c, targets=torch.tensor([3, 77, 401, 3, 5, 599, 0, 77], device=device))
    assert stats(p, impl="cce_exact").correct.tolist() == [True, False, False, True] + [False] * 4


@pytest.mark.parametrize("impl", ["cce", "reference"])
def test_gradients_are_those_without(impl, device):
    """The entropy has none, though linear_logprobs' has: a draw of the same seed is the same."""
    p = peaked(60, 24, 3000, device=device, bias=True, ignored=0.2).leaves()

    def gradients(**options) -> list[Tensor]:
        torch.manual_seed(0)
        given = {"reduction": "mean", "impl": impl, **options}
        loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **given)
        return list(torch.autograd.grad(loss if isinstance(loss, Tensor) else loss.loss, p.inputs))

    for x, y in zip(gradients(return_stats=BOTH), gradients(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, device):
    p = peaked(30, 16, 600, device=device).leaves()
    expected = stats(p, reduction="mean", impl="cce_exact")
    (gradient,) = torch.autograd.grad(expected.loss, p.e)
    loss, _, correct, entropy = checkpoint(
        lambda e: tuple(stats(replace(p, e=e), reduction="mean", return_lse=True, impl="cce_exact")),
        p.e,
        use_reentrant=reentrant,
    )
    assert torch.equal(correct, expected.correct) and torch.equal(entropy, expected.entropy)
    loss.backward()
    assert torch.equal(p.e.grad, gradient)


def test_shift_and_the_module(device):
    p = peaked(24, 16, 300, device=device, ignored=0.2)
    e, targets = p.e.view(2, 12, 16), p.targets.view(2, 12)
    found = LinearCrossEntropy(shift=1, return_stats=BOTH, impl="cce_exact")(e, p.c, targets)
    known = linear_logprobs(e, p.c, targets, shift=1, outputs=("entropy", "is_top1"), impl="cce_exact")
    assert found.loss.shape == () and found.correct.shape == found.entropy.shape == (2, 11)
    assert torch.equal(found.correct, known.is_top1) and torch.equal(found.entropy, known.entropy)


def test_an_ignored_class(device):
    """A token that is ignored is not correct, though its label be the first column."""
    p = replace(peaked(20, 16, 300, device=device), ignore_index=0)
    p.targets[:7] = 0
    assert not stats(p, ignore_index=0, impl="cce_exact").correct[:7].any()


def test_of_several_labels_the_heaviest_counts(device):
    p = peaked(40, 16, 300, device=device)
    targets = torch.stack([torch.full_like(p.targets, 7), p.targets], 1)
    weights = torch.tensor([0.3, 0.7], device=device).expand(40, 2)
    given = {"return_stats": BOTH, "impl": "cce_exact"}
    found = linear_cross_entropy(p.e, p.c, targets, target_weights=weights, **given)
    for x, y in zip(found[2:], stats(p, impl="cce_exact")[2:], strict=True):
        torch.testing.assert_close(x, y)
    smoothed = stats(p, label_smoothing=0.1, weight=torch.rand(300, device=device), impl="cce_exact")
    assert torch.equal(smoothed.correct, found.correct)


def test_compiled(device):
    torch._dynamo.reset()
    p = peaked(30, 16, 600, device=device).leaves()
    step = torch.compile(lambda e: stats(replace(p, e=e), impl="cce_exact"), fullgraph=True, backend="aot_eager")
    found, expected = step(p.e), stats(p, impl="cce_exact")
    for x, y in ((found.loss, expected.loss), *zip(found[2:], expected[2:], strict=True)):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss.sum(), p.e) for x in (found, expected)))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"return_stats": "correct"}, TypeError, "return_stats: expected a tuple of some of correct, entropy"),
        ({"return_stats": ("accuracy",)}, ValueError, "return_stats: expected some of correct, entropy, got 'accur"),
        ({"scan": "fp8"}, ValueError, r"return_stats: expected \(\) with scan='fp8'"),
    ],
    ids=str,
)
def test_errors(options, error, message):
    p = peaked(4, 8, 10)
    with pytest.raises(error, match=message):
        stats(p, **options)
    with pytest.raises(error, match=message):
        LinearCrossEntropy(**{"return_stats": BOTH, **options})
