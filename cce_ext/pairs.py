"""Products with pairs of a token and one of its labels in plain torch, and their operators' registration.

cce::pair_logits and cce::add_pair_gradients: what soft targets need beside nll and lse. A pair's row of c is gathered;
no more entries of gathered rows are held at a time than a block of logits has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .autograd import AUTOCAST_KEYS, with_pair_logits
from .classifier import accumulate_dtype, block_logits
from .labels import check_target_range, may_look_at
from .ops import HAS_CUDA, autocast_inputs, refuse_cuda, without_autocast
from .options import check_inputs, check_softcap

__all__ = ["with_pair_logits"]

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "IMPL")


def _check(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, softcap: float | None) -> None:
    """Raises TypeError and ValueError."""
    if e.dim() != 2:
        raise ValueError(f"e: expected [N, D], got {list(e.shape)}")
    if targets.dim() != 2 or targets.shape[0] != e.shape[0]:
        raise ValueError(f"targets: expected [{e.shape[0]}, K] for e of {list(e.shape)}, got {list(targets.shape)}")
    check_inputs(e, c, targets.new_empty(e.shape[:1]), bias)
    if targets.device != e.device:
        raise ValueError(f"targets: expected {e.device} like e, got {targets.device}")
    check_softcap(softcap)


def _pair_logits(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """z [N, K] of each token's labels, targets [N, K]: 0 where ignored, NaN where the target is not in [0, V)."""
    _check(e, c, bias, targets, softcap)
    if may_look_at(targets):
        check_target_range(targets.flatten(), len(c), ignore_index)
    inside = (targets >= 0) & (targets < len(c))
    z = torch.zeros(targets.shape, dtype=accumulate_dtype(e), device=e.device)
    if len(c):
        y = torch.where(inside, targets, 0).long()
        step = max(1, block_logits(e) // max(1, y.shape[1] * e.shape[1]))
        with without_autocast(e.device):
            for i in range(0, len(e), step):
                at = slice(i, i + step)
                rows = c[y[at].flatten()].to(z.dtype).view(*y[at].shape, c.shape[1])
                torch.matmul(rows, e[at].to(z.dtype)[:, :, None], out=z[at][:, :, None])
        if bias is not None:
            z += bias[y]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.masked_fill_(~inside, float("nan")).masked_fill_(targets == ignore_index, 0.0)


def _add_pair_gradients(
    coefficients: Tensor,
    labels: Tensor,
    order: Tensor | None,
    e: Tensor,
    c: Tensor,
    grad_e: Tensor | None,
    grad_c: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Adds Σ_k g_nk c_v to row n of grad_e, and Σ g_nk e_n to row v of grad_c, v being labels [N, K], or -1 for none.

    g: coefficients [N, K], fp32 (fp64 for fp64 e), of whatever where there is no label; their sums are bias's gradient.
    order: [N K] int64, the
    pairs by their label, and in a fixed order for each label; None where only grad_e is wanted. Sums are taken in g's
    dtype and rounded once.
    """
    acc = coefficients.dtype
    with without_autocast(e.device):
        if grad_e is not None:
            _add_to_tokens(coefficients, labels, c, grad_e)
        if grad_c is None and grad_bias is None:
            return
        if order is None:
            raise ValueError("order: expected the pairs sorted by label for grad_c and grad_bias, got None")
        order = order[labels.flatten()[order] >= 0]
        k = max(1, labels.shape[1])
        rows, run, counts = labels.flatten()[order].long().unique_consecutive(return_inverse=True, return_counts=True)
        g = coefficients.flatten()[order]
        if grad_bias is not None:
            sums = torch.zeros(len(rows), dtype=acc, device=e.device).index_add_(0, run, g)
            grad_bias[rows] = (grad_bias[rows].to(acc) + sums).to(grad_bias.dtype)
        if grad_c is None:
            return
        ends = [0, *counts.cumsum(0).tolist()]
        step = max(1, block_logits(e) // max(1, e.shape[1]))
        for i in range(0, len(rows), step):
            block = rows[i : i + step]
            sums = grad_c[block].to(acc)
            for at in range(ends[i], ends[i + len(block)], step):
                pairs = slice(at, min(at + step, ends[i + len(block)]))
                part = e[order[pairs] // k].to(acc) * g[pairs, None]
                sums.index_add_(0, run[pairs] - i, part)
            grad_c[block] = sums.to(grad_c.dtype)


def _add_to_tokens(coefficients: Tensor, labels: Tensor, c: Tensor, grad_e: Tensor) -> None:
    """A token without pairs keeps its row, bit for bit."""
    if len(c) == 0:
        return
    tokens = (labels >= 0).any(1).nonzero()[:, 0]
    step = max(1, block_logits(c) // max(1, labels.shape[1] * c.shape[1]))
    for at in tokens.split(step):
        y = labels[at].long()
        g = coefficients[at].masked_fill(y < 0, 0.0)
        rows = c[y.clamp(min=0).flatten()].to(g.dtype).view(*y.shape, c.shape[1])
        sums = grad_e[at].to(g.dtype) + torch.matmul(g[:, None], rows)[:, 0]
        grad_e[at] = sums.to(grad_e.dtype)


def _pair_logits_fake(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, *, softcap: float | None = None, **keywords: int
) -> Tensor:
    _check(e, c, bias, targets, softcap)
    return e.new_empty(targets.shape, dtype=accumulate_dtype(e))


def _pair_logits_autocast(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, **options: object) -> Tensor:
    e, c, bias = autocast_inputs(e, c, bias)
    with without_autocast(e.device):
        z: Tensor = ops.pair_logits(e, c, bias, targets, **options)
    return z


torch.library.register_fake(add_op_namespace_prefix("pair_logits"), _pair_logits_fake)
torch.library.register_fake(add_op_namespace_prefix("add_pair_gradients"), lambda *args: None)
for _key in AUTOCAST_KEYS:
    _library.impl("pair_logits", _pair_logits_autocast, _key)
_library.impl("pair_logits", _pair_logits, "CompositeExplicitAutograd")
_library.impl("add_pair_gradients", _add_pair_gradients, "CompositeExplicitAutograd")
if not HAS_CUDA and torch.version.hip is None:
    for _name in ("pair_logits", "add_pair_gradients"):
        _library.impl(_name, refuse_cuda, "CUDA")
