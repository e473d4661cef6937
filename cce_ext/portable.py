"""The three methods in plain torch, for any device and float dtype, which never hold the [N, V] logits.

Forward walks blocks of tokens by vocabulary; backward visits (tokens, columns) pairs chosen by the method.
Same contract as the CUDA kernels; their oracle, together with reference.py.
"""

from __future__ import annotations

import math
import operator
from dataclasses import replace

import torch
from torch import Tensor

from .classifier import (
    INVARIANT_ROWS,
    Classifier,
    accumulate_dtype,
    block_logits,
    block_shape,
    live_rows,
    padded,
    take,
)
from .control_variate import ControlVariate, remainders
from .labels import is_ignored
from .options import MAXIMUM, STATS_ROWS, KernelOptions
from .sampling import (
    CHAIN_TILES,
    LOG2_E,
    MASS_STEPS,
    TILE_COLUMNS,
    OfEntropy,
    draw_visits,
    encode_tiles,
    even_share,
    log2_visit_rate,
    num_tiles,
    steepness_of,
    tile_shares,
    visit_probabilities,
)
from .tile_sums import reduce_tiles
from .visits import FILTER_COLUMNS, FILTER_ROWS, Gradients


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
    """From the label logits [N]: nll [N], lse [N], the tile map, [tiles, N] int16 or [0, 0], stats and argmax.

    The map holds sum and L2 norm of each tile's exp(z - label logit), as sampling.encode_tiles writes them: those of
    its p are these over exp(nll), for any offset of the logits. stats and argmax: csrc/ops/schema.cpp.
    batch_invariant: blocks have a number of tokens that follows from V alone, and no token is done again.
    """
    n, v = len(e), len(c)
    acc = accumulate_dtype(e)
    classifier = Classifier(c, bias, options.softcap, acc)
    lse = torch.zeros(n, dtype=acc, device=e.device)
    tile_map = torch.zeros((num_tiles(v), n) if need_map else (0, 0), dtype=torch.int16, device=e.device)
    statistics = torch.zeros((STATS_ROWS, n) if stats else (0, 0), dtype=acc, device=e.device)
    argmax = torch.zeros(n if stats & MAXIMUM else 0, dtype=torch.int64, device=e.device)

    ignored = is_ignored(targets, options.ignore_index)
    live = live_rows(~ignored)
    count = n if live is None else len(live)
    reference = label.nan_to_num(nan=0.0)
    step, width = block_shape(e, INVARIANT_ROWS if batch_invariant else count, v)
    buffer = torch.empty(step, width, dtype=acc, device=e.device)
    for i in range(0, count, step):
        rows = slice(i, min(i + step, count)) if live is None else live[i : i + step]
        block = take(e, rows).to(acc)
        scale = None if options.scale is None else take(options.scale, rows)[:, None]
        size = len(block)
        if batch_invariant:
            block = padded(block, step)
            scale = None if scale is None else torch.nn.functional.pad(scale, (0, 0, 0, step - size), value=1.0)
        sums = reduce_tiles(classifier, block, scale, buffer, need_map, stats, offset=batch_invariant)
        if size < len(block):
            sums = sums.head(size)
        lse[rows] = sums.lse
        if sums.stats is not None:
            statistics[:, rows] = sums.stats
        if sums.argmax is not None:
            argmax[rows] = sums.argmax
        if sums.log_norm is not None:
            logs = (x.sub_(reference[rows, None]).mul_(LOG2_E) for x in (sums.log_mass, sums.log_norm))
            tile_map[:, rows] = encode_tiles(*logs).T

    lse.masked_fill_(ignored, 0.0)
    if stats:
        statistics.masked_fill_(ignored, 0.0)
    if stats & MAXIMUM:
        argmax.masked_fill_(ignored, 0)
    return lse - label, lse, tile_map, statistics, argmax


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
    """Gradients of e, c and bias in their dtypes, each only where needed.

    From dz = (a - h (log p + H)) p - b onehot, h being the entropy's gradient: docs/design.md, docs/logprobs.md.
    """
    acc = accumulate_dtype(e)
    # Masked, not multiplied: what flows into an ignored token may be anything, NaN as well. Its p is 0.
    ignored = is_ignored(targets, options.ignore_index)
    lse = lse.masked_fill(ignored, float("inf"))
    b = torch.zeros_like(lse) if g_nll is None else g_nll.to(acc).masked_fill(ignored, 0.0)
    a = b if g_lse is None else b + g_lse.to(acc).masked_fill(ignored, 0.0)
    of_entropy = None
    if g_entropy is not None and entropy is not None:
        of_entropy = OfEntropy(g_entropy.to(acc).masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0))
    a = a.masked_fill((nll != nll) & ~ignored & ((targets < 0) | (targets >= len(c))), float("nan"))

    gradients = Gradients(
        Classifier(c, bias, options.softcap, acc),
        e,
        targets,
        lse,
        a,
        b,
        of_entropy,
        options.scale,
        d_e=torch.zeros_like(e, dtype=acc, memory_format=torch.contiguous_format) if need_e else None,
        d_c=torch.zeros_like(c, memory_format=torch.contiguous_format) if need_c else None,
        d_bias=torch.zeros_like(bias, dtype=acc) if need_bias and bias is not None else None,
    )
    live = (a != 0) | (b != 0)
    if of_entropy is not None:
        live |= of_entropy.gradient != 0
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
        g.add(v0, v1, (g.visits(r, None, v0, v1 - v0) for r in picked))


