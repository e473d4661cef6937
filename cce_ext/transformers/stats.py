"""What a patched model keeps of its tokens: how many its largest logit was right of, and the entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from ..api import LossStats


class TokenMeans(NamedTuple):
    """Of the tokens that count: scalars of the model's device, NaN where there were none.

    Attributes:
        token_accuracy: the part whose label had the largest logit.
        entropy: the mean of the softmax's, in nats.
        tokens: how many there were.
    """

    token_accuracy: Tensor
    entropy: Tensor
    tokens: Tensor


class TokenStats:
    """Sums over the tokens of all forwards with labels since they were last taken, in training and in evaluation.

    A forward adds to them on the device and does not wait for it. Micro-batches are weighed by their tokens.
    """

    def __init__(self) -> None:
        # [3] fp32 each: correct ones, the entropy, tokens. Replaced and not added to, since a tensor of inference mode
        # could not be.
        self._of_training: Tensor | None = None
        self._of_evaluation: Tensor | None = None

    def add(self, found: LossStats, counts: Tensor, training: bool) -> None:
        """found: of a call with RETURN_STATS. counts: which tokens do, of its shape."""
        assert found.correct is not None and found.entropy is not None
        sums = torch.stack([found.correct.sum().float(), found.entropy.sum().float(), counts.sum().float()])
        before = self._of_training if training else self._of_evaluation
        sums = sums if before is None else before.to(sums.device) + sums
        if training:
            self._of_training = sums
        else:
            self._of_evaluation = sums

    def take(self, training: bool = True, group: dist.ProcessGroup | None = None) -> TokenMeans:
        """The means since the last call of it, of forwards in training mode or of those in eval mode.

        Args:
            training: which.
            group: a process group over whose ranks the means are; all of them have to call then. None: this process.

        Raises:
            ValueError: there has been no such forward yet.
        """
        sums = self._of_training if training else self._of_evaluation
        if sums is None:
            kind = "training" if training else "evaluation"
            raise ValueError(f"training: expected {not training}: there has been no forward with labels of {kind}")
        if training:
            self._of_training = torch.zeros_like(sums)
        else:
            self._of_evaluation = torch.zeros_like(sums)
        if group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=group)
        correct, entropy, tokens = sums.unbind()
        return TokenMeans(correct / tokens, entropy / tokens, tokens)

    def add_to_logs(self, logs: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """Takes them into what transformers.Trainer logs: token_accuracy and entropy beside a loss, eval_.. likewise.

        For an override of Trainer.log, which comes where the Trainer has waited for the device anyway. group: as in
        take.
        """
        for name, training in (("loss", True), ("eval_loss", False)):
            if name in logs:
                found = self.take(training, group)
                prefix = name.removesuffix("loss")
                logs[f"{prefix}token_accuracy"] = found.token_accuracy.item()
                logs[f"{prefix}entropy"] = found.entropy.item()


def stats_of(model: Any) -> TokenStats:
    """The model's cce_stats, which are made where there are none."""
    # Asked so, a compiler asks again at the next call.
    stats: TokenStats | None = getattr(model, "cce_stats", None)
    if stats is None:
        stats = model.cce_stats = TokenStats()
    return stats
