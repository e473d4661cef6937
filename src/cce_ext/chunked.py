"""The three methods in plain torch, for any device and float dtype: never holds the [N, V] logits.

Forward walks blocks of tokens by vocabulary; backward visits (tokens, columns) pairs chosen by the method.
Same contract as the CUDA kernels; their oracle, together with reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .sampling import (
    TILE_COLUMNS,
    log_visit_rate,
    row_keys,
    visit_hashes,
    visit_probabilities,
    visited,
)

# The paper's filter drops blocks of this many tokens by one vocab tile.
FILTER_ROWS = 128

# Logits held at a time: on a CPU what its last-level cache keeps, elsewhere what fills the device. Blocks are of so
# many tokens where there are as many, so that a block of c is read once for them.
_BLOCK_LOGITS = {"cpu": 1 << 20}
_BLOCK_LOGITS_DEFAULT = 1 << 25
_BLOCK_ROWS = 2048

# Sums of exponentials that say that no offset was needed: no logit near overflow, no row near underflow.
_SAFE_SUMS = (1e-30, 1e30)


def accumulate_dtype(e: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of products, of losses and of sums."""
    return torch.promote_types(e.dtype, torch.float32)


def num_tiles(v: int) -> int:
    return -(-v // TILE_COLUMNS)


def _block_shape(x: Tensor, n: int, v: int) -> tuple[int, int]:
    """Tokens and columns (whole tiles) of a block of logits on x's device."""
    logits = _block_logits(x)
    rows = max(1, min(n, _BLOCK_ROWS))
    columns = max(1, min(num_tiles(v), logits // rows // TILE_COLUMNS)) * TILE_COLUMNS
    return max(1, min(n, logits // columns)), columns


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
    ignore_index: int,
    softcap: float | None,
    need_map: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the label logits [N]: nll [N], lse [N] and the tile map, [tiles, N] bf16 or [0, 0] where it is not needed.

    The map holds each tile's log-sum-exp relative to the token's label logit, rounded down: a tile's mass is
    exp(map - nll), exact enough for any offset of the logits, and never above the true one.
    """
    n, v = len(e), len(c)
    acc = accumulate_dtype(e)
    classifier = Classifier(c, bias, softcap, acc)
    lse = torch.full((n,), -float("inf"), dtype=acc, device=e.device)
    tile_map = torch.zeros((num_tiles(v), n) if need_map else (0, 0), dtype=torch.bfloat16, device=e.device)

    ignored = targets == ignore_index
    live = _live_rows(~ignored)
    count = n if live is None else len(live)
    step, width = _block_shape(e, count, v)
    buffer = torch.empty(step, width, dtype=acc, device=e.device)
    for v0 in range(0, v, width):
        cols, cols_bias = classifier.columns(v0, min(v0 + width, v))
        tiles = slice(v0 // TILE_COLUMNS, num_tiles(v0 + len(cols)))
        for i in range(0, count, step):
            rows = slice(i, min(i + step, count)) if live is None else live[i : i + step]
            mass, offset = _tile_masses(classifier, e[rows].to(acc), cols, cols_bias, buffer)
            lse[rows] = torch.logaddexp(lse[rows], mass.sum(1).log_().add_(offset))
            if need_map:
                reference = label[rows].nan_to_num(nan=0.0)
                tile_map[tiles, rows] = _round_down(mass.log_().add_((offset - reference)[:, None])).T

    lse.masked_fill_(ignored, 0.0)
    return lse - label, lse, tile_map


def _tile_masses(
    classifier: Classifier, e: Tensor, cols: Tensor, bias: Tensor | None, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of exp(z - offset) over each tile of cols, [R, tiles], and the offsets [R]. Works in buffer."""
    width = len(cols)
    z = buffer[: len(e), : num_tiles(width) * TILE_COLUMNS]

    def logits() -> Tensor:
        z[:, width:] = -float("inf")
        classifier.logits(e, cols, bias, out=z[:, :width])
        return z

    # Most logits need no offset, which is two passes less over the block; where some do, this is for nothing. Only
    # on a CPU is the question free.
    if z.device.type == "cpu" and len(e):
        mass = logits().exp_().unflatten(1, (-1, TILE_COLUMNS)).sum(2)
        low, high = mass.sum(1).aminmax()
        if low > _SAFE_SUMS[0] and high < _SAFE_SUMS[1]:
            return mass, mass.new_zeros(len(e))
    # A column of -inf (a masked vocabulary entry) must not make -inf - -inf.
    peak = logits().amax(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    return z.sub_(peak).exp_().unflatten(1, (-1, TILE_COLUMNS)).sum(2), peak[:, 0]


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
    ignore_index: int,
    softcap: float | None,
    method: str,
    eps: float,
    filter_e: bool,
    filter_c: bool,
    need_e: bool,
    need_c: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of e, c and bias in their dtypes, each only where needed, from dz = a p - b onehot (docs/design.md)."""
    acc = accumulate_dtype(e)
    # Masked, not multiplied: what flows into an ignored token may be anything, NaN as well. Its p is 0.
    ignored = targets == ignore_index
    lse = lse.masked_fill(ignored, float("inf"))
    b = torch.zeros_like(lse) if g_nll is None else g_nll.to(acc).masked_fill(ignored, 0.0)
    a = b if g_lse is None else b + g_lse.to(acc).masked_fill(ignored, 0.0)
    a = a.masked_fill((nll != nll) & ~ignored & ((targets < 0) | (targets >= len(c))), float("nan"))

    gradients = Gradients(
        Classifier(c, bias, softcap, acc),
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
    # A side that asks for its whole gradient takes it from a pass over every pair.
    whole = gradients.only(e=not filter_e, c=not filter_c)
    part = gradients.only(e=filter_e, c=filter_c)
    if method == "exact":
        whole, part = gradients, gradients.only(e=False, c=False)
    if whole.needed:
        _exact(whole, live)
    if part.needed:
        if method == "threshold":
            _threshold(part, live, tile_map, nll, eps)
        else:
            assert seed is not None
            _sampled(part, live, tile_map, nll, seed, eps)
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

    def visit(self, v0: int, v1: int, visits: Iterable[Visit], threshold: float | None = None) -> None:
        """Add what columns [v0, v1) owe, over all the visits they will ever get: d_c is rounded once, here."""
        cols, bias = self.classifier.columns(v0, v1)
        d_cols = None
        if self.d_c is not None:
            same = self.d_c.dtype == cols.dtype
            d_cols = self.d_c[v0:v1] if same else torch.zeros_like(cols)
        for rows, weight in visits:
            e = self.e[rows].to(cols.dtype)
            p, slope = self._probabilities(e, cols, bias, rows)
            label = self.targets[rows].long() - v0
            inside = (label >= 0) & (label < v1 - v0)
            label = label.clamp_(0, v1 - v0 - 1)[:, None]
            if threshold is not None:
                assert isinstance(rows, Tensor)
                keep = _passes_filter(p, label, inside, rows, threshold)
                rows, weight, e, p, label, inside = (x[keep] for x in (rows, weight, e, p, label, inside))
                slope = None if slope is None else slope[keep]
            dz = p.mul_(weight[:, None]).scatter_add_(1, label, torch.where(inside, -self.b[rows], 0.0)[:, None])
            if slope is not None:
                dz *= slope
            if self.d_e is not None:
                if isinstance(rows, slice):
                    self.d_e[rows].addmm_(dz, cols)
                else:
                    self.d_e.index_add_(0, rows, dz @ cols)
            if d_cols is not None:
                d_cols.addmm_(dz.T, e)
            if self.d_bias is not None:
                self.d_bias[v0:v1] += dz.sum(0)
        if self.d_c is not None and d_cols is not None and not same:
            self.d_c[v0:v1] = d_cols

    def _probabilities(
        self, e: Tensor, cols: Tensor, bias: Tensor | None, rows: slice | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """p of rows e [R, D] and columns cols [W, D], and with a softcap its slope 1 - (z/s)^2, each [R, W]."""
        softcap = self.classifier.softcap
        z = self.classifier.logits(e, cols, bias, out=e.new_empty(len(e), len(cols)))
        slope = None if softcap is None else 1.0 - (z / softcap).square_()
        return z.sub_(self.lse[rows][:, None]).exp_(), slope


# Token rows (a slice, or indices) and each one's weight on p.
Visit = tuple[slice | Tensor, Tensor]


def _exact(g: Gradients, live: Tensor) -> None:
    """Every live token against every column."""
    rows = _live_rows(live)
    count, v = len(live) if rows is None else len(rows), len(g.classifier.c)
    step, width = _block_shape(g.e, count, v)
    chunks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    visits = [(r, g.a[r]) for r in (chunks if rows is None else [rows[chunk] for chunk in chunks])]
    for v0 in range(0, v, width):
        g.visit(v0, min(v0 + width, v), visits)


def _sampled(g: Gradients, live: Tensor, tile_map: Tensor, nll: Tensor, seed: Tensor, eps: float) -> None:
    """Visit tile t for token i with probability q = min(1, mass * (1/eps - 1)) and weigh its p by 1/q.

    The label's own tile is always visited (q = 1), so that the label's part is exact and adds no variance, and
    p - 1 is formed before any rounding. A token has at most 1/eps visits in expectation.
    """
    n, v, device = len(live), len(g.classifier.c), live.device
    keys = row_keys(seed, torch.arange(n, device=device))
    label_tile = torch.div(g.targets.long(), TILE_COLUMNS, rounding_mode="floor")
    group = max(1, _block_logits(g.e) // 8 // max(1, n))
    for t0 in range(0, num_tiles(v), group):
        t1 = min(t0 + group, num_tiles(v))
        tiles = torch.arange(t0, t1, device=device)
        q = visit_probabilities(tile_map[t0:t1] - nll, log_visit_rate(eps))
        q.masked_fill_(label_tile == tiles[:, None], 1.0)
        chosen = visited(visit_hashes(keys, tiles), q) & live
        rows = chosen.nonzero()[:, 1]
        weight = g.a[rows] / q[chosen]
        _visit_tiles(g, t0, rows, weight, chosen.sum(1).tolist())


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
        rows = chosen.nonzero()[:, 1]
        _visit_tiles(g, t0, rows, g.a[rows], chosen.sum(1).tolist(), threshold=eps)


def _passes_filter(p: Tensor, label: Tensor, inside: Tensor, rows: Tensor, eps: float) -> Tensor:
    """Which rows belong to a block with some |p - onehot| >= eps. NaN passes."""
    distance = p.scatter_add(1, label, torch.where(inside, -1.0, 0.0).to(p.dtype)[:, None]).abs_().amax(1)
    block = torch.div(rows, FILTER_ROWS, rounding_mode="floor")
    worst = distance.new_zeros(int(block[-1]) + 1 if len(block) else 0).scatter_reduce_(0, block, distance, "amax")
    return ~(worst[block] < eps)


def _visit_tiles(
    g: Gradients, t0: int, rows: Tensor, weight: Tensor, counts: list[int], threshold: float | None = None
) -> None:
    """Visit tiles t0, t0 + 1, ... with counts[k] rows each, sorted by token, in pieces of bounded size."""
    n, v = len(g.e), len(g.classifier.c)
    step = max(FILTER_ROWS, _block_logits(g.e) // TILE_COLUMNS)
    begin = 0
    for tile, count in enumerate(counts, start=t0):
        if count == 0:
            continue
        r, w = rows[begin : begin + count], weight[begin : begin + count]
        begin += count
        # Split by token, not by count: a block of the filter stays in one piece.
        edges = torch.tensor(range(step, n, step), dtype=r.dtype, device=r.device)
        cuts = torch.searchsorted(r, edges).tolist()
        visits = [x for x in zip(r.tensor_split(cuts), w.tensor_split(cuts), strict=True) if len(x[0])]
        v0 = tile * TILE_COLUMNS
        g.visit(v0, min(v0 + TILE_COLUMNS, v), visits, threshold)


def _live_rows(live: Tensor) -> Tensor | None:
    """Indices of the live tokens, or None for all. Off the CPU always all: counting would wait for the device."""
    if live.device.type != "cpu" or bool(live.all()):
        return None
    return live.nonzero()[:, 0]


def _block_logits(x: Tensor) -> int:
    return _BLOCK_LOGITS.get(x.device.type, _BLOCK_LOGITS_DEFAULT)


def _round_down(x: Tensor) -> Tensor:
    """To bf16, never upwards: rounding to nearest errs by 2^-9 of the value at most."""
    return (x - x.abs() * 2.0**-8).to(torch.bfloat16)
