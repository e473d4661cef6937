"""TRL's fused lm_head: a forward of a model's own, which computes log-probabilities and never asks for the loss.

A trainer of TRL gives it to its models (trl.trainer.utils.add_fused_lm_head), by which it passes cce_patch by.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

_NOT_IN_USE = (
    "cce_patch is not in use: this {} was given the fused lm_head of TRL, as TRL's trainers do, which computes "
    "log-probabilities by itself and does not ask for the model's loss; call cce_ext.trl.patch() instead of cce_patch"
)


def has_fused_head(forward: Any) -> bool:
    """Whether it is what add_fused_lm_head gives a model, or wraps that, as accelerate does."""
    while forward is not None:
        code = getattr(forward, "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def is_served() -> bool:
    """Whether cce_ext.trl.patch is in place."""
    utils = sys.modules.get("trl.trainer.utils")
    return getattr(getattr(utils, "_ChunkedLogProbFunction", None), "serves_trl", False)


def warning_setattr(cls: Any) -> Callable[[Any, str, Any], None]:
    """cls's __setattr__, but it warns where a patched model's forward is replaced by one that has no use for the patch.

    This is when a trainer is made: no later call would come by.
    """
    original = getattr(cls.__setattr__, "_cce_original", cls.__setattr__)

    @functools.wraps(original)
    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "forward" and has_fused_head(value) and not is_served():
            warnings.warn(_NOT_IN_USE.format(type(self).__name__), stacklevel=3)
        original(self, name, value)

    __setattr__._cce_original = original  # type: ignore[attr-defined]
    return __setattr__
