"""The loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .method import Loss, Unsupported, without_softcap


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
