"""How values of tokens become one: losses, and the z-loss of their log-sum-exps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from . import vocab_parallel
from .labels import that_count
from .options import check_ignore_index, check_reduction, check_shift, check_tensor


def compute_z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = 0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    mean_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The z-loss lse^2, which keeps the softmax's normaliser near 1 (PaLM, Chowdhery et al., 2022, section 5).

    Args:
        lse: [.., T - shift], as linear_cross_entropy returns it with the same shift. May be a DTensor.
        targets: [.., T] or None. Tokens whose (shifted) target is ignore_index count for nothing. Plain targets beside
            a DTensor lse are the whole ones, the same on all ranks.
        shift: as given to linear_cross_entropy.
        ignore_index: likewise.
        reduction: likewise.
        mean_group: likewise.

    Returns:
        A scalar, or lse's shape for "none", in lse's dtype.

    Raises:
        TypeError: what is no tensor or no integer.
        ValueError: shapes or options.
    """
    check_reduction(reduction, mean_group)
    check_tensor("lse", lse)
    if targets is not None:
        check_tensor("targets", targets)
    check_ignore_index(ignore_index, targets)
    z_loss = lse.square()
    if targets is None:
        counts = torch.ones_like(lse, dtype=torch.bool)
    else:
        if is_dtensor(targets) and not is_dtensor(lse):
            raise ValueError("targets: expected a plain tensor like lse, got a DTensor; give its to_local()")
        shift = check_shift(shift, targets)
        if shift:
            targets = targets[..., shift:]
        if targets.shape != lse.shape:
            raise ValueError(
                f"targets: after shift={shift} expected lse's shape {list(lse.shape)}, got {list(targets.shape)}"
            )
        counts = that_count(targets, ignore_index)
        if is_dtensor(lse) and not is_dtensor(counts):
            from .distributed import like

            counts = like(lse, counts)
        z_loss = z_loss.masked_fill(~counts, 0.0)
    return reduce_tokens(z_loss, counts, reduction, mean_group)


def is_dtensor(x: Tensor | None) -> bool:
    """By what only a DTensor has: importing the class takes longer than all the rest of this package."""
    return hasattr(x, "device_mesh")


def reduce_tokens(
    values: Tensor, counts: Tensor | None, reduction: str, mean_group: dist.ProcessGroup | None = None
) -> Tensor:
    """values must be 0 where counts, of which only "mean" asks, is False. A DTensor scalar is the same on all ranks."""
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "mean":
        assert counts is not None
        count: Any = counts.sum()
        if mean_group is not None:
            count = vocab_parallel.mean_count(count.full_tensor() if is_dtensor(count) else count, mean_group)
        total = total / count
    if not is_dtensor(total):
        return total
    from .distributed import replicated

    return replicated(total)
