"""The loss as a dense product, which holds [N, V]: in fp64 the oracle of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Per-token nll and lse, differentiable by autograd.

    e: [N, D], c: [V, D], bias: [V], targets: [N] int. Returns nll and lse, each [N], fp32 (fp64 for fp64 inputs):
    0 where the target is ignore_index; nll is NaN where it is neither that nor in [0, V). With pairs [N, K] also the
    logits of these labels, [N, K], 0 where one is not in [0, V).
    """
    logits = torch.nn.functional.linear(e, c, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    ignored = targets == ignore_index
    inside = (targets >= 0) & (targets < c.shape[0])
    label = logits.gather(1, torch.where(inside, targets, 0).long()[:, None]).squeeze(1)
    label = label.masked_fill(~inside, float("nan"))
    nll, lse = (lse - label).masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0)
    if pairs is None:
        return nll, lse
    inside = (pairs >= 0) & (pairs < c.shape[0])
    return nll, lse, logits.gather(1, torch.where(inside, pairs, 0).long()).masked_fill(~inside, 0.0)
