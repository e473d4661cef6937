"""How far a method's outputs and gradient are from the exact ones.

Those are fp64, from the same (rounded) inputs, in blocks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cce_ext import reference

from ..peers import plain
from ..peers.method import Gradients
from ..problems.inputs import IGNORE_INDEX, Problem

# fp64 logits held at a time: a gigabyte. The dense reference makes a few tensors of that size of them.
BLOCK_LOGITS = 1 << 27
FEWEST_TOKENS = 128
# Tensors of that size that a task's reference holds at once, gradients included.
TENSORS = {"loss": 6, "logprobs": 9, "distill": 6}


@dataclass(frozen=True)
class Exact:
    """Mean loss and its gradients in fp64, over the problem that is the first tokens of the one asked for.

    outputs: log-probabilities and entropies [N] of the task that has them.
    """

    problem: Problem
    loss: float
    gradients: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, ...] = ()

    def errors(self, gradients: Gradients) -> list[float | None]:
        """Relative Frobenius error of dE and dC: None where the exact one is 0, NaN for one that is not finite.

        None of a gradient that is None, which a frozen side's is.
        """
        pairs = zip(gradients, self.gradients, strict=True)
        return [None if g is None else relative_error(g, exact) for g, exact in pairs]

    def among(self, p: Problem) -> Exact:
        """The same for p, of which self.problem is the first tokens that are not ignored, or all of them."""
        live = p.live().nonzero()[:, 0]
        tokens = len(p.e)
        if len(live) > len(self.problem.e):
            live = live[: len(self.problem.e)]
            tokens = int(live[-1]) + 1
        d_e, *outputs = (x.new_zeros(tokens, *x.shape[1:]) for x in (self.gradients[0], *self.outputs))
        for x, of_live in zip((d_e, *outputs), (self.gradients[0], *self.outputs), strict=True):
            x[live] = of_live
        return Exact(p.rows(slice(tokens)), self.loss, (d_e, self.gradients[1]), tuple(outputs))


def relative_error(x: Tensor, exact: Tensor) -> float | None:
    """||x - exact|| / ||exact||, or None if exact is 0. In blocks of rows: in fp64 a copy of x may not fit."""
    difference, norm = 0.0, 0.0
    for a, b in zip(x.split(4096), exact.split(4096), strict=True):
        difference += (a.double() - b).square().sum().item()
        norm += b.square().sum().item()
    return (difference / norm) ** 0.5 if norm else None


def distances(x: Tensor, exact: Tensor, live: Tensor) -> tuple[float, float]:
    """The largest and the rms difference of outputs [N], in nats, over the tokens that count."""
    difference = (x.double() - exact)[live].abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def exact(p: Problem, softcap: float | None, task: str = "loss") -> Exact | None:
    """The reference for p, or for as many of its first tokens as fit in the memory that is free.

    None if there is no room for FEWEST_TOKENS (or all) of them.
    """
    try:
        return _exact(p, softcap, task)
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    return None


def _exact(p: Problem, softcap: float | None, task: str) -> Exact | None:
    tokens = len(p.e)
    free = free_bytes(p.e)
    while bytes_needed(p, tokens, task) > free:
        tokens //= 2
        if tokens < min(FEWEST_TOKENS, len(p.e)):
            return None
    p = p.rows(slice(tokens))
    e, c = p.e.double(), p.c.double().detach().requires_grad_()
    count = p.live().sum()
    loss, d_e, d_c = e.new_zeros(()), torch.empty_like(e), torch.zeros_like(c)
    blocks: list[tuple[Tensor, ...]] = []
    for i in range(0, tokens, block(p)):
        rows = slice(i, i + block(p))
        e_rows = e[rows].detach().requires_grad_()
        total, outputs = objective(task, replace(p.rows(rows), e=e_rows, c=c), softcap)
        total = total / count
        blocks.append(tuple(x.detach() for x in outputs))
        d_e[rows], d_c_rows = torch.autograd.grad(total, (e_rows, c))
        d_c += d_c_rows
        loss += total.detach()
    return Exact(p, loss.item(), (d_e, d_c), tuple(torch.cat(x) for x in zip(*blocks, strict=True)))


def objective(task: str, p: Problem, softcap: float | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The sum over the tokens of p that the task differentiates, by a dense softmax, and the outputs it is made of."""
    if task == "loss":
        nll, _ = reference.forward(p.e, p.c, None, p.targets, IGNORE_INDEX, softcap)
        return nll.sum(), ()
    assert p.weights is not None
    z = plain.logits_of(p.e, p.c, softcap)
    if task == "distill":
        return plain.soft_nll_of(z, p.targets, p.weights).sum(), ()
    outputs = plain.logprobs_of(z, p.targets)
    return (p.weights * torch.stack(outputs, 1)).sum(), outputs


def block(p: Problem) -> int:
    return max(1, BLOCK_LOGITS // len(p.c))


def bytes_needed(p: Problem, tokens: int, task: str = "loss") -> int:
    """c, dC, a block's dC; e, dE; the [block, V] tensors of a softmax and its gradient."""
    logits = min(tokens, block(p)) * len(p.c)
    return 8 * (3 * p.c.numel() + 2 * tokens * p.e.shape[1] + TENSORS[task] * logits)


def free_bytes(x: Tensor) -> float:
    """What is free on a GPU; a CPU swaps."""
    if not x.is_cuda:
        return float("inf")
    torch.cuda.empty_cache()
    return 0.95 * torch.cuda.mem_get_info(x.device)[0]
