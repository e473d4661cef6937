"""cce_ext's own implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import cce_ext

from .method import LogProbs, Loss, Outputs, SoftLoss, Unsupported


def impl(name: str, filter_eps: float | Literal["auto"] = "auto") -> Callable[[float | None], Loss]:
    def load(softcap: float | None) -> Loss:
        return lambda e, c, t: cce_ext.linear_cross_entropy(e, c, t, softcap=softcap, filter_eps=filter_eps, impl=name)

    return load


def fp8(softcap: float | None) -> Loss:
    """ "cce" with the 8-bit scan. Its calls raise Unsupported where there is no kernel for it."""

    def loss(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        try:
            return cce_ext.linear_cross_entropy(e, c, t, softcap=softcap, scan="fp8")
        except ValueError as error:
            raise Unsupported(str(error)) from error

    return loss


def logprobs(name: str) -> Callable[[float | None], LogProbs]:
    def load(softcap: float | None) -> LogProbs:
        def function(e: Tensor, c: Tensor, t: Tensor) -> Outputs:
            found = cce_ext.linear_logprobs(e, c, t, softcap=softcap, outputs=("entropy",), impl=name)
            return found.logprobs, found.entropy

        return function

    return load


def soft(name: str) -> Callable[[float | None], SoftLoss]:
    def load(softcap: float | None) -> SoftLoss:
        options: dict[str, Any] = {"softcap": softcap, "impl": name}
        return lambda e, c, t, w: cce_ext.linear_cross_entropy(e, c, t, target_weights=w, **options)

    return load


def compiled(name: str) -> Callable[[float | None], Loss]:
    """The same call inside a compiled function, as in a compiled model."""
    return lambda softcap: torch.compile(impl(name)(softcap), fullgraph=True)
