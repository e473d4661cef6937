"""Label smoothing and class weights: what they make of the tokens' losses and log-sum-exps.

With label_smoothing s, weights w and W their sum, all over V classes, a token's loss is

    (1 - s) w_y nll + s / V · Σ_v w_v (lse - z_v),   Σ_v w_v z_v = e · Σ_v w_v c_v + Σ_v w_v bias_v.

So the logits are wanted of one more row, the weighted sum of c's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .classifier import accumulate_dtype
from .ops import without_autocast
from .vocab_parallel import VocabShard, sum_over_ranks

# Entries of e, c or a gradient that are held in the dtype of sums at a time.
_BLOCK_ENTRIES = {"cpu": 1 << 20}
_BLOCK_ENTRIES_DEFAULT = 1 << 23


def with_weighted_logits(
    e: Tensor, c: Tensor, bias: Tensor | None, weight: Tensor | None, counts: Tensor, dense: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """e [N, D] and c [V, D], which are what the loss is to be computed of, and each token's Σ_v w_v z_v [N].

    The gradients of both then need no other tensor of their size. weight: [V], None is 1 each. counts: [N]; rows of e
    that do not count reach no gradient. dense: by operations of PyTorch alone, which can be differentiated twice.
    """
    acc = accumulate_dtype(e)
    weight = torch.ones(len(c), dtype=acc, device=c.device) if weight is None else weight.to(acc)
    if dense or _is_watched():
        rows = torch.where(counts[:, None], e.to(acc), 0.0)
        logits = (rows * (c.to(acc) * weight[:, None]).sum(0)).sum(1)
    else:
        *views, logits = _with_weighted_logits(e, c, weight, counts)
        # A view requires a gradient where either does: one that is frozen stays what it is.
        e, c = (view if x.requires_grad else x for x, view in zip((e, c), views, strict=True))
    if bias is not None:
        logits = logits + (bias.to(acc) * weight).sum()
    return e, c, logits


def smoothed(
    nll: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    counts: Tensor,
    weight: Tensor | None,
    s: float,
    v: int,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    """The loss [N] of each token that counts, and what it counts for in a mean: True, or its label's weight.

    nll, lse, labels, counts: [N]. logits: of with_weighted_logits, None where s is 0. weight: [V] or None. With a shard
    of the vocabulary, logits and weight are those of its v rows, and counts those of the whole; one collective.
    """
    parts = []
    if weight is not None:
        parts.append(_weights_of_labels(weight.to(lse.dtype), labels, counts, shard))
    if logits is not None:
        total = logits.new_full((1,), v) if weight is None else weight.to(lse.dtype).sum()[None]
        parts += [logits, total, logits.new_full((1,), v)]
    if shard is not None:
        parts = list(sum_over_ranks(shard, torch.cat(parts)).split([len(x) for x in parts]))
    loss, share = nll, counts
    if weight is not None:
        share = parts.pop(0)
        loss = loss * share
    if logits is not None:
        logits, total, classes = parts
        # What does not count has a lse of 0 and whatever logits.
        rest = ((total * lse - logits) / classes).masked_fill(~counts, 0.0)
        loss = (1 - s) * loss + s * rest
    return loss, share


def shared_numbers(n: int, weight: Tensor | None, s: float) -> int:
    """How many numbers the collective of smoothed has, of n tokens."""
    return (0 if weight is None else n) + (n + 2 if s else 0)


def _weights_of_labels(weight: Tensor, labels: Tensor, counts: Tensor, shard: VocabShard | None) -> Tensor:
    """w_y of each token [N]; 0 where it does not count, or where the label is in another shard.

    A label out of range, whose loss is NaN, has that of one in range: CUDA could not raise an error.
    """
    if len(weight) == 0:
        return weight.new_zeros(len(labels))
    if shard is not None:
        counts = counts & (labels >= shard.start) & (labels < shard.stop)
        labels = labels - shard.start
    return weight[labels.clamp(0, len(weight) - 1)].masked_fill(~counts, 0.0)


def _is_watched() -> bool:
    """Where operations of PyTorch are to be seen: a graph is made of them, or a transform knows no other derivative.

    A compiler needs no loop over blocks: it makes one kernel of the sum.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


class _WithWeightedLogits(torch.autograd.Function):
    """e and c as they are, and each token's Σ_v w_v (e · c_v), whose gradient must be 0 where a token does not count.

    It is an outer product on either side, added to what comes back of e and of c: in place, since nobody else has that.
    """

    @staticmethod
    def forward(ctx: Any, e: Tensor, c: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(e.device):
            row = _sum_of_rows(c, weight)
            logits = weight.new_empty(len(e))
            for rows in _blocks(e, _BLOCK_ENTRIES_DEFAULT):
                logits[rows] = e[rows].to(row.dtype) @ row
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(e, c, weight, counts, row)
        return e.view_as(e), c.view_as(c), logits

    @staticmethod
    def backward(
        ctx: Any, d_e: Tensor | None, d_c: Tensor | None, g: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        e, c, weight, counts, row = ctx.saved_tensors
        if g is None:
            return d_e, d_c, None, None
        need_e, need_c, *_ = ctx.needs_input_grad
        with without_autocast(e.device):
            if need_e:
                d_e = _add_outer(torch.zeros_like(e) if d_e is None else d_e, g, row)
            if need_c:
                d_c = _add_outer(torch.zeros_like(c) if d_c is None else d_c, weight, _sum_of_rows(e, g, counts))
        return d_e, d_c, None, None


_with_weighted_logits: Callable[..., tuple[Tensor, Tensor, Tensor]] = _WithWeightedLogits.apply


def _blocks(x: Tensor, default: int) -> Iterator[slice]:
    """Rows of x in blocks of a bounded number of entries, default of them but on a CPU."""
    step = max(1, _BLOCK_ENTRIES.get(x.device.type, default) // max(1, x.shape[1]))
    for i in range(0, len(x), step):
        yield slice(i, i + step)


def _sum_of_rows(x: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """Σ_r weight_r x_r [D], in weight's dtype, over the rows that count (all)."""
    total = weight.new_zeros(x.shape[1])
    for rows in _blocks(x, _BLOCK_ENTRIES_DEFAULT):
        block = x[rows].to(weight.dtype)
        if counts is not None:
            block = block.masked_fill(~counts[rows, None], 0.0)
        total += weight[rows] @ block
    return total


def _add_outer(x: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """x [R, D] += column ⊗ row, in their dtype, and rounded to x's. A GPU's kernel casts without a copy of x."""
    for rows in _blocks(x, x.numel()):
        x[rows].addcmul_(column[rows, None], row)
    return x
