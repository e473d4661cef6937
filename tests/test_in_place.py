"""What users change in place, as they may what F.cross_entropy returns: losses by a mask, log-sum-exps, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.problems import Problem, peaked
from torch import Tensor

from cce_ext import linear_cross_entropy, linear_kl, linear_logprobs

EAGER = ["cce", "cce_exact", "cce_threshold", "reference"]
WITH_ENTROPY = {"return_stats": ("entropy",)}


def problem(n: int, device: str = "cpu", nan: bool = False) -> Problem:
    """nan: what ignored tokens hold."""
    p = peaked(n, 16, 1500, device=device, bias=True, ignored=0.2 if n > 1 else 0.0)
    return replace(p, e=p.e.masked_fill((p.targets == -100)[:, None] & nan, float("nan"))).leaves()


def masks(results: tuple[Tensor, ...]) -> list[Tensor]:
    """0, 1 and 2 in turn, and never 0 alone."""
    return [torch.arange(1, 1 + x.numel(), device=x.device).view(x.shape) % 3 for x in results]


def compare(p: Problem, results: Callable[[], tuple[Tensor, ...]]) -> None:
    """What is multiplied in place has the gradient of what is multiplied."""
    found = []
    for multiply in (torch.Tensor.mul, torch.Tensor.mul_):
        torch.manual_seed(0)
        out = results()
        total = sum(multiply(x, mask).sum() for x, mask in zip(out, masks(out), strict=True))
        found.append(torch.autograd.grad(total, p.inputs))
    for expected, got in zip(*found, strict=True):
        assert expected.isfinite().all() and expected.any()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("n", [1, 33])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1}, {"ignore_index": None}, WITH_ENTROPY], ids=str)
def test_losses_of_tokens(impl, n, more, device):
    all_count = "ignore_index" in more
    p = problem(n, device, nan=impl != "reference" and not all_count)
    if all_count:
        p = replace(p, targets=p.targets.clamp(min=0))

    def losses() -> tuple[Tensor]:
        out = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction="none", impl=impl, **more)
        if isinstance(out, Tensor):
            return (out,)
        out.entropy.zero_()
        return (out.loss,)

    compare(p, losses)


@pytest.mark.parametrize("impl", EAGER)
def test_losses_of_a_shift(impl, device):
    p = problem(32, device)
    e, targets = p.e.view(2, 16, -1), p.targets.view(2, 16)
    compare(p, lambda: (linear_cross_entropy(e, p.c, targets, p.bias, reduction="none", shift=1, impl=impl),))


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("more", [{}, WITH_ENTROPY], ids=str)
def test_log_sum_exps(impl, reduction, more, device):
    p = problem(33, device, nan=impl != "reference")
    options = {"reduction": reduction, "return_lse": True, "impl": impl, **more}
    compare(p, lambda: linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options)[:2])


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_statistics(impl, temperature, device):
    p = problem(33, device, nan=impl != "reference")

    def results() -> tuple[Tensor, ...]:
        outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "max_logprob", "is_top1")
        out = linear_logprobs(*(p.e, p.c, p.targets, p.bias), temperature=temperature, outputs=outputs, impl=impl)
        for x in out[3:]:
            x.zero_()
        return out[:3]

    compare(p, results)


def test_an_entropy_that_is_used_before_other_statistics_change():
    p = problem(33)
    out = linear_logprobs(p.e, p.c, p.targets, p.bias, outputs=("entropy", "log_sum_sq_probs", "mean_logits"))
    total = out.entropy.square().sum()
    for x in out.log_sum_sq_probs, out.mean_logits:
        x.zero_()
    assert torch.autograd.grad(total, p.e)[0].any()


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_divergences(kind, device):
    p = problem(33, device)
    teacher = peaked(33, 16, 1500, device=device, seed=1)
    mask, options = p.targets != -100, {"student_bias": p.bias, "kind": kind, "reduction": "none"}
    compare(p, lambda: (linear_kl(p.e, p.c, teacher.e, teacher.c, mask, **options),))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("changed_inside", [True, False])
@pytest.mark.parametrize("of", [linear_cross_entropy, linear_logprobs])
def test_in_a_graph(backend, changed_inside, of):
    """Of a copy, which inductor drops, the gradient would be wrong without a word where the graph ends before."""
    torch._dynamo.reset()
    p = problem(33)

    @torch.compile(backend=backend, fullgraph=True)
    def results() -> tuple[Tensor, ...]:
        if of is linear_logprobs:
            out = linear_logprobs(p.e, p.c, p.targets, p.bias, outputs=("entropy",))[:3]
        else:
            out = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction="none", return_lse=True)
        return tuple(x.mul_(2.0) for x in out) if changed_inside else out

    compare(p, results)
