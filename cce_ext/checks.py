"""What inputs must be; every error names the argument and what it was."""

from __future__ import annotations

import os

import torch
from torch import Tensor

_EMPTY = "; if DeepSpeed ZeRO-3 has sharded c, compute the loss in the forward of the module that owns it"
REDUCTIONS = ("mean", "sum", "none")


def check_inputs(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """e [.., D], c [V, D], targets [..], bias [V]: shapes, dtypes and devices that belong together.

    Raises TypeError for a dtype, ValueError for a shape or a device.
    """
    for name, x in (("e", e), ("c", c), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {x.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 or int32, got {targets.dtype}")
    for name, x in (("c", c), ("bias", bias)):
        if x is not None and x.dtype != e.dtype:
            raise TypeError(f"{name}: expected {e.dtype} like e, got {x.dtype} (autocast casts e, c and bias)")

    if e.dim() < 1:
        raise ValueError("e: expected [.., D], got a tensor without dimensions")
    if c.dim() != 2 or c.shape[1] != e.shape[-1]:
        raise ValueError(
            f"c: expected [V, {e.shape[-1]}] for e of shape {_shape(e)}, got {_shape(c)}"
            + (_EMPTY if c.numel() == 0 and c.dim() < 2 else "")
        )
    if targets.shape != e.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {list(e.shape[:-1])} for e of shape {_shape(e)}, got {_shape(targets)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != c.shape[0]):
        raise ValueError(f"bias: expected [{c.shape[0]}] for c of shape {_shape(c)}, got {_shape(bias)}")

    for name, x in (("c", c), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != e.device:
            raise ValueError(f"{name}: expected {e.device} like e, got {x.device}")


def check_options(reduction: str, softcap: float | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap!r}")


def check_shift(shift: int, targets: Tensor) -> int:
    """shift as an int in [0, T), T being the targets' last dimension."""
    shift = int(shift)
    length = targets.shape[-1] if targets.dim() else 0
    if shift != 0 and not 0 <= shift < length:
        raise ValueError(f"shift: expected 0 <= shift < {length}, the last dimension of targets, got {shift}")
    return shift


def may_look_at(targets: Tensor) -> bool:
    """Where looking at the targets costs no wait for a device, or where CCE_DEBUG=1 asks for it."""
    return targets.device.type == "cpu" or os.environ.get("CCE_DEBUG") == "1"


def check_target_range(targets: Tensor, v: int, ignore_index: int) -> None:
    """Raises IndexError that names the first target outside [0, V). Waits for the device."""
    bad = ((targets < 0) | (targets >= v)) & (targets != ignore_index)
    if bool(bad.any()):
        at = int(bad.int().argmax())
        raise IndexError(
            f"targets: {int(targets[at])} at flat position {at}: not in [0, {v}), nor ignore_index ({ignore_index})"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
