"""Inputs, the fp64 oracle and the error measure that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce_ext import reference


@dataclass(frozen=True)
class Problem:
    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    ignore_index: int = -100

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.e, self.c, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, e=self.e.to(dtype), c=self.c.to(dtype), bias=bias)

    def leaves(self) -> Problem:
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        return replace(
            self,
            e=self.e.detach().clone().requires_grad_(),
            c=self.c.detach().clone().requires_grad_(),
            bias=bias,
        )


def peaked(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    bias: bool = False,
    softcap: float | None = None,
    ignored: float = 0.0,
) -> Problem:
    """Rows of e point at some rows of c, so that the softmax peaks; entry 0 of both holds an outlier."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(v, d, generator=g) / d**0.5
    near = torch.randint(0, v, (n, 3), generator=g)
    strength = torch.tensor([9.0, 6.0, 4.0])[:, None]
    e = (c[near] * strength).sum(1) + torch.randn(n, d, generator=g) / d**0.5
    e[:, 0] *= 8
    c[:, 0] += 0.5
    targets = torch.where(torch.rand(n, generator=g) < 0.7, near[:, 0], torch.randint(0, v, (n,), generator=g))
    targets[torch.rand(n, generator=g) < ignored] = -100
    b = torch.randn(v, generator=g) if bias else None
    p = Problem(e.to(device), c.to(device), targets.to(device), None if b is None else b.to(device), softcap)
    return p.to(dtype)


def uniform(n: int, d: int, v: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """E = 0: every p is 1/V, the most visits that the sampled backward can have."""
    p = peaked(n, d, v, dtype=dtype, device=device)
    return replace(p, e=torch.zeros_like(p.e))


def upstream(p: Problem, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of nll and lse that differ from token to token, in sign as well."""
    g = torch.Generator().manual_seed(seed)
    n = len(p.targets)
    return (torch.rand(n, generator=g) + 0.5).to(p.e.device), (0.3 * torch.randn(n, generator=g)).to(p.e.device)


def gradients(nll: Tensor, lse: Tensor, p: Problem, g_nll: Tensor, g_lse: Tensor) -> list[Tensor]:
    objective = (nll * g_nll.to(nll.dtype)).sum() + (lse * g_lse.to(lse.dtype)).sum()
    return list(torch.autograd.grad(objective, p.inputs))


def dense(p: Problem, g_nll: Tensor, g_lse: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """nll, lse and the gradients by dense torch in p's own dtype."""
    p = p.leaves()
    nll, lse = reference.forward(p.e, p.c, p.bias, p.targets, p.ignore_index, p.softcap)
    return nll.detach(), lse.detach(), gradients(nll, lse, p, g_nll, g_lse)


def oracle(p: Problem, g_nll: Tensor, g_lse: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    return dense(p.to(torch.float64), g_nll, g_lse)


@contextmanager
def full_of_nan() -> Iterator[None]:
    """What is allocated is NaN (or the largest integer) until it is written: torch's aid for deterministic algorithms.

    The operators of 16 bits, called by themselves, do not ask for these algorithms themselves.
    """
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error(x: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; NaN anywhere is an error of NaN."""
    return ((x.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def worst(x: Tensor, exact: Tensor) -> float:
    """The largest error of an element over the largest element."""
    return ((x.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)).item()


def assert_as_good_as_dense(x: Tensor, same_precision: Tensor, exact: Tensor, tiny: float = 1e-5) -> None:
    """At most twice the error of dense torch in the same precision, plus a tiny constant."""
    assert x.shape == exact.shape
    for measure in (error, worst):
        ours, theirs = measure(x, exact), measure(same_precision, exact)
        assert ours <= 2 * theirs + tiny, f"{measure.__name__}: {ours:.3g}, dense torch {theirs:.3g}"
