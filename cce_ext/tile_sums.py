"""What the portable forward makes of blocks of logits: log-sum-exps, vocab tiles' sums, statistics of the softmax.

Statistics are exact and none cancels: all are sums of terms of one sign, relative to a token's largest logit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .classifier import Classifier, padded
from .options import ENTROPY, LOG_SUM_SQ_PROBS, MAXIMUM, MEAN_LOGITS, STATS_ROWS
from .sampling import TILE_COLUMNS, num_tiles

# A token's sum of exponentials that says that no offset was needed: their squares do not overflow, nor do those of a
# tile that matters vanish.
_SAFE_SUMS = (1e-12, 1e19)

# A logarithm of a probability, in place of one of 0: its product with 0 is 0 and not NaN.
LOWEST_LOG = -1e4


class TileSums(NamedTuple):
    """Of some tokens, lse [R] and logarithms of each vocab tile's sum and L2 norm of exp(z), [R, tiles] or None.

    stats: [4, R] as lce_forward has them, argmax: [R]; None where nothing of them is asked for.
    """

    lse: Tensor
    log_mass: Tensor
    log_norm: Tensor | None
    stats: Tensor | None = None
    argmax: Tensor | None = None

    def head(self, count: int) -> TileSums:
        """Of the first tokens alone."""
        stats = None if self.stats is None else self.stats[:, :count]
        rest = (None if x is None else x[:count] for x in (self.log_norm, self.argmax))
        log_norm, argmax = rest
        return TileSums(self.lse[:count], self.log_mass[:count], log_norm, stats, argmax)


def reduce_tiles(
    classifier: Classifier, e: Tensor, scale: Tensor | None, buffer: Tensor, need_norm: bool, stats: int, offset: bool
) -> TileSums:
    """Of rows e [R, D], whose logits scale [R, 1] multiplies. Blocks of logits live in buffer.

    offset: take off each token's largest logit, whether or not its exponentials need that.
    """
    # Most logits are so small that exp needs no offset, which is two passes less over the block. Tokens where some are
    # not are done again; only on a CPU is it free to ask.
    if e.device.type != "cpu" or stats or offset:
        return _with_offset(classifier, e, scale, buffer, need_norm, stats)
    out = _without_offset(classifier, e, scale, buffer, need_norm)
    low, high = (math.log(x) for x in _SAFE_SUMS)
    again = (~((out.lse > low) & (out.lse < high))).nonzero()[:, 0]
    if len(again):
        scale = None if scale is None else scale[again]
        better = _with_offset(classifier, e[again], scale, buffer, need_norm, 0)
        for x, y in zip(out, better, strict=True):
            if x is not None and y is not None:
                x[again] = y
    return out


def _without_offset(
    classifier: Classifier, e: Tensor, scale: Tensor | None, buffer: Tensor, need_norm: bool
) -> TileSums:
    sums = e.new_empty(len(e), num_tiles(len(classifier.c)))
    norms = torch.empty_like(sums) if need_norm else None
    for v0 in range(0, len(classifier.c), buffer.shape[1]):
        z = _logits(classifier, e, scale, buffer, v0)
        tiles = slice(v0 // TILE_COLUMNS, (v0 + z.shape[1]) // TILE_COLUMNS)
        by_tile = z.exp_().view(len(z), -1, TILE_COLUMNS)
        torch.sum(by_tile, 2, out=sums[:, tiles])
        if norms is not None:
            torch.linalg.vector_norm(by_tile, dim=2, out=norms[:, tiles])
    lse = sums.sum(1).log_()
    return TileSums(lse, sums.log_(), None if norms is None else norms.log_())


def _with_offset(
    classifier: Classifier, e: Tensor, scale: Tensor | None, buffer: Tensor, need_norm: bool, stats: int
) -> TileSums:
    v = len(classifier.c)
    sums = e.new_empty(len(e), num_tiles(v))
    norms = torch.empty_like(sums) if need_norm or stats & LOG_SUM_SQ_PROBS else None
    spare = torch.empty_like(buffer) if stats & ENTROPY else buffer
    found = _Statistics(stats)
    for v0 in range(0, v, buffer.shape[1]):
        z = _logits(classifier, e, scale, buffer, v0)
        tiles = slice(v0 // TILE_COLUMNS, (v0 + z.shape[1]) // TILE_COLUMNS)
        if stats & MEAN_LOGITS:
            found.total.append(z[:, : v - v0].sum(1))
        if stats & MAXIMUM:
            largest, at = z.max(1, keepdim=True)
            found.largest.append(largest[:, 0])
            found.at.append(at[:, 0] + v0)
        else:
            largest = z.amax(1, keepdim=True)
        # A column of -inf (a masked vocabulary entry) must not make -inf - -inf.
        offset = largest.clamp(min=torch.finfo(z.dtype).min)
        z -= offset
        x = torch.exp(z, out=spare[: len(z), : z.shape[1]])
        by_tile = x.view(len(z), -1, TILE_COLUMNS)
        mass = torch.sum(by_tile, 2, out=sums[:, tiles])
        if stats & (ENTROPY | LOG_SUM_SQ_PROBS):
            found.offset.append(offset[:, 0])
            found.mass.append(mass.sum(1))
        if norms is not None:
            norm = torch.linalg.vector_norm(by_tile, dim=2, out=norms[:, tiles])
            if stats & LOG_SUM_SQ_PROBS:
                found.squares.append(norm.square().sum(1))
            norm.log_().add_(offset)
        if stats & ENTROPY:
            found.weighed.append(z.clamp_(min=LOWEST_LOG).mul_(x).sum(1))
        mass.log_().add_(offset)
    lse = sums.logsumexp(1)
    if not stats:
        return TileSums(lse, sums, norms)
    return TileSums(lse, sums, norms if need_norm else None, *found.combined(len(e), v, lse))


class _Statistics:
    """A list for each sum over a token's columns, with a [R] for each block.

    mass: of x = exp(z - offset), squares: of x^2, weighed: of x (z - offset).
    """

    def __init__(self, stats: int) -> None:
        self.stats = stats
        self.total: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.at: list[Tensor] = []
        self.offset: list[Tensor] = []
        self.mass: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.weighed: list[Tensor] = []

    def combined(self, n: int, v: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """stats [4, n] and argmax [n], of v columns."""
        out, argmax = like.new_zeros(STATS_ROWS, n), None
        if v == 0:  # no maximum: a softmax of nothing
            out[self._rows()] = float("nan")
            return out, torch.zeros(n, dtype=torch.int64, device=like.device) if self.stats & MAXIMUM else None
        if self.offset:
            offset = torch.stack(self.offset, 1)
            below = (offset - offset.amax(1, keepdim=True)).clamp_(min=LOWEST_LOG)
            factor = below.exp()
            mass = torch.stack(self.mass, 1)
            whole = (mass * factor).sum(1)
            log_whole = whole.log()
            if self.weighed:
                weighed = torch.stack(self.weighed, 1).add_(below * mass).mul_(factor).sum(1)
                out[0] = log_whole - weighed / whole
            if self.squares:
                squares = (torch.stack(self.squares, 1) * factor.square()).sum(1)
                out[1] = squares.log() - 2 * log_whole
        if self.total:
            out[2] = torch.stack(self.total, 1).sum(1) / v
        if self.largest:
            largest, block = torch.stack(self.largest, 1).max(1)
            out[3] = largest
            argmax = torch.stack(self.at, 1).gather(1, block[:, None])[:, 0]
        return out, argmax

    def _rows(self) -> list[int]:
        return [i for i in range(STATS_ROWS) if self.stats >> i & 1]


def _logits(classifier: Classifier, e: Tensor, scale: Tensor | None, buffer: Tensor, v0: int) -> Tensor:
    """Of columns from v0 on in whole tiles, [R, W]: -inf past the last one."""
    cols, bias = classifier.columns(v0, min(v0 + buffer.shape[1], len(classifier.c)))
    if cols.shape[1] < e.shape[1]:
        cols = padded(cols, len(cols))
    z = buffer[: len(e), : num_tiles(len(cols)) * TILE_COLUMNS]
    if len(cols) < z.shape[1]:
        z[:, len(cols) :] = -float("inf")
    classifier.logits(e, cols, bias, scale, out=z[:, : len(cols)])
    return z
