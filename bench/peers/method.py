"""What a method is, and one training step of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problems.inputs import Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Gradients = tuple[Tensor | None, ...]  # of e and of c; None of a side that is frozen


class Unsupported(Exception):
    """The method has not what the run asks for: a softcap, or this version of PyTorch."""


@dataclass(frozen=True)
class Method:
    """load(softcap) gives the mean loss of (e, c, targets), or raises ImportError or Unsupported.

    product: the plain product and no loss. compiled: the first call at a shape compiles. draws: its gradient is random.
    on_request: measured only where --methods names it. note: what a reader of its rows must know.
    """

    name: str
    load: Callable[[float | None], Loss] | None
    compiled: bool = False
    draws: bool = False
    on_request: bool = False
    note: str = ""

    @property
    def product(self) -> bool:
        return self.load is None

    @property
    def ours(self) -> bool:
        return self.name.startswith("cce")


class LossStep:
    """One training step of the loss on a problem: forward, then backward, then release."""

    def __init__(self, loss: Loss, p: Problem) -> None:
        self.inputs = [x.detach().requires_grad_(p.frozen != side) for side, x in (("e", p.e), ("c", p.c))]
        self.targets = p.targets
        self.function = loss
        self.release()

    def forward(self) -> None:
        self.loss = self.function(*self.inputs, self.targets)

    def backward(self) -> None:
        # autograd.grad and not .backward(): nothing is added to, or zeroed for, an earlier .grad.
        found = iter(torch.autograd.grad(self.loss, [x for x in self.inputs if x.requires_grad]))
        self.gradients = tuple(next(found) if x.requires_grad else None for x in self.inputs)

    def release(self) -> None:
        self.loss: Tensor | None = None
        self.gradients: Gradients | None = None


class ProductStep:
    """The products of a dense step without its softmax: logits, then dE and dC from them, unless they are frozen.

    Outputs are allocated by the first call.
    """

    def __init__(self, p: Problem) -> None:
        self.e, self.c = p.e, p.c
        self.need_e, self.need_c = p.frozen != "e", p.frozen != "c"
        self.logits: Tensor | None = None
        self.grad_e: Tensor | None = None
        self.grad_c: Tensor | None = None

    def forward(self) -> None:
        if self.logits is None:
            self.logits = self.e.new_empty(len(self.e), len(self.c))
        torch.mm(self.e, self.c.T, out=self.logits)

    def backward(self) -> None:
        assert self.logits is not None
        if self.need_e:
            self.grad_e = torch.empty_like(self.e) if self.grad_e is None else self.grad_e
            torch.mm(self.logits, self.c, out=self.grad_e)
        if self.need_c:
            self.grad_c = torch.empty_like(self.c) if self.grad_c is None else self.grad_c
            torch.mm(self.logits.T, self.e, out=self.grad_c)

    def release(self) -> None:
        """Nothing: the next call writes to the same tensors."""


Step = LossStep | ProductStep


def make_step(method: Method, p: Problem, softcap: float | None) -> Step:
    """Raises what importing the method raises, and Unsupported."""
    return ProductStep(p) if method.load is None else LossStep(method.load(softcap), p)


def without_softcap(softcap: float | None) -> None:
    """For a method that has none. Raises Unsupported if the run asks for one."""
    if softcap is not None:
        raise Unsupported("it has no softcap")
