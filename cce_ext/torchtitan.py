"""torchtitan: a loss whose trainer keeps lm_head out of the model's forward, as it does for ChunkedLossWrapper.

The convention is that of torchtitan 0.3: a loss that is a ChunkedLossWrapper is given lm_head by set_lm_head, and then
hidden states in the place of logits. It returns the sum over its rank's tokens over those of all ranks, and metrics.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .api import module_loss
from .module_calls import forward_replaced
from .options import FilterEps, Options, Scan

try:
    import torchtitan
except ModuleNotFoundError as error:
    if error.name != "torchtitan":
        raise
    raise ModuleNotFoundError(
        "cce_ext.torchtitan needs torchtitan 0.3 or newer, which is not installed: pip install torchtitan",
        name=error.name,
    ) from error

_VERSION = getattr(torchtitan, "__version__", "of an unknown version")
_MOVED = f"cce_ext.torchtitan follows the losses of torchtitan 0.3; torchtitan {_VERSION} has another convention: "
try:
    import spmd_types as spmd
    from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
    from torchtitan.distributed.spmd_types import spmd_mesh_size
    from torchtitan.distributed.utils import get_spmd_backend
except ImportError as error:
    raise ImportError(f"{_MOVED}{error}") from error

_CALL = ["self", "pred", "labels", "global_valid_tokens"]
if list(inspect.signature(ChunkedLossWrapper.__call__).parameters)[:4] != _CALL:
    raise ImportError(f"{_MOVED}ChunkedLossWrapper is not called with {', '.join(_CALL[1:])}")
_set_lm_head = getattr(ChunkedLossWrapper, "set_lm_head", None)
if _set_lm_head is None or list(inspect.signature(_set_lm_head).parameters) != ["self", "lm_head"]:
    raise ImportError(f"{_MOVED}ChunkedLossWrapper has no set_lm_head(lm_head)")

__all__ = ["CCELoss"]


class CCELoss(ChunkedLossWrapper):  # type: ignore[misc]
    """linear_cross_entropy as a loss of torchtitan: `Trainer.Config(loss=CCELoss.Config(), ..)`.

    A ChunkedLossWrapper, because the trainer gives lm_head to no other loss; it has no chunks, since it has no logits.
    FSDP2 gathers lm_head's weight as for lm_head's own forward. Tensor parallelism needs spmd_backend
    "partial_dtensor".
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        """As in linear_cross_entropy. softcap is that of the model's logits, where lm_head itself has none.

        scan is left out where no gradient is computed: validation has its logits in lm_head's dtype.
        """

        impl: str = "cce"
        filter_eps: FilterEps = "auto"
        filter_e_grad: bool = True
        filter_c_grad: bool = True
        softcap: float | None = None
        scan: Scan = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """Compiled where compile_config asks for "loss". Raises ValueError and TypeError for options."""
        given = {x.name: getattr(config, x.name) for x in fields(CCELoss.Config)}
        options = Options(reduction="sum", ignore_index=IGNORE_INDEX, **given)
        options.check()
        self.lm_head: nn.Module | None = None
        self.fn: Callable[..., Tensor] = functools.partial(module_loss, **vars(options))
        self._maybe_compile(compile_config)

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """lm_head: a torch.nn.Linear, or a subclass with the same forward, as torchtitan's and FSDP2's are.

        Raises NotImplementedError for any other module, which does more than a linear layer.
        """
        replaced = "forward" in lm_head.__dict__ and not getattr(lm_head, "_parallelized", False)
        if type(lm_head).forward is not nn.Linear.forward or replaced:
            raise NotImplementedError(
                f"lm_head: expected a linear layer, got {type(lm_head).__qualname__} with a forward of its own (as "
                "LoRA, low precision or a softcap give it), which CCELoss would pass by; use ChunkedLossWrapper"
            )
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the tokens that count, over global_valid_tokens, and no metrics, as from CrossEntropyLoss.

        Args:
            pred: hidden states [.., D] of lm_head's dtype; under tensor parallelism a DTensor, Replicate.
            labels: [..] int32 or int64, the token that each position predicts, or -100.
            global_valid_tokens: a tensor with one element, the tokens that count on all ranks in a step. None: the sum.
            loss_inputs: positions, which the loss has no use for.

        Returns: a scalar, fp32 (fp64 for fp64 inputs), a plain tensor, and {}. The trainer logs the sum of the ranks'
        scalars as global_avg_loss.

        Raises:
            RuntimeError: before set_lm_head.
            TypeError: another loss input.
            NotImplementedError: spmd_backend "full_dtensor", type checking of spmd_types, or tensor parallelism with
                it; and all that linear_cross_entropy raises.
        """
        lm_head = self.lm_head
        if lm_head is None:
            raise RuntimeError("CCELoss has no lm_head: call set_lm_head first, as torchtitan's trainer does")
        if unknown := sorted(loss_inputs.keys() - {"positions"}):
            raise TypeError(f"{_MOVED}the loss is given {', '.join(unknown)}")
        _check_backend()

        # In lm_head's own call, around which FSDP2 gathers its weight, casts it and reduces its gradient.
        def loss_of(e: Tensor, targets: Tensor) -> Tensor:
            return self.fn(e, lm_head.weight, targets, lm_head.bias)

        with forward_replaced(lm_head, loss_of):
            loss: Tensor = lm_head(pred, labels)
        if isinstance(loss, DTensor):
            loss = loss.to_local()
        return (loss if global_valid_tokens is None else loss / global_valid_tokens), {}


def _check_backend() -> None:
    backend = get_spmd_backend()
    if backend == "full_dtensor":
        raise NotImplementedError('CCELoss: spmd_backend "full_dtensor" is not supported; use ChunkedLossWrapper')
    if spmd.is_type_checking():
        raise NotImplementedError(
            "CCELoss: spmd_types does not know the types of its operators; leave type checking out"
        )
    if backend == "spmd_types" and spmd_mesh_size("tp") > 1:
        raise NotImplementedError(
            'CCELoss: tensor parallelism needs spmd_backend "partial_dtensor", got "spmd_types", whose weights do not '
            "say how they are sharded"
        )
