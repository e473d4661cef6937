"""The tasks in plain PyTorch, which holds [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problems.inputs import IGNORE_INDEX
from .method import LogProbs, Loss, SoftLoss, Unsupported, without_softcap


def baseline(softcap: float | None) -> Loss:
    def loss(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        z = (e @ c.T).float()
        return F.cross_entropy(z if softcap is None else softcap * torch.tanh(z / softcap), t)

    return loss


def compiled_baseline(softcap: float | None) -> Loss:
    return torch.compile(baseline(softcap))


def torch_chunked(softcap: float | None) -> Loss:
    without_softcap(softcap)
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda e, c, t: F.linear_cross_entropy(e, c, t, options=options)


def logits_of(e: Tensor, c: Tensor, softcap: float | None) -> Tensor:
    """[N, V] in fp32, fp64 for fp64 inputs; the product is rounded to the inputs' dtype before."""
    z = e @ c.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def logprobs_of(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets and entropies [N] of logits [N, V]. Those of an ignored token mean nothing."""
    log_p = z.log_softmax(1)
    return log_p.gather(1, t.clamp(min=0)[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def soft_nll_of(z: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """Losses [N] of logits [N, V] for soft targets [N, K] and their weights, 0 for an ignored one."""
    log_p = z.log_softmax(1).gather(1, t.clamp(min=0))
    return -(log_p * w.masked_fill(t == IGNORE_INDEX, 0.0)).sum(1)


def logprobs(softcap: float | None) -> LogProbs:
    return lambda e, c, t: logprobs_of(logits_of(e, c, softcap), t)


def compiled_logprobs(softcap: float | None) -> LogProbs:
    return torch.compile(logprobs(softcap))


def logprobs_of_fp32_head(softcap: float | None) -> LogProbs:
    return lambda e, c, t: logprobs_of(logits_of(e.float(), c.float(), softcap), t)


def soft(softcap: float | None) -> SoftLoss:
    def loss(e: Tensor, c: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return soft_nll_of(logits_of(e, c, softcap), t, w).sum() / (t != IGNORE_INDEX).any(1).sum()

    return loss


def compiled_soft(softcap: float | None) -> SoftLoss:
    return torch.compile(soft(softcap))
