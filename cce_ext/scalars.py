"""Numbers and flags, of a call or of each token: what they must be. Errors name the argument and what it was."""

from __future__ import annotations

import torch
from torch import Tensor


def is_a(x: object, conversion: str) -> bool:
    """Whether x is a number that has this conversion, of whatever library. Dynamo's symbolic numbers are not asked."""
    return torch.compiler.is_compiling() or hasattr(x, conversion)


def check_number(name: str, value: float, expected: str = "a positive number", below: float = float("inf")) -> None:
    """Raises TypeError for what is no number, ValueError for one outside (0, below).

    A tensor of one element is one, unless it is to be given a gradient: nothing here has one of such a number.
    """
    if not is_a(value, "__float__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected {expected}, got a tensor of shape {list(value.shape)}")
        if value.requires_grad:
            raise ValueError(
                f"{name}: expected {expected}, got a tensor that requires a gradient: it is given none; give its item()"
            )
    if not 0 < value < below:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError for what no operator takes as a bool: text and collections. Numbers of any library are some."""
    if not is_a(value, "__bool__"):
        raise TypeError(f"{name}: expected a bool, got {value!r}")


def check_of_tokens(name: str, x: Tensor, e: Tensor) -> None:
    """x [N], a number for each token e [N, D], in the dtype of sums. Raises TypeError or ValueError."""
    dtype = torch.promote_types(e.dtype, torch.float32)
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} for e of {e.dtype}, got {x.dtype}")
    if x.shape != e.shape[:1]:
        raise ValueError(f"{name}: expected [{len(e)}], one for each token, got {list(x.shape)}")
    if x.device != e.device:
        raise ValueError(f"{name}: expected {e.device} like e, got {x.device}")
