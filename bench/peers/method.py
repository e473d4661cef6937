"""What a method is, and one step of it: of training, or of scoring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problems.inputs import Problem, first_line

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Log-probabilities and entropies [N] of (e, c, targets); None of entropies that the method has not.
Outputs = tuple[Tensor, Tensor | None]
LogProbs = Callable[[Tensor, Tensor, Tensor], Outputs]
# The mean loss of (e, c, targets, weights).
SoftLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Gradients = tuple[Tensor | None, ...]  # of e and of c; None of a side that is frozen


class Unsupported(Exception):
    """The method has not what the run asks for: a softcap, or this version of PyTorch."""


def reason(error: BaseException) -> str:
    """Why a method has no figures, as its rows note it."""
    if isinstance(error, ImportError) and isinstance(error.__cause__ or error, ModuleNotFoundError):
        return f"missing: {first_line(error)}"
    if isinstance(error, Unsupported):
        return f"not run: {first_line(error)}"
    return f"failed: {first_line(error)}"


@dataclass(frozen=True)
class Method:
    """load(softcap) gives the function of the task, or raises ImportError or Unsupported.

    task: "loss" (a Loss), "logprobs" (a LogProbs) or "distill" (a SoftLoss). entropy: whether a LogProbs has that.
    product: the plain product and no loss. compiled: the first call at a shape compiles. draws: its gradient is random.
    on_request: measured only where --methods names it. note: what a reader of its rows must know.
    """

    name: str
    load: Callable[[float | None], Any] | None
    compiled: bool = False
    draws: bool = False
    on_request: bool = False
    note: str = ""
    task: str = "loss"
    entropy: bool = True

    @property
    def product(self) -> bool:
        return self.load is None

    @property
    def ours(self) -> bool:
        return self.name.startswith("cce")


class LossStep:
    """One training step of the loss on a problem: forward, then backward, then release."""

    def __init__(self, loss: Loss | SoftLoss, p: Problem) -> None:
        self.inputs = differentiable(p)
        self.targets = p.targets
        self.weights = () if p.weights is None else (p.weights,)
        self.function = loss
        self.release()

    def forward(self) -> None:
        self.loss = self.function(*self.inputs, self.targets, *self.weights)

    def backward(self) -> None:
        # autograd.grad and not .backward(): nothing is added to, or zeroed for, an earlier .grad.
        found = torch.autograd.grad(self.loss, [x for x in self.inputs if x.requires_grad])
        self.gradients = of_sides(self.inputs, found)

    def release(self) -> None:
        self.loss: Tensor | None = None
        self.gradients: Gradients | None = None


class LogProbsStep:
    """One training step of a policy: log-probabilities and entropies, then their gradients' way back, then release.

    What comes back to a token is its weights over the number of tokens that count.
    """

    def __init__(self, function: LogProbs, p: Problem) -> None:
        assert p.weights is not None
        self.inputs, self.targets = differentiable(p), p.targets
        self.weights = (p.weights / p.live().sum()).T.contiguous().unbind()
        self.function = function
        self.release()

    def forward(self) -> None:
        self.outputs = self.function(*self.inputs, self.targets)

    def backward(self) -> None:
        assert self.outputs is not None
        there = [(x, weight) for x, weight in zip(self.outputs, self.weights, strict=True) if x is not None]
        outputs, weights = zip(*there, strict=True)
        found = torch.autograd.grad(outputs, [x for x in self.inputs if x.requires_grad], weights)
        self.gradients = of_sides(self.inputs, found)

    def release(self) -> None:
        self.outputs: Outputs | None = None
        self.gradients: Gradients | None = None


class ScoreStep:
    """One scoring of a rollout: log-probabilities and entropies without a graph; there is no backward."""

    def __init__(self, function: LogProbs, p: Problem) -> None:
        # A parameter says that it requires a gradient, whoever looks at it; what a model computes without one does not.
        self.inputs = [p.e.detach(), p.c.detach().requires_grad_(p.frozen != "c")]
        self.targets, self.function = p.targets, function
        self.release()

    @torch.no_grad()
    def forward(self) -> None:
        self.outputs = self.function(*self.inputs, self.targets)

    def backward(self) -> None:
        """Nothing."""

    def release(self) -> None:
        self.outputs: Outputs | None = None


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


Step = LossStep | LogProbsStep | ScoreStep | ProductStep


def make_step(method: Method, p: Problem, softcap: float | None, scoring: bool = False) -> Step:
    """Of training, or of scoring. Raises what importing the method raises, and Unsupported."""
    if method.load is None:
        return ProductStep(p)
    if scoring:
        return ScoreStep(method.load(softcap), p)
    kind = LogProbsStep if method.task == "logprobs" else LossStep
    return kind(method.load(softcap), p)


def differentiable(p: Problem) -> list[Tensor]:
    """e and c as leaves that require gradients, unless they are frozen."""
    return [x.detach().requires_grad_(p.frozen != side) for side, x in (("e", p.e), ("c", p.c))]


def of_sides(inputs: list[Tensor], found: tuple[Tensor, ...]) -> Gradients:
    """Those found, with None in the place of a side that has none."""
    each = iter(found)
    return tuple(next(each) if x.requires_grad else None for x in inputs)


def without_softcap(softcap: float | None) -> None:
    """For a method that has none. Raises Unsupported if the run asks for one."""
    if softcap is not None:
        raise Unsupported("it has no softcap")
