"""Labels: which are ignored, and which are no classes."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def is_ignored(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Which of them are ignored: none where ignore_index is None."""
    return torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index


def that_count(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Which of them are not: by one kernel."""
    return torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index


def no_label(ignore_index: int | None) -> int:
    """What stands for a label where a shift leaves none. Where nothing is ignored, any: nobody sees its token."""
    return 0 if ignore_index is None else ignore_index


def may_look_at(targets: Tensor) -> bool:
    """Where looking at the targets costs no wait for a device, or where CCE_DEBUG=1 asks for it."""
    return targets.device.type == "cpu" or os.environ.get("CCE_DEBUG") == "1"


def check_target_range(targets: Tensor, v: int, ignore_index: int | None) -> None:
    """Raises IndexError that names the first target outside [0, V). Waits for the device."""
    bad = ((targets < 0) | (targets >= v)) & that_count(targets, ignore_index)
    if bool(bad.any()):
        at = int(bad.int().argmax())
        but = "" if ignore_index is None else f", nor ignore_index ({ignore_index})"
        raise IndexError(f"targets: {int(targets[at])} at flat position {at}: not in [0, {v}){but}")
