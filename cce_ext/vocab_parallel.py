"""The loss over a classifier whose rows are cut over the ranks of a process group: docs/distributed.md.

Collectives are those of PyTorch that torch.compile can trace, by the operators' own names, which are the same in all
releases from 2.10 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ._ops import ops
from .autograd import OF_FORWARD, gradients
from .labels import may_look_at
from .options import ENTROPY, LOG_SUM_SQ_PROBS, MAXIMUM, MEAN_LOGITS, NAMES, STATS_ROWS, Names

# What a shard's kernels know an ignored token by: the caller's ignore_index, less start, could be one of its rows.
_IGNORED = -1

# A column's number is told as how many times this and how much more.
_COLUMNS = 4096


@dataclass(frozen=True)
class VocabParallelOptions:
    """The rows [start, stop) of the whole classifier that this rank's c (and bias) are.

    The ranks' rows must be disjoint and together the vocabulary, in any order and of any sizes but 0. e and targets are
    the same on all ranks of the group; targets are numbered over the whole vocabulary. Loss and lse come out the same
    on all ranks, to the last bit; c's and bias's gradients are those of this rank's rows.

    Attributes:
        start: this rank's first row.
        stop: the row after its last; 0 <= start < stop.
        group: the ranks that share the vocabulary; None is all of them.
        reduce_e_grad: sum e's gradient over the group. False leaves each rank's own part, for a caller who sums it.

    Raises:
        ValueError: rows that cannot be.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    reduce_e_grad: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(
                f"start, stop: expected 0 <= start < stop (a rank without rows cannot take part), got {self.start}, "
                f"{self.stop}"
            )

    @classmethod
    def from_vocab(
        cls, vocab_size: int, group: dist.ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> VocabParallelOptions:
        """This rank's rows where the vocabulary is cut as DTensor's Shard(0) does: torch.chunk(c, R)[r] on rank r of R.

        Raises:
            ValueError: on all ranks, where that leaves the last ranks none.
        """
        start, stop = even_rows(vocab_size, dist.get_rank(group), dist.get_world_size(group), "vocab_size")
        return cls(start, stop, group, reduce_e_grad)


def even_rows(v: int, rank: int, ranks: int, argument: str) -> tuple[int, int]:
    """The rows [start, stop) of v that a rank has: chunks of one size, the last one smaller. Raises ValueError."""
    rows = -(-v // ranks)
    if rows * (ranks - 1) >= v:
        raise ValueError(
            f"{argument}: {v} rows in chunks of {rows} leave the last of {ranks} ranks none; use fewer ranks"
        )
    return rank * rows, min((rank + 1) * rows, v)


class VocabShard(NamedTuple):
    """VocabParallelOptions as a call needs them: rows [start, stop) of the classifier, on rank of ranks.

    group: the process group's name, by which the collectives know it.
    """

    start: int
    stop: int
    group: str
    rank: int
    ranks: int
    reduce_e_grad: bool


def check_options(options: VocabParallelOptions | None) -> None:
    """Raises TypeError for what is not as a VocabParallelOptions, be it another copy's of the package. None is none."""
    if options is not None and not all(hasattr(options, x) for x in ("start", "stop", "group", "reduce_e_grad")):
        raise TypeError(f"vocab_parallel_options: expected VocabParallelOptions or None, got {options!r}")


def shard_of(options: VocabParallelOptions) -> VocabShard:
    """This rank's shard. Raises TypeError for other options, what torch.distributed does outside of the group."""
    check_options(options)
    group = dist.group.WORLD if options.group is None else options.group
    assert group is not None
    return VocabShard(
        options.start,
        options.stop,
        group.group_name,
        dist.get_rank(group),
        dist.get_world_size(group),
        options.reduce_e_grad,
    )


def check_rows(
    shard: VocabShard, c: Tensor, targets: Tensor, more: int = 0, stats: int = 0, names: Names = NAMES
) -> None:
    """Raises ValueError where c does not have as many rows as the shard.

    The other ranks wait in the collective of this call, which has these stats: they are told there, and do not wait for
    ever. more: how many numbers sum_over_ranks is to add up afterwards, where those who do not look at what they are
    told wait again.
    """
    if len(c) == shard.stop - shard.start:
        return
    if not torch.compiler.is_compiling():
        dtype = torch.promote_types(c.dtype, torch.float32)
        refusal = torch.zeros(2 + _stats_numbers(stats), targets.numel(), dtype=dtype, device=c.device)
        refusal[0], refusal[1] = -float("inf"), float("inf")
        all_gather(refusal, shard.ranks, shard.group)
        if more and not may_look_at(targets):
            all_gather(refusal.new_full((more,), -float("inf")), shard.ranks, shard.group)
    raise ValueError(
        f"{names.c}: expected {shard.stop - shard.start} rows, this rank's [{shard.start}, {shard.stop}) of "
        f"vocab_parallel_options, got {list(c.shape)}"
    )


def lce_forward(
    shard: VocabShard,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seed: Tensor | None,
    *,
    ignore_index: int | None,
    scale: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse [N], stats and argmax over the whole vocabulary: cce::lce_forward of the shard, and one collective."""
    labels, mine = _local_labels(shard, targets, ignore_index)
    options["ignore_index"] = _local_ignore_index(ignore_index)
    return _differentiable(e, c, bias, labels, mine, seed, targets, scale, shard, options)


def dense_forward(
    shard: VocabShard,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]],
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    scale: Tensor | None,
    stats: int,
    pairs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The same of reference.with_statistics, eager or compiled. What that gives of pairs stays this shard's."""
    labels, mine = _local_labels(shard, targets, ignore_index)
    ignored = _local_ignore_index(ignore_index)
    nll, lse, rows, argmax, z = forward(e, c, bias, labels, ignored, softcap, scale, stats, pairs)
    own = _with_rows(shard, lse, lse - nll, rows, argmax, stats, len(c))
    return *_combine(shard, own, stats, labels, mine, targets), z


def sum_over_ranks(shard: VocabShard, own: Tensor) -> Tensor:
    """Σ over the group of own [K]: the same on all ranks, to the last bit. Its gradient is that of this rank's part."""
    parts = all_gather(own.detach(), shard.ranks, shard.group).view(shard.ranks, len(own))
    if own.requires_grad:
        here = torch.arange(shard.ranks, device=own.device) == shard.rank
        parts = torch.where(here[:, None], own, parts)
    return parts.sum(0)


def mean_count(count: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The group's mean of a number that each rank has."""
    return all_reduce(count, group.group_name) / dist.get_world_size(group)


def _local_ignore_index(ignore_index: int | None) -> int | None:
    return None if ignore_index is None else _IGNORED


def _local_labels(shard: VocabShard, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Labels as rows of this shard, and whether they are its own (of ignored tokens that means nothing).

    A token whose label is elsewhere gets one of this shard's rows: what the tile map is relative to, and a tile that is
    surely visited. Neighbours get neighbouring rows: 256 tokens share a tile.
    """
    mine = (targets >= shard.start) & (targets < shard.stop)
    stand_in = torch.arange(len(targets), dtype=targets.dtype, device=targets.device) % (shard.stop - shard.start)
    labels = torch.where(mine, targets - shard.start, stand_in)
    return (labels if ignore_index is None else labels.masked_fill(targets == ignore_index, _IGNORED)), mine


def _stats_numbers(stats: int) -> int:
    """How many numbers of a token _with_rows adds to the two that every loss needs."""
    numbers = {ENTROPY: 1, LOG_SUM_SQ_PROBS: 1, MEAN_LOGITS: 2, MAXIMUM: 3}
    return sum(count for bit, count in numbers.items() if stats & bit)


def _with_rows(
    shard: VocabShard, lse: Tensor, label: Tensor, rows: Tensor, argmax: Tensor, stats: int, v: int
) -> Tensor:
    """What this rank tells the others of each token [.., N], from rows and argmax of its v columns."""
    own = [lse, label]
    own += [rows[i] for i, bit in enumerate((ENTROPY, LOG_SUM_SQ_PROBS)) if stats & bit]
    if stats & MEAN_LOGITS:
        own += [rows[2] * v, torch.full_like(lse, v)]
    if stats & MAXIMUM:
        # In two numbers that fp32 has.
        column = argmax + shard.start
        own += [rows[3], (column // _COLUMNS).to(lse.dtype), (column % _COLUMNS).to(lse.dtype)]
    return torch.stack(own)


def _combine(
    shard: VocabShard, own: Tensor, stats: int, labels: Tensor, mine: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse [N], stats and argmax over the whole vocabulary from each shard's _with_rows, whose labels are mine [N].

    All ranks' numbers are gathered, not summed: a sum of exponentials would need the maximum first. Every rank then
    adds up the same numbers in the same order.
    """
    # NaN says that the label is not here; a label's logit that is NaN itself makes the lse NaN anyway.
    inf, nan = float("inf"), float("nan")
    label = own[1].nan_to_num(nan=inf, posinf=inf, neginf=-inf).masked_fill(~mine, nan)
    own = torch.cat([own[:1], label[None], own[2:]])
    pairs = all_gather(own.detach(), shard.ranks, shard.group).view(shard.ranks, *own.shape)
    if own.requires_grad:
        here = torch.arange(shard.ranks, device=own.device) == shard.rank
        pairs = torch.where(here[:, None, None], own, pairs)
    lses, logits, *rest = pairs.unbind(1)
    # check_rows: no softmax has a label's logit of inf and a lse of -inf.
    refused = (lses == -inf) & (logits == inf)
    if not torch.compiler.is_compiling() and may_look_at(targets) and bool(refused.any()):
        ranks = refused.any(1).nonzero().flatten().tolist()
        raise ValueError(f"c: on ranks {ranks} of the group it has not the rows that their vocab_parallel_options say")

    ignored = labels == _IGNORED
    nowhere = logits.isnan().all(0) & ~ignored
    if not torch.compiler.is_compiling() and may_look_at(targets) and bool(nowhere.any()):
        position = int(nowhere.int().argmax())
        target = int(targets[position])
        raise IndexError(f"targets: {target} at flat position {position}: in no rank's rows, nor ignore_index")
    lse = lses.logsumexp(0).masked_fill(refused.any(0), nan)
    nll = (lse - logits.nansum(0)).masked_fill(nowhere, nan).masked_fill(ignored, 0.0)
    rows, argmax = lse.new_empty(0, 0), labels.new_empty(0, dtype=torch.int64)
    if stats:
        found, at = _combined_statistics(rest, lses, lse, stats)
        rows = torch.stack(found).masked_fill(refused.any(0), nan).masked_fill(ignored, 0.0)
        argmax = argmax if at is None else at.masked_fill(ignored, 0)
    return nll, lse.masked_fill(ignored, 0.0), rows, argmax


def _combined_statistics(
    rest: list[Tensor], lses: Tensor, lse: Tensor, stats: int
) -> tuple[list[Tensor], Tensor | None]:
    """stats and argmax from the ranks' numbers after their lses [R, N], each [R, N]; lse: [N] of the whole."""
    found, argmax = [torch.zeros_like(lse) for _ in range(STATS_ROWS)], None
    numbers = iter(rest)
    # Of a shard without a finite logit there is nothing.
    empty = lses == -float("inf")
    log_share = (lses - lse).masked_fill(empty, 0.0)
    if stats & ENTROPY:
        part = log_share.exp() * (next(numbers).masked_fill(empty, 0.0) - log_share)
        found[0] = part.masked_fill(empty, 0.0).sum(0)
    if stats & LOG_SUM_SQ_PROBS:
        found[1] = (next(numbers) + 2 * log_share).masked_fill(empty, -float("inf")).logsumexp(0).detach()
    if stats & MEAN_LOGITS:
        total, count = next(numbers), next(numbers)
        found[2] = (total.sum(0) / count.sum(0)).detach()
    if stats & MAXIMUM:
        logit, high, low = (x.detach() for x in numbers)
        largest = logit.amax(0)
        column = high.to(torch.int64) * _COLUMNS + low.to(torch.int64)
        # The first of those that have it; NaN is the largest.
        has_it = (logit == largest) | logit.isnan()
        found[3], argmax = largest, column.masked_fill(~has_it, torch.iinfo(torch.int64).max).amin(0)
    return found, argmax


class _LceForward(torch.autograd.Function):
    """cce::lce_forward and cce::lce_backward of one shard, with lse and entropy of the whole vocabulary in between."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mine: Tensor,
        seed: Tensor | None,
        targets: Tensor,
        scale: Tensor | None,
        shard: VocabShard,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stats = options.get("stats", 0)
        nll, lse, tile_map, rows, argmax = ops.lce_forward(*(e, c, bias, labels, seed), scale=scale, **options)
        reference = lse - nll
        own = _with_rows(shard, lse, reference, rows, argmax, stats, len(c))
        nll, lse, rows, argmax = _combine(shard, own, stats, labels, mine, targets)
        # The map is relative to this shard's label, or its stand-in. A target that is in no shard must show in the
        # gradient too.
        relative = lse - reference
        visible = lse.masked_fill(nll.isnan(), float("nan"))
        entropy = rows[0].clone() if stats & ENTROPY else None
        ctx.mark_non_differentiable(argmax, *(() if stats & ENTROPY else (rows,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(e, c, bias, labels, mine, relative, visible, tile_map, entropy, seed, scale)
        ctx.options = {name: value for name, value in options.items() if name not in OF_FORWARD}
        return nll, lse, rows, argmax

    @staticmethod
    def backward(
        ctx: Any, g_nll: Tensor | None, g_lse: Tensor | None, g_rows: Tensor | None, g_argmax: None
    ) -> tuple[Tensor | None, ...]:
        e, c, bias, labels, mine, relative, lse, tile_map, entropy, seed, scale = ctx.saved_tensors
        if g_nll is not None:
            # Elsewhere a token's loss is its lse alone, which has all of this shard's columns.
            elsewhere = g_nll.masked_fill(mine, 0.0)
            g_nll, g_lse = g_nll.masked_fill(~mine, 0.0), elsewhere if g_lse is None else g_lse + elsewhere
        # A compiler gives what has no gradient one.
        g_entropy = None if g_rows is None or entropy is None else g_rows[0]
        d_e, d_c, d_bias = gradients(
            (g_nll, g_lse, g_entropy),
            (e, c, bias, labels, relative, lse, tile_map, entropy, seed),
            scale,
            ctx.options,
            ctx.needs_input_grad[:3],
        )
        return d_e, d_c, d_bias, None, None, None, None, None, None, None


class _SumGradient(torch.autograd.Function):
    """x as it is; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


_differentiable: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _LceForward.apply
_sum_gradient: Callable[[Tensor, str], Tensor] = _SumGradient.apply


def shared(shard: VocabShard, e: Tensor) -> Tensor:
    """e as it is, for all that this rank makes of it: a gradient that is the rank's part is summed over the group."""
    return _sum_gradient(e, shard.group) if shard.reduce_e_grad else e


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """x of every rank, along the first dimension."""
    collectives = torch.ops._c10d_functional
    out: Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), ranks, group))
    return out


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the ranks."""
    collectives = torch.ops._c10d_functional
    out: Tensor = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))
    return out
