"""What a run of other training than pretraining has: tokens that are ignored, a side that has no gradient.

Fine-tuning has prompts and padding whose tokens are ignored. LoRA and reinforcement learning freeze the classifier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import IGNORE_INDEX, Problem

# Tokens of a sequence, or all there are where that is less: a prompt, which is ignored, and its answer.
SEQUENCE = 2048
SIDES = ("e", "c")


class Regime(NamedTuple):
    """ignored: the share of the tokens that is, at random or in spans. frozen: the side that requires no gradient."""

    ignored: float = 0.0
    spans: bool = False
    frozen: str | None = None

    def name(self, alone: bool = False) -> str:
        """As rows have it: empty for pretraining. alone: of the live rows alone."""
        words = []
        if self.ignored:
            share = f"{self.ignored:g} ignored {'in spans' if self.spans else 'at random'}"
            words.append(f"live rows of {share}" if alone else share)
        if self.frozen:
            words.append(f"{self.frozen} frozen")
        return ", ".join(words)

    def of(self, p: Problem, seed: int) -> Problem:
        """p with the tokens of this regime ignored."""
        targets = p.targets
        if self.ignored:
            where = mask(len(targets), self.ignored, spans=self.spans, seed=seed)
            targets = targets.masked_fill(where.to(targets.device), IGNORE_INDEX)
        return replace(p, targets=targets, frozen=self.frozen)


def ignored_count(n: int, share: float) -> int:
    return round(share * n)


def mask(n: int, share: float, *, spans: bool, seed: int) -> Tensor:
    """Which of n tokens are ignored, [n] bool on the CPU: ignored_count of them, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(n, dtype=torch.bool)
    if not spans:
        out[torch.randperm(n, generator=generator)[: ignored_count(n, share)]] = True
        return out
    for start, length in zip(range(0, n, SEQUENCE), prompt_lengths(n, share, generator), strict=True):
        out[start : start + length] = True
    return out


def prompt_lengths(n: int, share: float, generator: torch.Generator) -> list[int]:
    """How many tokens of each sequence are its prompt: about the share of them, all together ignored_count."""
    tokens = torch.full((-(-n // SEQUENCE),), SEQUENCE, dtype=torch.float64)
    tokens[-1] = n - SEQUENCE * (len(tokens) - 1)
    # By half of what would make a prompt empty or an answer, about the mean: prompts differ, their sum does not.
    jitter = torch.rand(len(tokens), dtype=torch.float64, generator=generator) * 2 - 1
    jitter -= (jitter * tokens).sum() / n
    lengths = tokens * (ignored_count(n, share) / n + 0.5 * min(share, 1 - share) * jitter)
    # Ends are rounded and not lengths, so that what rounding adds to one prompt the next one has less.
    ends = lengths.cumsum(0).round().long()
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def live_alone(p: Problem) -> Problem:
    """The same problem cut to the tokens that are not ignored."""
    return p.rows(p.live())
