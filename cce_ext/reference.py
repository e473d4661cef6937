"""The loss as a dense product, which holds [N, V]: in fp64 the oracle of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import is_ignored
from .options import ENTROPY, LOG_SUM_SQ_PROBS, MAXIMUM, MEAN_LOGITS, STATS_ROWS
from .tile_sums import LOWEST_LOG


def forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token nll and lse, differentiable by autograd.

    e: [N, D], c: [V, D], bias: [V], targets: [N] int. Returns nll and lse, each [N], fp32 (fp64 for fp64 inputs):
    0 where the target is ignore_index; nll is NaN where it is neither that nor in [0, V).
    """
    nll, lse, *_ = with_statistics(e, c, bias, targets, ignore_index, softcap, None, 0)
    return nll, lse


def with_statistics(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    scale: Tensor | None,
    stats: int,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """nll and lse of logits that scale [N] multiplies; stats and argmax as lce_forward has them (csrc/ops/schema.cpp).

    Of stats the entropy alone is differentiable. Last come the logits of pairs [N, K], 0 where such a label is not in
    [0, V).
    """
    logits = torch.nn.functional.linear(e, c, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if scale is not None:
        logits = scale[:, None] * logits
    lse = logits.logsumexp(1)
    ignored = is_ignored(targets, ignore_index)
    inside = (targets >= 0) & (targets < c.shape[0])
    label = logits.gather(1, torch.where(inside, targets, 0).long()[:, None]).squeeze(1)
    label = label.masked_fill(~inside, float("nan"))
    rows, argmax = logits.new_empty(0, 0), targets.new_empty(0, dtype=torch.int64)
    if stats:
        found, at = _statistics(logits, stats)
        nothing = torch.zeros_like(lse)
        rows = torch.stack([found.get(1 << i, nothing) for i in range(STATS_ROWS)]).masked_fill(ignored, 0.0)
        argmax = argmax if at is None else at.masked_fill(ignored, 0)
    z = None
    if pairs is not None:
        inside = (pairs >= 0) & (pairs < c.shape[0])
        z = logits.gather(1, torch.where(inside, pairs, 0).long()).masked_fill(~inside, 0.0)
    return (lse - label).masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0), rows, argmax, z


def _statistics(logits: Tensor, stats: int) -> tuple[dict[int, Tensor], Tensor | None]:
    """Those of logits [N, V] that stats names, by their bits, and the first maximum's column."""
    found: dict[int, Tensor] = {}
    fixed = logits.detach()
    largest, argmax = fixed.max(1)
    # A column of -inf has no part in any sum, and its gradient is 0.
    below = logits - largest.clamp(min=torch.finfo(logits.dtype).min)[:, None]
    x, below = below.exp(), below.clamp(min=LOWEST_LOG)
    mass = x.sum(1)
    if stats & ENTROPY:
        found[ENTROPY] = mass.log() - (x * below).sum(1) / mass
    if stats & LOG_SUM_SQ_PROBS:
        found[LOG_SUM_SQ_PROBS] = x.detach().square().sum(1).log() - 2 * mass.detach().log()
    if stats & MEAN_LOGITS:
        found[MEAN_LOGITS] = fixed.mean(1)
    if stats & MAXIMUM:
        found[MAXIMUM] = largest
    return found, argmax if stats & MAXIMUM else None
