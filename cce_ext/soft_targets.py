"""Soft targets: several labels a token, each with a weight, and what they make of the tokens' losses.

With labels y_k and weights w_k, the loss of a token is Σ_k w_k (lse - z_{y_k}). Its heaviest label, h, is what the
operators know as its target:

    w_h nll + Σ_{k ≠ h} w_k (lse - z_{y_k}),

so that p_h w - w_h is formed before any rounding, in a tile that is visited for sure, and K = 1 needs nothing else. The
others' logits are K products a token, and their part of the gradient is exact: a weighted sum of rows of c for dE, one
of rows of e for dC. It asks for no visits. What is sampled is p alone, whose weight is Σ_k w_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .labels import is_ignored, may_look_at, no_label, that_count
from .options import Options, check_tensor
from .reduction import is_dtensor
from .vocab_parallel import VocabShard, sum_over_ranks

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(e: Tensor, targets: Tensor, target_weights: Tensor | None, options: Options) -> None:
    """Of e [.., D], targets [.., K] and target_weights [.., K], DTensors or not. Raises TypeError and ValueError."""
    several = targets.dim() == e.dim() > 0 and targets.shape[:-1] == e.shape[:-1]
    if target_weights is None:
        if several:
            raise ValueError(
                f"targets: expected shape {list(e.shape[:-1])} for e of shape {list(e.shape)}, got "
                f"{list(targets.shape)}; several labels a token need target_weights of the same shape"
            )
        return
    check_tensor("target_weights", target_weights)
    if target_weights.dtype not in _DTYPES:
        raise TypeError(f"target_weights: expected a tensor of bf16, fp16, fp32 or fp64, got {target_weights.dtype}")
    if not several or targets.shape[-1] == 0:
        expected = ", ".join([*map(str, e.shape[:-1]), "K"])
        raise ValueError(
            f"targets: with target_weights expected [{expected}], K >= 1 labels a token, for e of shape "
            f"{list(e.shape)}, got {list(targets.shape)}"
        )
    if target_weights.shape != targets.shape:
        raise ValueError(
            f"target_weights: expected targets' shape {list(targets.shape)}, got {list(target_weights.shape)}"
        )
    if target_weights.device != targets.device:
        raise ValueError(f"target_weights: expected {targets.device} like targets, got {target_weights.device}")
    if is_dtensor(target_weights) and not is_dtensor(e):
        raise ValueError("target_weights: expected a plain tensor like e, got a DTensor; give its to_local()")
    if options.weight is not None:
        raise ValueError(
            "weight: expected None with target_weights, which say what each label of a token counts for: multiply "
            "them by weight[targets]"
        )
    if options.label_smoothing:
        raise ValueError(
            f"label_smoothing: expected 0 with target_weights, got {options.label_smoothing!r}: they say already how "
            "a token's target is spread"
        )


@dataclass(frozen=True)
class SoftTargets:
    """Of a call: targets [.., K] and weights [.., K], which are 0 where a target is ignored.

    labels: [..], each token's heaviest, the first of those, or ignore_index where all K are that. place: where it is.
    """

    targets: Tensor
    weights: Tensor
    labels: Tensor
    place: Tensor
    ignore_index: int | None

    @classmethod
    def of(cls, targets: Tensor, weights: Tensor, ignore_index: int | None) -> SoftTargets:
        ignored = is_ignored(targets, ignore_index)
        weights = weights.masked_fill(ignored, 0.0)
        # Below every weight that an entry may have.
        least = torch.finfo(weights.dtype).min
        place = weights.detach().clamp(min=least).masked_fill(ignored, -float("inf")).argmax(-1, keepdim=True)
        return cls(targets, weights, targets.gather(-1, place)[..., 0], place, ignore_index)

    def flat(self, shift: int) -> SoftTargets:
        """Of tokens [N], each with what belongs to the token `shift` places later, or nothing."""

        def moved(x: Tensor, value: float) -> Tensor:
            if shift:
                x = nn.functional.pad(x[..., shift:, :], (0, 0, 0, shift), value=value)
            return x.reshape(-1, x.shape[-1])

        targets, place = moved(self.targets, no_label(self.ignore_index)), moved(self.place, 0)
        return SoftTargets(targets, moved(self.weights, 0.0), targets.gather(1, place)[:, 0], place, self.ignore_index)

    # What follows is of flat ones: [N, K].

    def counts(self) -> Tensor:
        """Entries that are not ignored."""
        return that_count(self.targets, self.ignore_index)

    def pairs(self, v: int, shard: VocabShard | None) -> Tensor | None:
        """The labels whose logits are wanted beside the heaviest's, int32 [N, K]; None for K = 1.

        They are rows of this rank's c, or -1 for none. A label of weight 0 adds nothing, whatever its logit: it is one
        only where its weight wants a gradient. Raises ValueError where that is asked for and a token's labels are on
        several ranks.
        """
        if self.targets.shape[1] == 1:
            return None
        if shard is not None and self.weights.requires_grad:
            raise ValueError(
                "target_weights: expected a tensor that requires no gradient where the vocabulary is cut over ranks: "
                "its gradient is that of a label's logit, and of another rank's a rank learns a token's sum alone"
            )
        wanted = self._mine(v, shard) & ~self._heaviest()
        if not self.weights.requires_grad:
            wanted &= self.weights != 0
        start = 0 if shard is None else shard.start
        return torch.where(wanted, self.targets - start, -1).to(torch.int32)

    def loss(self, nll: Tensor, lse: Tensor, z: Tensor | None, v: int, shard: VocabShard | None) -> Tensor:
        """[N], of the heaviest labels' nll, lse, and the logits z [N, K] of pairs, None for K = 1.

        One collective with a shard. A label out of range makes loss and gradient NaN: CUDA could not raise an error.
        """
        weights = self.weights.to(lse.dtype)
        # Not a gather, whose gradient PyTorch has on CUDA in no fixed order.
        heaviest = weights.masked_fill(~self._heaviest(), 0.0).sum(1)
        if not self.weights.requires_grad:  # as in pairs: a weight of 0 adds nothing, of a logit of -inf too
            nll = nll.masked_fill((heaviest == 0) & (nll == float("inf")), 0.0)
        loss: Tensor = heaviest * nll
        if z is None:
            return loss
        rest = weights.masked_fill(self._heaviest(), 0.0)
        mine, nan = self._mine(v, shard), float("nan")
        if shard is None:
            rest = rest.masked_fill(self.counts() & ~mine, nan)
            return loss + (rest * (lse[:, None] - z)).sum(1)
        own = (rest.masked_fill(~mine, 0.0) * z).sum(1)
        total, found = sum_over_ranks(shard, torch.cat([own, mine.sum(1).to(own.dtype)])).view(2, len(own))
        nowhere = found != self.counts().sum(1)
        if not torch.compiler.is_compiling() and may_look_at(self.targets) and bool(nowhere.any()):
            at = int(nowhere.int().argmax())
            raise IndexError(
                f"targets: one of {self.targets[at].tolist()}, of the token at flat position {at}, is in no rank's "
                "rows, nor ignore_index"
            )
        loss = loss + (rest.sum(1) * lse - total) * torch.where(nowhere, nan, 1.0)
        return loss

    def shared_numbers(self) -> int:
        """How many numbers the collective of loss has."""
        return 2 * len(self.targets) if self.targets.shape[1] > 1 else 0

    def _heaviest(self) -> Tensor:
        return torch.arange(self.targets.shape[1], device=self.place.device) == self.place

    def _mine(self, v: int, shard: VocabShard | None) -> Tensor:
        """Entries whose label is a row of this rank's c."""
        start, stop = (0, v) if shard is None else (shard.start, shard.stop)
        return self.counts() & (self.targets >= start) & (self.targets < stop)
