"""Other packages' implementations.

Each is imported when it is first wanted, so that one that is missing or broken is one row of the results.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from ..problems.inputs import IGNORE_INDEX
from .method import LogProbs, Loss, Outputs, without_softcap

# Columns of the vocabulary at a time: trl.trainer.utils has this number for all its trainers.
TRL_COLUMNS = 32768


def apple(impl: str) -> Callable[[float | None], Loss]:
    def load(softcap: float | None) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        options: dict[str, object] = {"impl": impl}
        if impl == "cce_exact" and "filter_c_grad" not in inspect.signature(linear_cross_entropy).parameters:
            # The release on PyPI has impl "cce" alone; without its filter that is what "cce_exact" is in newer ones.
            options = {"impl": "cce", "filter_eps": None}
        return lambda e, c, t: linear_cross_entropy(e, c, t, softcap=softcap, **options)

    return load


def liger(softcap: float | None) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap)
    return lambda e, c, t: loss(c, e, t)


def liger_cutedsl(softcap: float | None) -> Loss:
    without_softcap(softcap)
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90


def liger_cutedsl_scaled(softcap: float | None) -> Loss:
    without_softcap(softcap)
    # Its dispatching front end falls back to PyTorch without a word, so the kernel itself is named.
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    def loss(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return LigerFusedScaledCrossEntropySM90Function.apply(e, c, t).sum() / (t != IGNORE_INDEX).sum()

    return loss


def quack(softcap: float | None) -> Loss:
    without_softcap(softcap)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def trl_logprobs(softcap: float | None) -> LogProbs:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def function(e: Tensor, c: Tensor, t: Tensor) -> Outputs:
        found = ChunkedLogProbFunction.apply(e, c, None, t, 1.0, TRL_COLUMNS, softcap, 1.0, ("entropy",))
        return found[0], found[1]

    return function


def liger_cutedsl_logprobs(softcap: float | None) -> LogProbs:
    without_softcap(softcap)
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    def function(e: Tensor, c: Tensor, t: Tensor) -> Outputs:
        # Temperature 1; the argument after ignore_index changes nothing, and the last one asks for entropies.
        nll, entropy = LigerFusedScaledCrossEntropySM90Function.apply(e, c, t, 1.0, IGNORE_INDEX, 1, True)
        return -nll, entropy

    return function


def apple_logprobs(softcap: float | None) -> LogProbs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda e, c, t: (-linear_cross_entropy(e, c, t, softcap=softcap, reduction="none", impl="cce"), None)


def liger_logprobs(softcap: float | None) -> LogProbs:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=softcap, reduction="none")
    return lambda e, c, t: (-loss(c, e, t), None)
