"""How far a method's gradient is from the exact one: fp64, from the same (rounded) inputs, in blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce_ext import reference

from ..peers.method import Gradients
from ..problems.inputs import IGNORE_INDEX, Problem

# fp64 logits held at a time: a gigabyte. The dense reference makes a few tensors of that size of them.
BLOCK_LOGITS = 1 << 27
FEWEST_TOKENS = 128


@dataclass(frozen=True)
class Exact:
    """Mean loss and its gradients in fp64, over the problem that is the first tokens of the one asked for."""

    problem: Problem
    loss: float
    gradients: tuple[Tensor, Tensor]

    def errors(self, gradients: Gradients) -> list[float | None]:
        """Relative Frobenius error of dE and dC: None where the exact one is 0, NaN for one that is not finite.

        None of a gradient that is None, which a frozen side's is.
        """
        pairs = zip(gradients, self.gradients, strict=True)
        return [None if g is None else relative_error(g, exact) for g, exact in pairs]

    def among(self, p: Problem) -> Exact:
        """The same for p, of which self.problem is the first tokens that are not ignored, or all of them."""
        live = (p.targets != IGNORE_INDEX).nonzero()[:, 0]
        tokens = len(p.e)
        if len(live) > len(self.problem.e):
            live = live[: len(self.problem.e)]
            tokens = int(live[-1]) + 1
        d_e = self.gradients[0].new_zeros(tokens, p.e.shape[1])
        d_e[live] = self.gradients[0]
        return Exact(replace(p, e=p.e[:tokens], targets=p.targets[:tokens]), self.loss, (d_e, self.gradients[1]))


def relative_error(x: Tensor, exact: Tensor) -> float | None:
    """||x - exact|| / ||exact||, or None if exact is 0. In blocks of rows: in fp64 a copy of x may not fit."""
    difference, norm = 0.0, 0.0
    for a, b in zip(x.split(4096), exact.split(4096), strict=True):
        difference += (a.double() - b).square().sum().item()
        norm += b.square().sum().item()
    return (difference / norm) ** 0.5 if norm else None


def exact(p: Problem, softcap: float | None) -> Exact | None:
    """The reference for p, or for as many of its first tokens as fit in the memory that is free.

    None if there is no room for FEWEST_TOKENS (or all) of them.
    """
    try:
        return _exact(p, softcap)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    return None


def _exact(p: Problem, softcap: float | None) -> Exact | None:
    tokens = len(p.e)
    free = free_bytes(p.e)
    while bytes_needed(p, tokens) > free:
        tokens //= 2
        if tokens < min(FEWEST_TOKENS, len(p.e)):
            return None
    p = replace(p, e=p.e[:tokens], targets=p.targets[:tokens])
    e, c = p.e.double(), p.c.double().detach().requires_grad_()
    count = (p.targets != IGNORE_INDEX).sum()
    loss, d_e, d_c = e.new_zeros(()), torch.empty_like(e), torch.zeros_like(c)
    for i in range(0, tokens, block(p)):
        rows = slice(i, i + block(p))
        e_rows = e[rows].detach().requires_grad_()
        nll, _ = reference.forward(e_rows, c, None, p.targets[rows], IGNORE_INDEX, softcap)
        total = nll.sum() / count
        d_e[rows], d_c_rows = torch.autograd.grad(total, (e_rows, c))
        d_c += d_c_rows
        loss += total.detach()
    return Exact(p, loss.item(), (d_e, d_c))


def block(p: Problem) -> int:
    return max(1, BLOCK_LOGITS // len(p.c))


def bytes_needed(p: Problem, tokens: int) -> int:
    """c, dC, a block's dC; e, dE; the half dozen [block, V] tensors of a softmax and its gradient."""
    logits = min(tokens, block(p)) * len(p.c)
    return 8 * (3 * p.c.numel() + 2 * tokens * p.e.shape[1] + 6 * logits)


def free_bytes(x: Tensor) -> float:
    """What is free on a GPU; a CPU swaps."""
    if not x.is_cuda:
        return float("inf")
    torch.cuda.empty_cache()
    return 0.95 * torch.cuda.mem_get_info(x.device)[0]
