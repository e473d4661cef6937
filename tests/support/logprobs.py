"""linear_logprobs by its definition, densely, and the cases its tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext import LogProbs, linear_logprobs
from support.problems import Problem, peaked

ALL = ("entropy", "is_top1", "log_sum_sq_probs", "mean_logits", "max_logprob")
FIELDS = ("logprobs", "lse", *ALL)
DIFFERENTIABLE = ("logprobs", "lse", "entropy")


def dense(p: Problem, *, temperature: float | Tensor = 1.0, logit_scale: float = 1.0) -> LogProbs:
    """From the logits, in p's dtype. Rows of ignored tokens are taken for 0 before the product."""
    counts = p.targets != p.ignore_index
    z = logit_scale * F.linear(torch.where(counts[:, None], p.e, 0.0), p.c, p.bias)
    z = z if p.softcap is None else p.softcap * torch.tanh(z / p.softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z).expand(len(z)).where(counts, torch.ones_like(z[:, 0]))[:, None]
    z = z / temperature
    log_p = z.log_softmax(1)
    p_log_p = (log_p.exp() * log_p.masked_fill(log_p == -float("inf"), 0.0)).sum(1)
    label = p.targets.where(counts, 0).long()[:, None]
    found = LogProbs(
        log_p.gather(1, label)[:, 0],
        z.logsumexp(1),
        -p_log_p,
        # The first of equal ones, which argmax promises.
        z.argmax(1) == label[:, 0],
        (2 * log_p).logsumexp(1),
        z.mean(1),
        log_p.amax(1),
    )
    return LogProbs(*(x.masked_fill(~counts, 0) for x in found))


def ours(p: Problem, *, outputs: Sequence[str] = ALL, **options: Any) -> LogProbs:
    options = {"softcap": p.softcap, "ignore_index": p.ignore_index, **options}
    return linear_logprobs(p.e, p.c, p.targets, p.bias, outputs=outputs, **options)


def upstream(p: Problem, seed: int = 1) -> list[Tensor]:
    """Gradients of logprobs, lse and entropy that differ from token to token, in sign as well."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(len(p.targets), generator=g).to(p.e.device) for _ in DIFFERENTIABLE]


def gradients(out: LogProbs, p: Problem, ups: Sequence[Tensor | None]) -> list[Tensor]:
    """Of p's e, c and bias, from those of what is differentiable."""
    pairs = zip(out[:3], ups, strict=True)
    objective = sum((x * g.to(x.dtype)).sum() for x, g in pairs if x is not None and g is not None)
    assert isinstance(objective, Tensor)
    return list(torch.autograd.grad(objective, p.inputs))


def temperatures(p: Problem, seed: int = 2) -> Tensor:
    """0.1 to 10, a number for each token."""
    g = torch.Generator().manual_seed(seed)
    return (10.0 ** (2 * torch.rand(len(p.targets), generator=g) - 1)).to(p.e.device)


def confident(n: int, v: int, gap: float, device: str) -> Problem:
    """Each token's p is 1 less v exp(-gap) at its label, or nearly: the other logits are small, and differ."""
    p = peaked(n, 24, v, dtype=torch.float64, device=device)
    e = torch.zeros_like(p.e)
    e[:, 0] = gap
    c = 0.01 * p.c
    c[:, 0] = 0.01 * p.c[:, 1]
    c[3, 0] = 1.0
    return replace(p, e=e + 0.1 * p.e, c=c, targets=torch.full_like(p.targets, 3))
