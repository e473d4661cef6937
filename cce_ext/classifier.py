"""Logits by blocks: how large a block is, and what computes it. What portable.py's two passes have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .labels import is_ignored
from .sampling import TILE_COLUMNS, num_tiles

# Logits held at a time: on a CPU what its last-level cache keeps, elsewhere what fills the device. Blocks are of so
# many tokens where there are as many, so that a block of c is read once for them.
BLOCK_LOGITS = {"cpu": 1 << 20}
BLOCK_LOGITS_DEFAULT = 1 << 25
BLOCK_ROWS = 2048

# Where a token's results must not depend on the others, products have so many rows, with zeros in those that are left
# over, and rows of a multiple of so many entries, which begin where the processor's vectors may. Then a row's sums were
# the same bits at every place of the product, for every width that was tried (MKL, 1 and 2 threads; MKL's fp64 products
# of odd widths have other sums at other places).
INVARIANT_ROWS = 64
INVARIANT_WIDTH = 16


def accumulate_dtype(e: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of products, of losses and of sums."""
    return torch.promote_types(e.dtype, torch.float32)


def block_logits(x: Tensor) -> int:
    return BLOCK_LOGITS.get(x.device.type, BLOCK_LOGITS_DEFAULT)


def block_shape(x: Tensor, n: int, v: int) -> tuple[int, int]:
    """Tokens and columns (whole tiles) of a block on x's device: its logits are bounded, and so are tokens x tiles."""
    logits = block_logits(x)
    rows = max(1, min(n, BLOCK_ROWS, logits // max(1, num_tiles(v))))
    return rows, max(1, min(num_tiles(v), logits // rows // TILE_COLUMNS)) * TILE_COLUMNS


def padded(x: Tensor, rows: int) -> Tensor:
    """A copy of x [R, D] with zeros after it, up to rows rows and to a multiple of INVARIANT_WIDTH columns."""
    out = x.new_zeros(rows, -(-x.shape[1] // INVARIANT_WIDTH) * INVARIANT_WIDTH)
    out[: len(x), : x.shape[1]] = x
    return out


@dataclass(frozen=True)
class Classifier:
    """What turns rows of e into logits: z = scale * softcap * tanh((e @ c.T + bias) / softcap), with a row's scale."""

    c: Tensor
    bias: Tensor | None
    softcap: float | None
    dtype: torch.dtype

    def columns(self, v0: int, v1: int) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias[v0:v1].to(self.dtype)
        return self.c[v0:v1].to(self.dtype), bias

    def logits(self, e: Tensor, c: Tensor, bias: Tensor | None, scale: Tensor | None, out: Tensor) -> Tensor:
        """Logits of rows e [R, D], scale [R, 1] or None for 1, and columns c [W, D], into out [R, W]."""
        torch.mm(e, c.T, out=out)
        if bias is not None:
            out += bias
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        if scale is not None:
            out *= scale
        return out


def label_logits(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    scale: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """z_{i, y_i} by gathering the labels' rows of c: [N], 0 where ignored, NaN where the target is not in [0, V)."""
    acc = accumulate_dtype(e)
    inside = (targets >= 0) & (targets < len(c))
    y = torch.where(inside, targets, 0).long()
    z = torch.empty(len(e), dtype=acc, device=e.device)
    if len(c) == 0:
        return z.fill_(float("nan")).masked_fill_(is_ignored(targets, ignore_index), 0.0)
    step = INVARIANT_ROWS if batch_invariant else max(1, block_logits(e) // max(1, e.shape[1]))
    for i in range(0, len(e), step):
        rows = slice(i, i + step)
        parts = [e[rows].to(acc), c[y[rows]].to(acc)]
        if batch_invariant:
            parts = [padded(x, step) for x in parts]
        z[rows] = torch.linalg.vecdot(*parts)[: len(e) - i]
    if bias is not None:
        z += bias[y]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if scale is not None:
        z *= scale
    return z.masked_fill_(~inside, float("nan")).masked_fill_(is_ignored(targets, ignore_index), 0.0)


def row_blocks(n: int) -> Iterator[slice]:
    """n tokens in blocks of up to BLOCK_ROWS."""
    for i in range(0, n, BLOCK_ROWS):
        yield slice(i, min(i + BLOCK_ROWS, n))


def take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def live_rows(live: Tensor) -> Tensor | None:
    """Indices of the live tokens, or None for all. Off the CPU always all: counting would wait for the device."""
    if live.device.type != "cpu" or bool(live.all()):
        return None
    return live.nonzero()[:, 0]
