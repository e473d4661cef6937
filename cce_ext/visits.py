"""Gradients of the pairs of tokens and columns that a method visits, and where they are added."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .classifier import Classifier, take
from .sampling import OfEntropy
from .tile_sums import LOWEST_LOG

# The paper's filter drops blocks of this many tokens by this many columns, which divide a vocab tile.
FILTER_ROWS = 128
FILTER_COLUMNS = 128


@dataclass(frozen=True)
class Gradients:
    """Where the gradients go, and what every visit needs: dz = (a - h (log p + H)) p - b onehot, with p weighed by 1/q.

    a, b, lse, scale, and h and H of of_entropy: [N] in the accumulation dtype; the last two may be None. d_e and d_bias
    accumulate in it; d_c is written a vocab tile at a time. dz is multiplied by softcap's slope and by scale.
    """

    classifier: Classifier
    e: Tensor
    targets: Tensor
    lse: Tensor
    a: Tensor
    b: Tensor
    of_entropy: OfEntropy | None
    scale: Tensor | None
    d_e: Tensor | None
    d_c: Tensor | None
    d_bias: Tensor | None

    def only(self, *, e: bool, c: bool) -> Gradients:
        """The same, restricted to the gradient of e, or to those of c and bias."""
        return replace(
            self,
            d_e=self.d_e if e else None,
            d_c=self.d_c if c else None,
            d_bias=self.d_bias if c else None,
        )

    @property
    def needed(self) -> bool:
        return self.d_e is not None or self.d_c is not None or self.d_bias is not None

    def visits(self, rows: slice | Tensor, q: Tensor | None, v0: int | Tensor, width: int) -> Visits:
        """Of tokens rows to columns [v0, v0 + width), v0 being one number or one a token, with probability q or 1."""
        targets = self.targets[rows].long()
        label = targets - v0
        has_label = (label >= 0) & (label < width) & (targets < len(self.classifier.c))
        weight, steep, entropy = self.a[rows], None, None
        if self.of_entropy is not None:
            steep, entropy = (x[rows] for x in self.of_entropy)
        if q is not None:
            weight, steep = weight / q, None if steep is None else steep / q
        columns = (
            weight,
            self.lse[rows],
            torch.where(has_label, label, 0),
            has_label,
            torch.where(has_label, -self.b[rows], 0.0),
            steep,
            entropy,
            None if self.scale is None else self.scale[rows],
        )
        return Visits(rows, *(None if x is None else x[:, None] for x in columns))  # type: ignore[arg-type]

    def add(
        self,
        v0: int,
        v1: int,
        visits: Iterable[Visits],
        *,
        threshold: float | None = None,
        besides: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add what columns [v0, v1) owe, over all the visits they will ever get: d_c is rounded once, here.

        besides: what d_c gets besides, the outer product of a [columns] and a [D].
        """
        cols, bias = self.classifier.columns(v0, v1)
        d_cols = None
        if self.d_c is not None:
            same = self.d_c.dtype == cols.dtype
            d_cols = self.d_c[v0:v1] if same else torch.zeros_like(cols)
            if besides is not None:
                torch.outer(*besides, out=d_cols)
        for visit in visits:
            e = take(self.e, visit.rows).to(cols.dtype)
            log_p, slope = self._log_probabilities(e, cols, bias, visit)
            p = log_p.exp_() if visit.steep is None else log_p.exp()
            if threshold is not None:
                keep = _passes_filter(p, visit, threshold)
                visit, e, p, log_p = visit.map(operator.itemgetter(keep)), e[keep], p[keep], log_p[keep]
                slope = None if slope is None else slope[keep]
            weight = visit.weight
            if visit.steep is not None and visit.entropy is not None:
                weight = weight - log_p.clamp_(min=LOWEST_LOG).add_(visit.entropy).mul_(visit.steep)
            dz = p.mul_(weight).scatter_add_(1, visit.label, visit.minus_b)
            if slope is not None:
                dz *= slope
            if self.d_e is not None:
                if isinstance(visit.rows, slice):
                    self.d_e[visit.rows].addmm_(dz, cols)
                else:
                    self.d_e.index_add_(0, visit.rows, dz @ cols)
            if d_cols is not None:
                d_cols.addmm_(dz.T, e)
            if self.d_bias is not None:
                self.d_bias[v0:v1] += dz.sum(0)
        if self.d_c is not None and d_cols is not None and not same:
            self.d_c[v0:v1] = d_cols

    def _log_probabilities(
        self, e: Tensor, cols: Tensor, bias: Tensor | None, visit: Visits
    ) -> tuple[Tensor, Tensor | None]:
        """log p of rows e [R, D] and columns cols [W, D], [R, W], and what its logit grows by with e c, or None for 1.

        That is the scale, and with a softcap s times its slope 1 - (z/s)^2.
        """
        softcap, slope = self.classifier.softcap, visit.scale
        z = self.classifier.logits(e, cols, bias, None, out=e.new_empty(len(e), len(cols)))
        if softcap is not None:
            slope = 1.0 - (z / softcap).square_()
            if visit.scale is not None:
                slope *= visit.scale
        if visit.scale is not None:
            z *= visit.scale
        return z.sub_(visit.lse), slope


class Visits(NamedTuple):
    """Tokens that visit one block of columns. All but rows are [R, 1]."""

    rows: slice | Tensor
    weight: Tensor  # of p, a over q
    lse: Tensor
    label: Tensor  # the label's column in the block, 0 where it is elsewhere
    has_label: Tensor
    minus_b: Tensor  # 0 where the label is elsewhere
    steep: Tensor | None  # of p (log p + H), taken off: h over q
    entropy: Tensor | None
    scale: Tensor | None

    def map(self, of: Callable[[Tensor], Tensor]) -> Visits:
        """Rows, which are a tensor, included."""
        return Visits(*(of(x) if isinstance(x, Tensor) else None for x in self))  # type: ignore[arg-type]

    def cut(self, of: Callable[[Tensor], tuple[Tensor, ...]], count: int) -> list[Visits]:
        """count pieces of what of cuts each tensor into."""
        pieces = (of(x) if isinstance(x, Tensor) else (None,) * count for x in self)
        return [Visits(*piece) for piece in zip(*pieces, strict=True)]


def _passes_filter(p: Tensor, visit: Visits, eps: float) -> Tensor:
    """Which rows belong to a block with some |p - onehot| >= eps. NaN passes."""
    assert isinstance(visit.rows, Tensor)  # whole blocks of the filter come as indices
    distance = p.scatter_add(1, visit.label, -visit.has_label.to(p.dtype)).abs_().amax(1)
    block = torch.div(visit.rows, FILTER_ROWS, rounding_mode="floor")
    blocks = int(block[-1]) + 1 if len(block) else 0
    worst = distance.new_zeros(blocks).scatter_reduce_(0, block, distance, "amax")
    return ~(worst[block] < eps)
