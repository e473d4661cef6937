"""The three methods in plain torch, for any device and float dtype, which never hold the [N, V] logits.

Forward walks blocks of tokens by vocabulary; backward visits (tokens, columns) pairs chosen by the method.
Same contract as the CUDA kernels; their oracle, together with reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .classifier import Classifier, accumulate_dtype, block_logits, block_shape, live_rows, take
from .control_variate import ControlVariate, remainders
from .options import KernelOptions
from .sampling import (
    CHAIN_TILES,
    LOG2_E,
    MASS_STEPS,
    TILE_COLUMNS,
    draw_visits,
    encode_tiles,
    even_share,
    log2_visit_rate,
    num_tiles,
    tile_shares,
    visit_probabilities,
)

# The paper's filter drops blocks of this many tokens by this many columns, which divide a vocab tile.
FILTER_ROWS = 128
FILTER_COLUMNS = 128

# A token's sum of exponentials that says that no offset was needed: their squares do not overflow, nor do those of a
# tile that matters vanish.
_SAFE_SUMS = (1e-12, 1e19)


def lce_forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label: Tensor,
    *,
    options: KernelOptions,
    need_map: bool,
    stats: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, ...]:
    """From the label logits [N]: nll [N], lse [N] and the tile map, [tiles, N] int16 or [0, 0] where it is not needed.

    The map holds sum and L2 norm of each tile's exp(z - label logit), as sampling.encode_tiles writes them: those of
    its p are these over exp(nll), for any offset of the logits.
    """
    if stats or batch_invariant or options.scale is not None:
        raise NotImplementedError("lce_forward: portable statistics, scales and batch invariance are not there yet")
    n, v = len(e), len(c)
    acc = accumulate_dtype(e)
    classifier = Classifier(c, bias, options.softcap, acc)
    lse = torch.zeros(n, dtype=acc, device=e.device)
    tile_map = torch.zeros((num_tiles(v), n) if need_map else (0, 0), dtype=torch.int16, device=e.device)

    ignored = targets == options.ignore_index
    live = live_rows(~ignored)
    count = n if live is None else len(live)
    reference = label.nan_to_num(nan=0.0)
    step, width = block_shape(e, count, v)
    buffer = torch.empty(step, width, dtype=acc, device=e.device)
    for i in range(0, count, step):
        rows = slice(i, min(i + step, count)) if live is None else live[i : i + step]
        sums = _reduce_tiles(classifier, take(e, rows).to(acc), buffer, need_map)
        lse[rows] = sums.lse
        if sums.log_norm is not None:
            logs = (x.sub_(reference[rows, None]).mul_(LOG2_E) for x in (sums.log_mass, sums.log_norm))
            tile_map[:, rows] = encode_tiles(*logs).T

    lse.masked_fill_(ignored, 0.0)
    return lse - label, lse, tile_map, lse.new_empty(0, 0), targets.new_empty(0, dtype=torch.int64)


class TileSums(NamedTuple):
    """Of some tokens, lse [R] and logarithms of each vocab tile's sum and L2 norm of exp(z), [R, tiles] or None."""

    lse: Tensor
    log_mass: Tensor
    log_norm: Tensor | None


def _reduce_tiles(classifier: Classifier, e: Tensor, buffer: Tensor, need_norm: bool) -> TileSums:
    """Of rows e [R, D]. Blocks of logits live in buffer."""
    # Most logits are so small that exp needs no offset, which is two passes less over the block. Tokens where some are
    # not are done again; only on a CPU is it free to ask.
    if e.device.type != "cpu":
        return _reduce_blocks(classifier, e, buffer, need_norm, with_offset=True)
    out = _reduce_blocks(classifier, e, buffer, need_norm, with_offset=False)
    low, high = (math.log(x) for x in _SAFE_SUMS)
    again = (~((out.lse > low) & (out.lse < high))).nonzero()[:, 0]
    if len(again):
        better = _reduce_blocks(classifier, e[again], buffer, need_norm, with_offset=True)
        for x, y in zip(out, better, strict=True):
            if x is not None and y is not None:
                x[again] = y
    return out


