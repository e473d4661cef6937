"""The promise of logits: what lm_head gives during a patched forward, and the loss of what was promised."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..api import LossStats, module_loss
from ..module_calls import forward_replaced
from .peft import peft_classifier


class PromisingHead:
    """lm_head during one call: its result is a promise."""

    def __init__(self, head: nn.Module, family: str) -> None:
        self._cce_head: Any = head
        self._cce_family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cce_head, name)

    def __call__(self, hidden: Tensor) -> PromisedLogits:
        head = self._cce_head
        if not isinstance(head, FSDPModule):
            return PromisedLogits(self._cce_family, *linear_classifier(head, hidden))
        check_fsdp_head(self._cce_head)
        weight, bias = self._cce_head.weight, self._cce_head.bias
        return PromisedLogits(self._cce_family, hidden, weight, bias, gathered_by=self._cce_head)


class PromisedLogits:
    """Logits that are never computed: z = scale * (e @ c.T + bias), or cap * tanh(z). Refuses whatever else is asked.

    e: [.., D]; c: [V, D]; bias: [V] or None. gathered_by: lm_head as a unit of FSDP2, or part of one, of which c and
    bias are shards but in its own call.
    """

    def __init__(
        self,
        family: str,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        scale: float = 1.0,
        cap: float | None = None,
        gathered_by: nn.Module | None = None,
    ) -> None:
        self.family, self.e, self.c, self.bias, self.scale, self.cap = family, e, c, bias, scale, cap
        self.gathered_by = gathered_by

    def cross_entropy(self, targets: Tensor, **options: Any) -> Tensor | LossStats:
        """As module_loss."""
        head: Any = self.gathered_by
        if head is None:
            return self._cross_entropy(self.e, self.c, self.bias, targets, **options)

        def forward(e: Tensor) -> Tensor | LossStats:
            return self._cross_entropy(e, plain_weight(head), head.bias, targets, **options)

        # FSDP2 gathers lm_head's parameters before its own call alone, and may free them right after it.
        with forward_replaced(head, forward):
            found: Tensor | LossStats = head(self.e)
        return found

    def _cross_entropy(
        self, e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
    ) -> Tensor | LossStats:
        scale, softcap = self.scale, self.cap
        if softcap is not None:  # cap * tanh(z) is softcap * tanh(cap * z / softcap)
            scale *= softcap
        if not math.isclose(scale, 1.0, rel_tol=1e-12):
            # e is the smaller one; in 16 bits a scale that is no power of two rounds it once more.
            e, bias = e * scale, None if bias is None else bias * scale
        found: Tensor | LossStats = module_loss(e, c, targets, bias, softcap=softcap, **options)
        return found

    def _with(self, scale: float, cap: float | None) -> PromisedLogits:
        return PromisedLogits(self.family, self.e, self.c, self.bias, scale, cap, self.gathered_by)

    def __mul__(self, factor: float) -> PromisedLogits:
        if not isinstance(factor, (int, float)):
            self._refuse(f"times a {type(factor).__name__}")
        return self._with(self.scale * factor, None) if self.cap is None else self._with(self.scale, self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> PromisedLogits:
        if not isinstance(divisor, (int, float)):
            self._refuse(f"divided by a {type(divisor).__name__}")
        return self * (1 / divisor)

    def tanh(self) -> PromisedLogits:
        if self.cap is not None:
            self._refuse("tanh of tanh")
        return self._with(self.scale, 1.0)

    def contiguous(self) -> PromisedLogits:
        return self

    def float(self) -> PromisedLogits:
        """The loss is computed in fp32 anyway."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> PromisedLogits:
        """As float, for fp32 and the dtype they have, on the device they are on. Refuses others."""
        here = self.device
        for x in (*args, *kwargs.values()):
            like = isinstance(x, Tensor)
            dtype = x.dtype if like else x if isinstance(x, torch.dtype) else None
            device = x.device if like else torch.device(x) if isinstance(x, (str, torch.device)) else None
            if dtype not in (None, torch.float32, self.e.dtype):
                self._refuse(f"to {dtype}")
            if device is not None and (device.type != here.type or device.index not in (None, here.index)):
                self._refuse(f"to {device}")
        return self

    @property
    def device(self) -> torch.device:
        return self.e.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.e.shape[:-1], self.c.shape[0]])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> PromisedLogits:
        self = next(x for x in args if isinstance(x, PromisedLogits))
        if function is not torch.tanh or len(args) > 1 or kwargs:
            self._refuse(torch.overrides.resolve_name(function) or str(function))
        return self.tanh()

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.family} cannot be served by cce_patch: between lm_head and the loss its forward does with its "
            f"logits what is not known here ({what})"
        )


def _refuse_operator(name: str) -> Callable[..., NoReturn]:
    def refuse(self: PromisedLogits, *args: Any) -> NoReturn:
        self._refuse(name)

    return refuse


# Python looks for these on the class only, where __getattr__ does not reach.
for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "floordiv", "mod", "matmul", "rmatmul", "pow", "rpow", "neg", "abs"),
    *("lt", "le", "gt", "ge", "eq", "ne", "bool", "getitem", "setitem", "iter", "len", "contains"),
):
    setattr(PromisedLogits, f"__{_name}__", _refuse_operator(f"__{_name}__"))


def linear_classifier(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """e [.., D], c [V, D] and bias of which head(hidden) [.., V] is the product, differentiable.

    Raises NotImplementedError for a head that is more than that.
    """
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if name.startswith("peft."):
        return peft_classifier(head, hidden, linear_classifier)
    if type(head) is not nn.Linear:
        raise NotImplementedError(f"lm_head: expected torch.nn.Linear, got {name}, which cce_patch cannot serve")
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in head.__dict__:
        raise NotImplementedError(
            "lm_head: it has hooks or a forward of its own (as FSDP1, DeepSpeed ZeRO-3 or a device_map over several "
            "devices give it), which cce_patch would pass by"
        )
    return hidden, plain_weight(head), head.bias


def check_fsdp_head(head: nn.Module) -> None:
    """Raises NotImplementedError unless it is a linear layer that fully_shard was given, by itself or with others."""
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if type(head).__bases__ != (FSDPModule, nn.Linear):
        raise NotImplementedError(
            f"lm_head: expected FSDP2's torch.nn.Linear, got {name}, which cce_patch cannot serve"
        )
    # fully_shard registers one of either.
    more = len(head._forward_hooks) > 1 or len(head._forward_pre_hooks) > 1
    if more or head._backward_hooks or head._backward_pre_hooks or "forward" in head.__dict__:
        raise NotImplementedError(
            "lm_head: it has hooks besides FSDP2's or a forward of its own, which cce_patch would pass by"
        )


def plain_weight(head: nn.Module) -> Tensor:
    """Raises NotImplementedError for one that is sharded (but by FSDP2, in its own call) or quantized."""
    weight: Any = head.weight
    if type(weight) not in (Tensor, nn.Parameter):
        raise NotImplementedError(
            f"lm_head.weight: expected a plain tensor, got {type(weight).__name__} (sharded or quantized?), which "
            "cce_patch cannot serve"
        )
    checked: Tensor = weight
    return checked
