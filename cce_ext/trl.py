"""TRL: patch has its trainers take log-probabilities from linear_logprobs, unpatch gives them TRL's own again.

The convention is that of TRL 1.16. A trainer gives its models a fused lm_head, trl.trainer.utils.add_fused_lm_head,
whose forward looks up _ChunkedLogProbFunction in that module at each call, and calls its apply with hidden states and
lm_head's weight. So it does not matter whether a trainer was made before patch or after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .logprobs import linear_logprobs
from .options import FilterEps, Options

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        'cce_ext.trl needs TRL 1.16, which is not installed: pip install "trl==1.16.*" (Python 3.11 or newer)',
        name=error.name,
    ) from error

_VERSION = getattr(trl, "__version__", "of an unknown version")
_MOVED = (
    "cce_ext.trl needs the fused lm_head of TRL 1.16, which its trainers for SFT, DPO, KTO, GRPO and RLOO share, and "
    f'does not find it in TRL {_VERSION} (pip install "trl==1.16.*", or leave cce_ext.trl out): '
)
try:
    import trl.trainer.utils as utils  # of its package, which is lazy, a failed import would be a RuntimeError
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
    from trl.trainer.utils import add_fused_lm_head
except ImportError as error:
    raise ImportError(f"{_MOVED}{error}") from error

_NAME = "_ChunkedLogProbFunction"
_CALL = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
# In the order in which they are returned, after the log-probabilities.
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _looks_up(code: CodeType, name: str) -> bool:
    """Whether it, or a function in it, has this name among its globals and attributes."""
    return name in code.co_names or any(_looks_up(x, name) for x in code.co_consts if isinstance(x, CodeType))


_found = tuple(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:]
if _found != _CALL:
    raise ImportError(f"{_MOVED}ChunkedLogProbFunction is not called with {', '.join(_CALL)}, but {', '.join(_found)}")
if tuple(OPTIONAL_OUTPUTS) != _OUTPUTS:
    raise ImportError(f"{_MOVED}its outputs are not {', '.join(_OUTPUTS)}, but {', '.join(OPTIONAL_OUTPUTS)}")
if not hasattr(utils, _NAME) or not _looks_up(add_fused_lm_head.__code__, _NAME):
    raise ImportError(f"{_MOVED}add_fused_lm_head does not call trl.trainer.utils.{_NAME}")

__all__ = ["patch", "unpatch"]


def patch(impl: str = "cce", filter_eps: FilterEps = "auto") -> None:
    """Have the fused lm_head of TRL 1.16 take log-probabilities, entropy and statistics from linear_logprobs.

    For all models of this process, in training, in evaluation and of reference models: SFTTrainer, DPOTrainer,
    KTOTrainer, GRPOTrainer, RLOOTrainer and what is built on them. Call it before or after a trainer is made. Again
    replaces the options. Temperature, softcap, logit scale and outputs are TRL's. DistillationTrainer, RewardTrainer
    and trainers that compute logits have no fused lm_head, and stay as they are.

    Args:
        impl: as in linear_logprobs: "cce" samples the gradient, "cce_exact" does not.
        filter_eps: as in linear_logprobs.

    Raises:
        ImportError: as the import of this module does, a TRL with another fused lm_head, or none.
        TypeError, ValueError: an option.
        RuntimeError: something else has taken the place of TRL's function.
        NotImplementedError: where log-probabilities are computed first: an output that is not known here, or a
            gradient under DeepSpeed ZeRO-3, which frees lm_head's weight before the backward.
    """
    Options(impl=impl, filter_eps=filter_eps).check()
    _check_not_taken()
    setattr(utils, _NAME, LinearLogProbFunction(impl, filter_eps))


def unpatch() -> None:
    """Give TRL its own function again.

    Raises:
        ValueError: TRL is not patched.
        RuntimeError: something else has taken the place of ours.
    """
    _check_not_taken()
    if not isinstance(getattr(utils, _NAME), LinearLogProbFunction):
        raise ValueError("TRL is not patched")
    setattr(utils, _NAME, ChunkedLogProbFunction)


def _check_not_taken() -> None:
    there = getattr(utils, _NAME)
    if there is not ChunkedLogProbFunction and not isinstance(there, LinearLogProbFunction):
        raise RuntimeError(f"trl.trainer.utils.{_NAME}: expected TRL's own or cce_ext.trl's, got {there!r}")


class LinearLogProbFunction:
    """What stands in the place of TRL's ChunkedLogProbFunction, of which add_fused_lm_head uses apply alone.

    cce_patch knows by serves_trl that a model with a fused lm_head is served.
    """

    serves_trl = True

    def __init__(self, impl: str, filter_eps: FilterEps) -> None:
        self.impl, self.filter_eps = impl, filter_eps

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Collection[str] = _OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """log-probabilities, entropy, log_sum_sq_probs, mean_logits and is_top1, None for what outputs does not name.

        Args:
            hidden: [N, D].
            weight: [V, D], bias: [V] or None; of any dtype: they are cast to hidden's, or to autocast's.
            targets: [N]. TRL leaves ignored tokens out, or gives them another target and masks the results.
            temperature: as in linear_logprobs, as are final_logit_softcapping (softcap there) and logit_scale.
            chunk_size: unused: there are no chunks of logits.
            outputs: of the last four and "entropy", and "log_probs", which is always there.

        Raises NotImplementedError (see patch), and what linear_logprobs does.
        """
        wanted = [name for name in outputs if name != "log_probs"]
        if unknown := sorted(set(wanted) - set(_OUTPUTS)):
            raise NotImplementedError(f"{_MOVED}add_fused_lm_head asks for {', '.join(unknown)}")
        needs_grad = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if hasattr(weight, "ds_id") and needs_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "lm_head: DeepSpeed ZeRO-3 frees its weight after the forward, and linear_logprobs' backward needs "
                "it; call cce_ext.trl.unpatch(), or shard by FSDP2 or ZeRO-2"
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            # As TRL's own: of an fp32 head, and of a reference model that was loaded in another dtype.
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        more: dict[str, Any] = {"impl": self.impl, "filter_eps": self.filter_eps}
        found = linear_logprobs(
            *(hidden, weight, targets, bias),
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            outputs=tuple(wanted),
            **more,
        )
        return found.logprobs, found.entropy, found.log_sum_sq_probs, found.mean_logits, found.is_top1