def _reduce_blocks(
    classifier: Classifier, e: Tensor, buffer: Tensor, need_norm: bool, *, with_offset: bool
) -> TileSums:
    v = len(classifier.c)
    sums = e.new_empty(len(e), num_tiles(v))
    norms = torch.empty_like(sums) if need_norm else None
    for v0 in range(0, v, buffer.shape[1]):
        cols, bias = classifier.columns(v0, min(v0 + buffer.shape[1], v))
        count, first = num_tiles(len(cols)), v0 // TILE_COLUMNS
        z = buffer[: len(e), : count * TILE_COLUMNS]
        if len(cols) < z.shape[1]:
            z[:, len(cols) :] = -float("inf")
        classifier.logits(e, cols, bias, out=z[:, : len(cols)])
        offset = None
        if with_offset:
            # A column of -inf (a masked vocabulary entry) must not make -inf - -inf.
            offset = z.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
            z -= offset
        by_tile = z.exp_().view(len(z), -1, TILE_COLUMNS)
        mass = torch.sum(by_tile, 2, out=sums[:, first : first + count])
        norm = None if norms is None else norms[:, first : first + count]
        if norm is not None:
            torch.linalg.vector_norm(by_tile, dim=2, out=norm)
        if offset is not None:
            for x in (mass, norm):
                if x is not None:
                    x.log_().add_(offset)
    if with_offset:
        return TileSums(sums.logsumexp(1), sums, norms)
    lse = sums.sum(1).log_()
    return TileSums(lse, sums.log_(), None if norms is None else norms.log_())


