"""The three methods in plain torch, for any device and float dtype, which never hold the [N, V] logits.

Forward walks blocks of tokens by vocabulary; backward visits (tokens, columns) pairs chosen by the method.
Same contract as the CUDA kernels; their oracle, together with reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .options import KernelOptions
from .sampling import CHAIN_TILES, TILE_COLUMNS, draw_visits, log_visit_rate, visit_probabilities

# The paper's filter drops blocks of this many tokens by one vocab tile.
FILTER_ROWS = 128

# Logits held at a time: on a CPU what its last-level cache keeps, elsewhere what fills the device. Blocks are of so
# many tokens where there are as many, so that a block of c is read once for them.
BLOCK_LOGITS = {"cpu": 1 << 20}
BLOCK_LOGITS_DEFAULT = 1 << 25
BLOCK_ROWS = 2048

# Sums of exponentials that say that no offset was needed: no logit near overflow, no row near underflow.
_SAFE_SUMS = (1e-30, 1e30)


def accumulate_dtype(e: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of products, of losses and of sums."""
    return torch.promote_types(e.dtype, torch.float32)


def num_tiles(v: int) -> int:
    return -(-v // TILE_COLUMNS)


def _block_shape(x: Tensor, n: int, v: int) -> tuple[int, int]:
    """Tokens and columns (whole tiles) of a block on x's device: its logits are bounded, and so are tokens x tiles."""
    logits = _block_logits(x)
    rows = max(1, min(n, BLOCK_ROWS, logits // max(1, num_tiles(v))))
    return rows, max(1, min(num_tiles(v), logits // rows // TILE_COLUMNS)) * TILE_COLUMNS


@dataclass(frozen=True)
class Classifier:
    """What turns rows of e into logits: z = softcap * tanh((e @ c.T + bias) / softcap)."""

    c: Tensor
    bias: Tensor | None
    softcap: float | None
    dtype: torch.dtype

    def columns(self, v0: int, v1: int) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias[v0:v1].to(self.dtype)
        return self.c[v0:v1].to(self.dtype), bias

    def logits(self, e: Tensor, c: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """Logits of rows e [R, D] and columns c [W, D], into out [R, W]."""
        torch.mm(e, c.T, out=out)
        if bias is not None:
            out += bias
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out


def label_logits(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, softcap: float | None
) -> Tensor:
    """z_{i, y_i} by gathering the labels' rows of c: [N], 0 where ignored, NaN where the target is not in [0, V)."""
    acc = accumulate_dtype(e)
    inside = (targets >= 0) & (targets < len(c))
    y = torch.where(inside, targets, 0).long()
    z = torch.empty(len(e), dtype=acc, device=e.device)
    if len(c) == 0:
        return z.fill_(float("nan")).masked_fill_(targets == ignore_index, 0.0)
    step = max(1, _block_logits(e) // max(1, e.shape[1]))
    for i in range(0, len(e), step):
        rows = slice(i, i + step)
        z[rows] = torch.linalg.vecdot(e[rows].to(acc), c[y[rows]].to(acc))
    if bias is not None:
        z += bias[y]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.masked_fill_(~inside, float("nan")).masked_fill_(targets == ignore_index, 0.0)


def lce_forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label: Tensor,
    *,
    options: KernelOptions,
    need_map: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the label logits [N]: nll [N], lse [N] and the tile map, [tiles, N] bf16 or [0, 0] where it is not needed.

    The map holds each tile's largest logit relative to the token's label logit, rounded down: the largest p is
    exp(map - nll), exact enough for any offset of the logits, and never above the true one.
    """
    n, v = len(e), len(c)
    acc = accumulate_dtype(e)
    classifier = Classifier(c, bias, options.softcap, acc)
    lse = torch.zeros(n, dtype=acc, device=e.device)
    tile_map = torch.zeros((num_tiles(v), n) if need_map else (0, 0), dtype=torch.bfloat16, device=e.device)

    ignored = targets == options.ignore_index
    live = _live_rows(~ignored)
    count = n if live is None else len(live)
    reference = label.nan_to_num(nan=0.0)
    step, width = _block_shape(e, count, v)
    buffer = torch.empty(step, width, dtype=acc, device=e.device)
    for i in range(0, count, step):
        rows = slice(i, min(i + step, count)) if live is None else live[i : i + step]
        tile_lse, tile_max = _tile_lse(classifier, _take(e, rows).to(acc), buffer, need_map)
        lse[rows] = tile_lse.logsumexp(1)
        if tile_max is not None:
            tile_map[:, rows] = _round_down(tile_max.sub_(reference[rows][:, None])).T

    lse.masked_fill_(ignored, 0.0)
    return lse - label, lse, tile_map


def _tile_lse(classifier: Classifier, e: Tensor, buffer: Tensor, need_max: bool) -> tuple[Tensor, Tensor | None]:
    """log sum exp and, if needed, maximum of each vocab tile's logits, [R, tiles], for rows e [R, D].

    Blocks of logits live in buffer.
    """
    v = len(classifier.c)
    sums = e.new_empty(len(e), num_tiles(v))
    peaks = torch.empty_like(sums) if need_max else None

    def blocks() -> Iterator[tuple[Tensor, slice]]:
        """Logits [R, columns], whole tiles with -inf past the vocabulary, and the numbers of these tiles."""
        for v0 in range(0, v, buffer.shape[1]):
            cols, bias = classifier.columns(v0, min(v0 + buffer.shape[1], v))
            tiles, first = num_tiles(len(cols)), v0 // TILE_COLUMNS
            z = buffer[: len(e), : tiles * TILE_COLUMNS]
            if len(cols) < z.shape[1]:
                z[:, len(cols) :] = -float("inf")
            classifier.logits(e, cols, bias, out=z[:, : len(cols)])
            yield z, slice(first, first + tiles)

    def tiles_of(z: Tensor) -> Tensor:
        return z.view(len(z), -1, TILE_COLUMNS)

    # Most logits are so small that exp needs no offset, which is two passes less over the block. Where some are
    # not, all is done again; only on a CPU is it free to ask.
    if e.device.type == "cpu" and len(e):
        for z, tiles in blocks():
            if peaks is not None:
                torch.amax(tiles_of(z), 2, out=peaks[:, tiles])
            torch.sum(tiles_of(z.exp_()), 2, out=sums[:, tiles])
        low, high = sums.sum(1).aminmax()
        if low > _SAFE_SUMS[0] and high < _SAFE_SUMS[1]:
            return sums.log_(), peaks
    for z, tiles in blocks():
        peak = tiles_of(z).amax(2)
        if peaks is not None:
            peaks[:, tiles] = peak
        # A column of -inf (a masked vocabulary entry) must not make -inf - -inf.
        offset = peak.amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
        sums[:, tiles] = tiles_of(z.sub_(offset).exp_()).sum(2).log_().add_(offset)
    return sums, peaks


def lce_backward(
    g_nll: Tensor | None,
    g_lse: Tensor | None,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    nll: Tensor,
    lse: Tensor,
    tile_map: Tensor,
    seed: Tensor | None,
    *,
    options: KernelOptions,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of e, c and bias in their dtypes, each only where needed, from dz = a p - b onehot (docs/design.md)."""
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

    def add(self, v0: int, v1: int, visits: Iterable[Visits], threshold: float | None = None) -> None:
        """Add what columns [v0, v1) owe, over all the visits they will ever get: d_c is rounded once, here."""
        cols, bias = self.classifier.columns(v0, v1)
        d_cols = None
        if self.d_c is not None:
            same = self.d_c.dtype == cols.dtype
            d_cols = self.d_c[v0:v1] if same else torch.zeros_like(cols)
        for visit in visits:
            e = _take(self.e, visit.rows).to(cols.dtype)
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
    rows = _live_rows(live)
    if rows is None and live.device.type != "cpu":
        # Masked, since 0 times a row that is not finite would reach every row of dC.
        g = replace(g, e=g.e.masked_fill(~live[:, None], 0.0), lse=g.lse.masked_fill(~live, float("inf")))
    count, v = len(live) if rows is None else len(rows), len(g.classifier.c)
    step, width = _block_shape(g.e, count, v)
    chunks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    picked = chunks if rows is None else [rows[chunk] for chunk in chunks]
    for v0 in range(0, v, width):
        v1 = min(v0 + width, v)
        g.add(v0, v1, (g.visits(r, g.a[r], v0, v1 - v0) for r in picked))


def _sampled(g: Gradients, live: Tensor, tile_map: Tensor, nll: Tensor, seed: Tensor, eps: float) -> None:
    """Visit tile t for token i with probability q = min(1, peak * (1/eps - 1)), peak its largest p; weigh its p by 1/q.

    The label's own tile is always visited (q = 1), so that the label's part is exact and adds no variance, and
    p - 1 is formed before any rounding. A token has at most 1/eps visits in expectation.
    """
    n, v, device = len(live), len(g.classifier.c), live.device
    label_tile = torch.div(g.targets.long(), TILE_COLUMNS, rounding_mode="floor")
    group = max(1, _block_logits(g.e) // 8 // max(1, n) // CHAIN_TILES) * CHAIN_TILES
    for t0 in range(0, num_tiles(v), group):
        t1 = min(t0 + group, num_tiles(v))
        tiles = torch.arange(t0, t1, device=device)
        q = visit_probabilities(tile_map[t0:t1] - nll, log_visit_rate(eps))
        q.masked_fill_(label_tile == tiles[:, None], 1.0)
        _visit_tiles(g, t0, draw_visits(seed, t0, q, live), q)


def _threshold(g: Gradients, live: Tensor, tile_map: Tensor, nll: Tensor, eps: float) -> None:
    """The paper's filter (section 4.3): drop a block of FILTER_ROWS tokens by one tile if all |p - onehot| < eps."""
    n, v, device = len(live), len(g.classifier.c), live.device
    label_tile = torch.div(g.targets.long(), TILE_COLUMNS, rounding_mode="floor")
    log_eps = math.log(eps)
    group = max(1, _block_logits(g.e) // 8 // max(1, n))
    for t0 in range(0, num_tiles(v), group):
        t1 = min(t0 + group, num_tiles(v))
        tiles = torch.arange(t0, t1, device=device)
        # No entry exceeds its tile's mass, which the rounded map may understate by 2^-7 of itself; what is not
        # finite is looked at.
        coarse = tile_map[t0:t1].float()
        may_pass = ~(coarse + coarse.abs() * 2.0**-6 - nll < log_eps) | (label_tile == tiles[:, None])
        padded = torch.nn.functional.pad(may_pass & live, (0, -n % FILTER_ROWS))
        block_may_pass = padded.unflatten(1, (-1, FILTER_ROWS)).any(2)
        chosen = block_may_pass.repeat_interleave(FILTER_ROWS, 1)[:, :n] & live
        _visit_tiles(g, t0, chosen, None, threshold=eps)


def _passes_filter(p: Tensor, visit: Visits, eps: float) -> Tensor:
    """Which rows belong to a block with some |p - onehot| >= eps. NaN passes."""
    assert isinstance(visit.rows, Tensor)  # whole blocks of the filter come as indices
    distance = p.scatter_add(1, visit.label, -visit.has_label.to(p.dtype)).abs_().amax(1)
    block = torch.div(visit.rows, FILTER_ROWS, rounding_mode="floor")
    blocks = int(block[-1]) + 1 if len(block) else 0
    worst = distance.new_zeros(blocks).scatter_reduce_(0, block, distance, "amax")
    return ~(worst[block] < eps)


def _visit_tiles(g: Gradients, t0: int, chosen: Tensor, q: Tensor | None, threshold: float | None = None) -> None:
    """Visit tiles t0, t0 + 1, ... as chosen [tiles, N] says, with p weighed by 1/q. Waits for the device."""
    tile, rows = chosen.nonzero().unbind(1)
    rows = rows.contiguous()
    weight = g.a[rows] if q is None else g.a[rows] / q[chosen]
    visits = g.visits(rows, weight, (tile + t0) * TILE_COLUMNS, TILE_COLUMNS)
    by_token = [x for x in visits if isinstance(x, Tensor)]
    counts = chosen.sum(1).tolist()
    # A tile that most tokens visit is taken in pieces. They are cut by token and not by count, so that a block of
    # the filter stays whole.
    n, v = len(g.e), len(g.classifier.c)
    step = max(FILTER_ROWS, _block_logits(g.e) // TILE_COLUMNS)
    edges = torch.tensor(range(step, n, step), dtype=rows.dtype, device=rows.device)
    for k, parts in enumerate(zip(*(x.split(counts) for x in by_token), strict=True)):
        if counts[k] == 0:
            continue
        pieces = [Visits(*parts)]
        if counts[k] > step:
            cuts = torch.searchsorted(parts[0], edges).tolist()
            pieces = [Visits(*piece) for piece in zip(*(x.tensor_split(cuts) for x in parts), strict=True)]
        v0 = (t0 + k) * TILE_COLUMNS
        g.add(v0, min(v0 + TILE_COLUMNS, v), pieces, threshold)


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _live_rows(live: Tensor) -> Tensor | None:
    """Indices of the live tokens, or None for all. Off the CPU always all: counting would wait for the device."""
    if live.device.type != "cpu" or bool(live.all()):
        return None
    return live.nonzero()[:, 0]


def _block_logits(x: Tensor) -> int:
    return BLOCK_LOGITS.get(x.device.type, BLOCK_LOGITS_DEFAULT)


def _round_down(x: Tensor) -> Tensor:
    """To bf16, never upwards: rounding to nearest errs by 2^-9 of the value at most."""
    return (x - x.abs() * 2.0**-8).to(torch.bfloat16)
