"""What stands in for the pairs that the sampled backward does not visit: docs/design.md, "The control variate".

Of a token's tile the map knows the sum of its p, but not how it is spread. Here it is spread as the mean token's would
be. What that makes of the gradient is added for every pair and, where a pair is visited, taken off again by the visit's
weight: its mean over the draws is 0, whatever map, masses and spread are, since none of them depends on the draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .classifier import Classifier, block_logits, row_blocks
from .sampling import TILE_COLUMNS, OfEntropy, TileShare, num_tiles, tile_masses
from .tile_sums import LOWEST_LOG


def remainders(
    a: Tensor,
    live: Tensor,
    lse: Tensor,
    share: TileShare,
    softcap: float | None,
    visited: Tensor,
    q: Tensor,
    of_entropy: OfEntropy | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """(a - h (l + H)) m (1 - w) [T, N]: tokens' parts in their tiles by the masses m, less what visits take off.

    w = 1/q where a pair is visited. l = log(n^2 / m), n being the norm: log p if all of a tile's p that are not 0 are
    the same. scale: [N] of the logits, or None for 1.
    """
    mass = tile_masses(share).to(a.dtype)
    weight = a
    if of_entropy is not None:
        log_p = (2.0 * share.log2_norm - share.log2_mass).mul_(math.log(2.0)).nan_to_num_(nan=0.0)
        # What the map says is not finite where a loss is not: that shows in the visits.
        log_p = log_p.to(a.dtype).clamp_(min=LOWEST_LOG)
        weight = a - (log_p + of_entropy.entropy).mul_(of_entropy.gradient)
    if softcap is not None:
        # The softcap's slope at the logit that the tile would have if one column were all of its norm.
        z = lse + share.log2_norm * math.log(2.0)
        z = (z if scale is None else z.div_(scale)).clamp_(-softcap, softcap)
        mass *= 1.0 - z.div_(softcap).square_()
    if scale is not None:
        mass *= scale
    return mass.mul_(weight).mul_(1.0 - visited / q.to(a.dtype)).masked_fill_(~live, 0.0)


class ControlVariate:
    """Of one backward: a classifier, tokens e [N, D], which are live, their log-sum-exps and their logits' scale."""

    def __init__(
        self, classifier: Classifier, e: Tensor, live: Tensor, lse: Tensor, scale: Tensor | None = None
    ) -> None:
        self.classifier, self.e, self.live = classifier, e, live
        total = torch.zeros(e.shape[1], dtype=classifier.dtype, device=e.device)
        # Of the live tokens whose e is finite, as their log-sum-exp tells: one that is not must not reach the others.
        # 0 where there is none.
        counts = live & lse.isfinite()
        for rows, block in self._blocks(counts):
            # Scaled as the tokens' logits are, so that the mean token's are their mean.
            total += block.sum(0) if scale is None else scale[rows] @ block
        self.mean = (total / counts.sum().clamp(min=1)).to(e.dtype)

    def spread(self, t0: int, t1: int) -> tuple[Tensor, Tensor]:
        """Of tiles [t0, t1): the mean token's softmax within each, [T, W], and the mean row of c by it, [T, D].

        A tile whose logits are all -inf has neither: 0.
        """
        c, dtype = self.classifier.c, self.classifier.dtype
        softmax = torch.full((t1 - t0, TILE_COLUMNS), -float("inf"), dtype=dtype, device=c.device)
        rows = torch.empty(t1 - t0, c.shape[1], dtype=dtype, device=c.device)
        mean = self.mean.to(dtype)[None]
        step = max(1, block_logits(c) // c.shape[1] // TILE_COLUMNS)
        for t in range(t0, t1, step):
            cols, bias = self.classifier.columns(t * TILE_COLUMNS, min(min(t + step, t1) * TILE_COLUMNS, len(c)))
            tiles = slice(t - t0, t - t0 + num_tiles(len(cols)))
            z = softmax[tiles]
            self.classifier.logits(mean, cols, bias, None, out=z.view(1, -1)[:, : len(cols)])
            nowhere = z.amax(1, keepdim=True) == -float("inf")
            z.copy_(z.softmax(1).masked_fill_(nowhere, 0.0))
            if len(cols) % TILE_COLUMNS:
                cols = torch.nn.functional.pad(cols, (0, 0, 0, -len(cols) % TILE_COLUMNS))
            torch.bmm(z[:, None], cols.unflatten(0, (-1, TILE_COLUMNS)), out=rows[tiles, None])
        return softmax, rows

    def add(
        self, t0: int, remainder: Tensor, d_e: Tensor | None, d_bias: Tensor | None, need_c: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Add what remainder [T, N] makes of tiles from t0 on to d_e and d_bias.

        Where need_c, returns the softmax [T, W] and sums of e [T, D]: a tile's outer product of the two belongs to dC.
        """
        softmax, rows = self.spread(t0, t0 + len(remainder))
        if d_e is not None:
            d_e.addmm_(remainder.T, rows)
        if d_bias is not None:
            v0 = t0 * TILE_COLUMNS
            part = (softmax * remainder.sum(1, keepdim=True)).flatten()[: len(d_bias) - v0]
            d_bias[v0 : v0 + len(part)] += part
        if not need_c:
            return None
        sums = torch.zeros_like(rows)
        for block, e in self._blocks(self.live):
            sums.addmm_(remainder[:, block], e)
        return softmax, sums

    def _blocks(self, keep: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of tokens and their e, as 0 where they are not kept: it may be NaN there, and so would 0 times it."""
        # Only on a CPU is it free to ask.
        everything = keep.device.type == "cpu" and bool(keep.all())
        for rows in row_blocks(len(self.e)):
            e = self.e[rows].to(self.classifier.dtype)
            yield rows, e if everything else e.masked_fill(~keep[rows, None], 0.0)