def _sampled(g: Gradients, live: Tensor, tile_map: Tensor, nll: Tensor, seed: Tensor, eps: float) -> None:
    """Visit tile t for token i with a probability q of its p's norm (sampling.visit_probabilities); weigh p by 1/q.

    The label's own tile is always visited (q = 1), so that the label's part is exact and adds no variance, and
    p - 1 is formed before any rounding. A token has at most 1/eps visits in expectation. What is not visited has the
    control variate.
    """
    n, v, device = len(live), len(g.classifier.c), live.device
    label_tile = torch.div(g.targets.long(), TILE_COLUMNS, rounding_mode="floor")
    group = max(1, block_logits(g.e) // 16 // max(1, n) // CHAIN_TILES) * CHAIN_TILES
    rates = log2_visit_rate(eps), even_share(eps, num_tiles(v))
    variate = ControlVariate(g.classifier, g.e, live, g.lse, g.scale)
    steepness = None if g.of_entropy is None else steepness_of(g.a, g.of_entropy)
    for t0 in range(0, num_tiles(v), group):
        t1 = min(t0 + group, num_tiles(v))
        share = tile_shares(tile_map[t0:t1], nll)
        q = visit_probabilities(share, *rates, steepness)
        q.masked_fill_(label_tile == torch.arange(t0, t1, device=device)[:, None], 1.0)
        visited = draw_visits(seed, t0, q, live)
        given = (g.a, live, g.lse, share, g.classifier.softcap, visited, q)
        remainder = remainders(*given, g.of_entropy, g.scale)
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
    """Visit tiles t0, t0 + 1, ... of width columns as chosen [tiles, N] says, with probability q [tiles, N] or 1.

    besides: for each tile, what Gradients.add takes by that name. Waits for the device.
    """
    tile, rows = chosen.nonzero().unbind(1)
    rows = rows.contiguous()
    visits = g.visits(rows, None if q is None else q[chosen], (tile + t0) * width, width)
    counts = chosen.sum(1).tolist()
    # A tile that most tokens visit is taken in pieces. They are cut by token and not by count, so that a block of
    # the filter stays whole.
    n, v = len(g.e), len(g.classifier.c)
    step = max(FILTER_ROWS, block_logits(g.e) // width)
    edges = torch.tensor(range(step, n, step), dtype=rows.dtype, device=rows.device)
    for k, part in enumerate(visits.cut(operator.methodcaller("split", counts), len(counts))):
        v0 = (t0 + k) * width
        v1 = min(v0 + width, v)
        pieces = [part] if counts[k] else []
        if counts[k] > step:
            assert isinstance(part.rows, Tensor)
            cuts = torch.searchsorted(part.rows, edges).tolist()
            pieces = part.cut(operator.methodcaller("tensor_split", cuts), len(cuts) + 1)
        if besides is not None:
            g.add(v0, v1, pieces, besides=(besides[0][k, : v1 - v0], besides[1][k]))
        elif pieces:
            g.add(v0, v1, pieces, threshold=threshold)
