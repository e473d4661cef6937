"""Several labels a token: problems, and the loss by dense torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

from .problems import Problem, peaked


@dataclass(frozen=True)
class Soft:
    """p has no targets of its own that count: targets and weights are [N, K]."""

    p: Problem
    targets: Tensor
    weights: Tensor

    def leaves(self) -> Soft:
        return replace(self, p=self.p.leaves())

    def to(self, dtype: torch.dtype) -> Soft:
        return replace(self, p=self.p.to(dtype))

    @property
    def counts(self) -> Tensor:
        return (self.targets != self.p.ignore_index).any(1)


def soft(n: int, d: int, v: int, k: int, *, ignored: float = 0.2, seed: int = 2, **options) -> Soft:
    """Labels near the token's peaks and elsewhere, some twice; a part of them ignored, and of tokens; any signs."""
    p = peaked(n, d, v, **options)
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n, k), generator=g)
    targets[:, 0] = p.targets.clamp(min=0).cpu()
    twice = torch.rand(n, generator=g) < 0.2
    targets[twice, -1] = targets[twice, 0]
    weights = torch.rand(n, k, generator=g)
    weights[:, k // 2] *= -0.3
    weights[torch.rand(n, k, generator=g) < 0.1] = 0.0
    targets[torch.rand(n, k, generator=g) < ignored] = p.ignore_index
    targets[torch.rand(n, generator=g) < ignored / 2] = p.ignore_index
    device = p.e.device
    return Soft(p, targets.to(device), weights.to(device))


def theirs(x: Soft, *, reduction: str = "mean", softcap: float | None = None) -> Tensor:
    """By dense logits of x.p, which it is given in fp32 or fp64."""
    p = x.p
    logits = F.linear(p.e, p.c, p.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    entries = x.targets != p.ignore_index
    nll = -logits.log_softmax(1).gather(1, x.targets.where(entries, 0).long())
    weights = x.weights.to(logits.dtype).masked_fill(~entries, 0.0)
    loss = torch.where(entries & (weights != 0), weights * nll, 0.0).sum(1)
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.sum() / x.counts.sum()


def ours(x: Soft, **options) -> Tensor:
    p = x.p
    return linear_cross_entropy(
        p.e, p.c, x.targets, p.bias, ignore_index=p.ignore_index, target_weights=x.weights, **options
    )