def lce_backward(
    g_nll: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    nll: Tensor,
    lse: Tensor,
    tile_map: Tensor,
    entropy: Tensor | None,
    seed: Tensor | None,
    *,
    options: KernelOptions,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of e, c and bias in their dtypes, each only where needed, from dz = a p - b onehot (docs/design.md)."""
    if g_entropy is not None or options.scale is not None:
        raise NotImplementedError("lce_backward: the portable gradient of the entropy and scales are not there yet")
    acc = accumulate_dtype(e)
    # Masked, not multiplied: what flows into an ignored token may be anything, NaN as well. Its p is 0.
    ignored = targets == options.ignore_index
    lse = lse.masked_fill(ignored, float("inf"))
    b = torch.zeros_like(lse) if g_nll is None else g_nll.to(acc).masked_fill(ignored, 0.0)
    a = b if g_lse is None else b + g_lse.to(acc).masked_fill(ignored, 0.0)
    a = a.masked_fill((nll != nll) & ~ignored & ((targets < 0) | (targets >= len(c))), float("nan"))

    gradients = Gradients(
        Classifier(c, bias, options.softcap, acc),
        e,
        targets,
        lse,
        a,
        b,
        d_e=torch.zeros_like(e, dtype=acc, memory_format=torch.contiguous_format) if need_e else None,
        d_c=torch.zeros_like(c, memory_format=torch.contiguous_format) if need_c else None,
        d_bias=torch.zeros_like(bias, dtype=acc) if need_bias and bias is not None else None,
    )
    live = (a != 0) | (b != 0)
    # A side that is not filtered takes its gradient from a pass over every pair.
    unfiltered = gradients.only(e=not options.filter_e, c=not options.filter_c)
    filtered = gradients.only(e=options.filter_e, c=options.filter_c)
    if options.method == "exact":
        unfiltered, filtered = gradients, gradients.only(e=False, c=False)
    if unfiltered.needed:
        _exact(unfiltered, live)
    if filtered.needed:
        if options.method == "threshold":
            _threshold(filtered, live, tile_map, nll, options.eps)
        else:
            assert seed is not None
            _sampled(filtered, live, tile_map, nll, seed, options.eps)
    d_e, d_bias = gradients.d_e, gradients.d_bias
    return (
        None if d_e is None else d_e.to(e.dtype),
        gradients.d_c,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


@dataclass(frozen=True)
class Gradients:
    """Where the gradients go, and what every visit needs: dz = weight * p - b * onehot, times softcap's slope.

    a, b, lse: [N] in the accumulation dtype. d_e and d_bias accumulate in it; d_c is written a vocab tile at a time.
    """

    classifier: Classifier
    e: Tensor
    targets: Tensor
    lse: Tensor
    a: Tensor
    b: Tensor
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

    def visits(self, rows: slice | Tensor, weight: Tensor, v0: int | Tensor, width: int) -> Visits:
        """Of tokens rows to columns [v0, v0 + width), v0 being one number or one a token."""
        targets = self.targets[rows].long()
        label = targets - v0
        has_label = (label >= 0) & (label < width) & (targets < len(self.classifier.c))
        columns = (
            weight,
            self.lse[rows],
            torch.where(has_label, label, 0),
            has_label,
            torch.where(has_label, -self.b[rows], 0.0),
        )
        return Visits(rows, *(x[:, None] for x in columns))

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
            p, slope = self._probabilities(e, cols, bias, visit.lse)
            if threshold is not None:
                keep = _passes_filter(p, visit, threshold)
                visit, e, p = visit.where(keep), e[keep], p[keep]
                slope = None if slope is None else slope[keep]
            dz = p.mul_(visit.weight).scatter_add_(1, visit.label, visit.minus_b)
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

    def _probabilities(self, e: Tensor, cols: Tensor, bias: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor | None]:
        """p of rows e [R, D] and columns cols [W, D], and with a softcap its slope 1 - (z/s)^2, each [R, W]."""
        softcap = self.classifier.softcap
        z = self.classifier.logits(e, cols, bias, out=e.new_empty(len(e), len(cols)))
        slope = None if softcap is None else 1.0 - (z / softcap).square_()
        return z.sub_(lse).exp_(), slope


class Visits(NamedTuple):
    """Tokens that visit one block of columns. All but rows are [R, 1]."""

    rows: slice | Tensor
    weight: Tensor  # of p
    lse: Tensor
    label: Tensor  # the label's column in the block, 0 where it is elsewhere
    has_label: Tensor
    minus_b: Tensor  # 0 where the label is elsewhere

    def where(self, keep: Tensor) -> Visits:
        return Visits(*(x[keep] for x in self if isinstance(x, Tensor)))


def _exact(g: Gradients, live: Tensor) -> None:
    """Every live token against every column."""
    rows = live_rows(live)
    if rows is None and live.device.type != "cpu":
        # Masked, since 0 times a row that is not finite would reach every row of dC.
        g = replace(g, e=g.e.masked_fill(~live[:, None], 0.0), lse=g.lse.masked_fill(~live, float("inf")))
    count, v = len(live) if rows is None else len(rows), len(g.classifier.c)
    step, width = block_shape(g.e, count, v)
    chunks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    picked = chunks if rows is None else [rows[chunk] for chunk in chunks]
    for v0 in range(0, v, width):
        v1 = min(v0 + width, v)
        g.add(v0, v1, (g.visits(r, g.a[r], v0, v1 - v0) for r in picked))


def _sampled(g: Gradients, live: Tensor, tile_map: Tensor, nll: Tensor, seed: Tensor, eps: float) -> None:
    """Visit tile t for token i with probability q = min(1, norm * (1/eps - 1)), norm that of its p; weigh p by 1/q.

    The label's own tile is always visited (q = 1), so that the label's part is exact and adds no variance, and
    p - 1 is formed before any rounding. A token has at most 1/eps visits in expectation. What is not visited has the
    control variate.
    """
    n, v, device = len(live), len(g.classifier.c), live.device
    label_tile = torch.div(g.targets.long(), TILE_COLUMNS, rounding_mode="floor")
    group = max(1, block_logits(g.e) // 16 // max(1, n) // CHAIN_TILES) * CHAIN_TILES
    rates = log2_visit_rate(eps), even_share(eps, num_tiles(v))
    variate = ControlVariate(g.classifier, g.e, live, g.lse)
    for t0 in range(0, num_tiles(v), group):
        t1 = min(t0 + group, num_tiles(v))
        share = tile_shares(tile_map[t0:t1], nll)
        q = visit_probabilities(share, *rates)
        q.masked_fill_(label_tile == torch.arange(t0, t1, device=device)[:, None], 1.0)
        visited = draw_visits(seed, t0, q, live)
        remainder = remainders(g.a, live, g.lse, share, g.classifier.softcap, visited, q)
        besides = variate.add(t0, remainder, g.d_e, g.d_bias, g.d_c is not None)
        _visit_tiles(g, t0, TILE_COLUMNS, visited, q=q, besides=besides)
    if g.d_e is not None:
        # Their 0 met rows that may not be finite.
        g.d_e.masked_fill_(~live[:, None], 0.0)


def _threshold(g: Gradients, live: Tensor, tile_map: Tensor, nll: Tensor, eps: float) -> None:
    """The paper's filter (section 4.3): drop a FILTER_ROWS x FILTER_COLUMNS block if all |p - onehot| < eps."""
    n, v, device = len(live), len(g.classifier.c), live.device
    per_tile = TILE_COLUMNS // FILTER_COLUMNS
    label_block = torch.div(g.targets.long(), FILTER_COLUMNS, rounding_mode="floor")
    group = max(1, block_logits(g.e) // 8 // max(1, n))
    for t0 in range(0, num_tiles(v), group):
        t1 = min(t0 + group, num_tiles(v))
        columns = torch.arange(t0 * per_tile, t1 * per_tile, device=device)
        # No entry exceeds its tile's mass. The map rounds that by half a step; the other half is far more than what
        # fp32 may be off by. What is not finite is looked at.
        share = tile_shares(tile_map[t0:t1], nll)
        may_pass = ~(share.log2_mass + 1.0 / MASS_STEPS < math.log2(eps)) | share.above
        may_pass = may_pass.repeat_interleave(per_tile, 0) | (label_block == columns[:, None])
        padded = torch.nn.functional.pad(may_pass & live, (0, -n % FILTER_ROWS))
        block_may_pass = padded.unflatten(1, (-1, FILTER_ROWS)).any(2)
        chosen = block_may_pass.repeat_interleave(FILTER_ROWS, 1)[:, :n] & live
        last = -(-v // FILTER_COLUMNS) - t0 * per_tile
        _visit_tiles(g, t0 * per_tile, FILTER_COLUMNS, chosen[:last], threshold=eps)


def _passes_filter(p: Tensor, visit: Visits, eps: float) -> Tensor:
    """Which rows belong to a block with some |p - onehot| >= eps. NaN passes."""
    assert isinstance(visit.rows, Tensor)  # whole blocks of the filter come as indices
    distance = p.scatter_add(1, visit.label, -visit.has_label.to(p.dtype)).abs_().amax(1)
    block = torch.div(visit.rows, FILTER_ROWS, rounding_mode="floor")
    blocks = int(block[-1]) + 1 if len(block) else 0
    worst = distance.new_zeros(blocks).scatter_reduce_(0, block, distance, "amax")
    return ~(worst[block] < eps)


def _visit_tiles(
    g: Gradients,
    t0: int,
    width: int,
    chosen: Tensor,
    *,
    q: Tensor | None = None,
    besides: tuple[Tensor, Tensor] | None = None,
    threshold: float | None = None,
) -> None:
    """Visit tiles t0, t0 + 1, ... of width columns as chosen [tiles, N] says, with p weighed by 1/q.

    besides: for each tile, what Gradients.add takes by that name. Waits for the device.
    """
    tile, rows = chosen.nonzero().unbind(1)
    rows = rows.contiguous()
    weight = g.a[rows] if q is None else g.a[rows] / q[chosen]
    visits = g.visits(rows, weight, (tile + t0) * width, width)
    by_token = [x for x in visits if isinstance(x, Tensor)]
    counts = chosen.sum(1).tolist()
    # A tile that most tokens visit is taken in pieces. They are cut by token and not by count, so that a block of
    # the filter stays whole.
    n, v = len(g.e), len(g.classifier.c)
    step = max(FILTER_ROWS, block_logits(g.e) // width)
    edges = torch.tensor(range(step, n, step), dtype=rows.dtype, device=rows.device)
    for k, parts in enumerate(zip(*(x.split(counts) for x in by_token), strict=True)):
        v0 = (t0 + k) * width
        v1 = min(v0 + width, v)
        pieces = [Visits(*parts)] if counts[k] else []
        if counts[k] > step:
            cuts = torch.searchsorted(parts[0], edges).tolist()
            pieces = [Visits(*piece) for piece in zip(*(x.tensor_split(cuts) for x in parts), strict=True)]
        if besides is not None:
            g.add(v0, v1, pieces, besides=(besides[0][k, : v1 - v0], besides[1][k]))
        elif pieces:
            g.add(v0, v1, pieces, threshold=threshold)
