"""What is measured: each implementation of the loss, called as its own users would call it.

A peer is imported when it is first wanted, so that one that is missing or broken is one row of the results.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import cce_ext

from .inputs import IGNORE_INDEX, Problem

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        self.inputs = [x.detach().requires_grad_() for x in (p.e, p.c)]
        self.targets = p.targets
        self.function = loss
        self.release()

    def forward(self) -> None:
        self.loss = self.function(*self.inputs, self.targets)

    def backward(self) -> None:
        # autograd.grad and not .backward(): nothing is added to, or zeroed for, an earlier .grad.
        self.gradients = torch.autograd.grad(self.loss, self.inputs)

    def release(self) -> None:
        self.loss: Tensor | None = None
        self.gradients: tuple[Tensor, ...] | None = None


class ProductStep:
    """The products of a dense step without its softmax: logits, then dE and dC from them.

    Outputs are allocated by the first call.
    """

    def __init__(self, p: Problem) -> None:
        self.e, self.c = p.e, p.c
        self.logits: Tensor | None = None
        self.gradients: tuple[Tensor, Tensor] | None = None

    def forward(self) -> None:
        if self.logits is None:
            self.logits = self.e.new_empty(len(self.e), len(self.c))
        torch.mm(self.e, self.c.T, out=self.logits)

    def backward(self) -> None:
        if self.gradients is None:
            self.gradients = torch.empty_like(self.e), torch.empty_like(self.c)
        torch.mm(self.logits, self.c, out=self.gradients[0])
        torch.mm(self.logits.T, self.e, out=self.gradients[1])

    def release(self) -> None:
        """Nothing: the next call writes to the same tensors."""


Step = LossStep | ProductStep


def make_step(method: Method, p: Problem, softcap: float | None) -> Step:
    """Raises what importing the method raises, and Unsupported."""
    return ProductStep(p) if method.load is None else LossStep(method.load(softcap), p)


# ---- ours, and plain torch ----


def _ours(impl: str, filter_eps: float | Literal["auto"] = "auto") -> Callable[[float | None], Loss]:
    def load(softcap: float | None) -> Loss:
        return lambda e, c, t: cce_ext.linear_cross_entropy(e, c, t, softcap=softcap, filter_eps=filter_eps, impl=impl)

    return load


def _baseline(softcap: float | None) -> Loss:
    def loss(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        z = (e @ c.T).float()
        return F.cross_entropy(z if softcap is None else softcap * torch.tanh(z / softcap), t)

    return loss


def _compiled_baseline(softcap: float | None) -> Loss:
    return torch.compile(_baseline(softcap))


def _without_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise Unsupported("it has no softcap")


def _torch_chunked(softcap: float | None) -> Loss:
    _without_softcap(softcap)
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda e, c, t: F.linear_cross_entropy(e, c, t, options=options)


# ---- peers ----


def _apple(impl: str) -> Callable[[float | None], Loss]:
    def load(softcap: float | None) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        options: dict[str, object] = {"impl": impl}
        if impl == "cce_exact" and "filter_c_grad" not in inspect.signature(linear_cross_entropy).parameters:
            # The release on PyPI has impl "cce" alone; without its filter that is what "cce_exact" is in newer ones.
            options = {"impl": "cce", "filter_eps": None}
        return lambda e, c, t: linear_cross_entropy(e, c, t, softcap=softcap, **options)

    return load


def _liger(softcap: float | None) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap)
    return lambda e, c, t: loss(c, e, t)


def _liger_cutedsl(softcap: float | None) -> Loss:
    _without_softcap(softcap)
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90


def _liger_cutedsl_scaled(softcap: float | None) -> Loss:
    _without_softcap(softcap)
    # Its dispatching front end falls back to PyTorch without a word, so the kernel itself is named.
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    def loss(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return LigerFusedScaledCrossEntropySM90Function.apply(e, c, t).sum() / (t != IGNORE_INDEX).sum()

    return loss


def _quack(softcap: float | None) -> Loss:
    _without_softcap(softcap)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


_IN_FORWARD = "computes the gradient in its forward; loss-bw only scales it"

# mm comes first: every other row is compared with it.
METHODS = {
    m.name: m
    for m in (
        Method("mm", None, note="products only"),
        Method("cce", _ours("cce"), draws=True),
        # The sampling eps against its cost: 2^-6 to 2^-11.
        *(Method(f"cce_eps{k}", _ours("cce", 2.0**-k), draws=True, on_request=True) for k in range(6, 12)),
        Method("cce_exact", _ours("cce_exact")),
        Method("cce_threshold", _ours("cce_threshold")),
        Method("torch_compile", _ours("torch_compile"), compiled=True),
        Method("baseline", _baseline),
        Method("compiled_baseline", _compiled_baseline, compiled=True),
        Method("torch_chunked", _torch_chunked, note=_IN_FORWARD),
        Method("apple_cce", _apple("cce")),
        Method("apple_cce_exact", _apple("cce_exact")),
        Method("apple_cce_kahan_full_c", _apple("cce_kahan_full_c")),
        Method("liger", _liger, note=_IN_FORWARD),
        Method("liger_cutedsl", _liger_cutedsl, note="computes the logits' gradient and dE in its forward"),
        Method("liger_cutedsl_scaled", _liger_cutedsl_scaled),
        Method("quack", _quack, note="computes most of the gradient in its forward"),
    )
}

# Distributions whose versions a results file names.
_DISTRIBUTIONS = (
    "triton",
    "cut-cross-entropy",
    "liger_kernel",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
)


def packages() -> dict[str, str]:
    """name: version of cce_ext and of the peers that are installed."""
    versions = {"cce_ext": cce_ext.__version__}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
