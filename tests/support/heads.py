"""Two heads of one vocabulary, and their divergence by dense torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cce_ext import linear_kl
from support.problems import peaked

KINDS = ("forward", "reverse", "jsd")


@dataclass(frozen=True)
class Heads:
    """e, c, bias: the student's; teacher: the same three of the teacher's. options: of linear_kl."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    teacher: tuple[Tensor, Tensor, Tensor | None]
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.e, self.c, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> Heads:
        e, c, bias = (None if x is None else x.detach().to(dtype) for x in (self.e, self.c, self.bias))
        teacher = tuple(None if x is None else x.to(dtype) for x in self.teacher)
        return replace(self, e=e, c=c, bias=bias, teacher=teacher)

    def leaves(self) -> Heads:
        e, c, bias = (None if x is None else x.detach().clone().requires_grad_() for x in (self.e, self.c, self.bias))
        return replace(self, e=e, c=c, bias=bias)

    def ours(self, **options: Any) -> Tensor:
        hidden, weight, bias = self.teacher
        given = {"student_bias": self.bias, "teacher_bias": bias, **self.options, **options}
        return linear_kl(self.e, self.c, hidden, weight, self.mask, **given)

    def dense(self, **options: Any) -> Tensor:
        return dense(self.e, self.c, self.bias, self.teacher, self.mask, **self.options, **options)


def heads(
    n: int = 37,
    d: int = 16,
    v: int = 701,
    teacher_d: int = 24,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    bias: bool = False,
    masked: bool = False,
    **options: Any,
) -> Heads:
    """Peaks of the two are at other tokens. What does not count holds NaN on both sides."""
    p = peaked(n, d, v, dtype=dtype, device=device, bias=bias)
    t = peaked(n, teacher_d, v, dtype=dtype, device=device, bias=bias, seed=1)
    e, teacher_e, mask = p.e, t.e, None
    if masked:
        mask = (torch.rand(n, generator=torch.Generator().manual_seed(7)) < 0.6).to(device)
        e, teacher_e = (x.masked_fill(~mask[:, None], float("nan")) for x in (e, teacher_e))
    return Heads(e, p.c, p.bias, (teacher_e, t.c, t.bias), mask, options)


def log_softmax(e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> Tensor:
    """In e's dtype, as a model has its logits, and fp32 (fp64 for fp64) from them on. Finite where p is 0."""
    z = F.linear(e, c, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1).clamp(min=-1e30)


def dense(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None = None,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """By F.kl_div of log-probabilities, whose second argument is the distribution in front."""
    if mask is not None:
        e, teacher = e.masked_fill(~mask[..., None], 0.0), (teacher[0].masked_fill(~mask[..., None], 0.0), *teacher[1:])
    log_p = log_softmax(e, c, bias, student_softcap, temperature)
    log_q = log_softmax(*teacher, teacher_softcap, temperature)

    def kl(of: Tensor, against: Tensor) -> Tensor:
        return F.kl_div(against, of, reduction="none", log_target=True).sum(-1)

    if kind == "forward":
        value = kl(log_q, log_p)
    elif kind == "reverse":
        value = kl(log_p, log_q)
    else:
        mixture = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        value = beta * kl(log_q, mixture) + (1 - beta) * kl(log_p, mixture)
    if mask is not None:
        value = value.masked_fill(~mask, 0.0)
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else value.sum() / (value.numel() if mask is None else mask.sum())


def gradients(loss: Tensor, h: Heads) -> list[Tensor]:
    """Of the losses with an upstream gradient each, of either sign."""
    g = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return list(torch.autograd.grad((loss * g).sum() if loss.dim() else loss, h.inputs))
