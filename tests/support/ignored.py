"""Which of a problem's tokens are ignored: where a kernel's blocks of 128 could go wrong, and as training has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .problems import Problem

BLOCK = 128


def _but(n: int, *live: int) -> Tensor:
    out = torch.ones(n, dtype=torch.bool)
    out[list(live)] = False
    return out


def _drawn(n: int, share: float) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) < share


def _spans(n: int) -> Tensor:
    """Sequences of 100 tokens, of which the first 40 to 90 are ignored."""
    at = torch.arange(n)
    return at % 100 < 40 + 17 * (at // 100) % 51


def _block(n: int, k: int) -> Tensor:
    """Block k, counted from the end where it is negative. The last one is what is left of n."""
    blocks = torch.arange(n) // BLOCK
    return blocks == k % (int(blocks[-1]) + 1)


# Of n tokens, a mask [n] on the CPU.
PATTERNS: dict[str, Callable[[int], Tensor]] = {
    "none": lambda n: torch.zeros(n, dtype=torch.bool),
    "half at random": lambda n: _drawn(n, 0.5),
    "nine tenths at random": lambda n: _drawn(n, 0.9),
    "spans": _spans,
    "one": lambda n: ~_but(n, n // 2),
    "all but the first": lambda n: _but(n, 0),
    "all but the last": lambda n: _but(n, n - 1),
    "all but one in the middle": lambda n: _but(n, n // 2),
    "all": lambda n: torch.ones(n, dtype=torch.bool),
    "the first block": lambda n: _block(n, 0),
    "the last block": lambda n: _block(n, -1),
    "all but the first block": lambda n: ~_block(n, 0),
    "all but the last block": lambda n: ~_block(n, -1),
    "a block and one": lambda n: torch.arange(n) <= BLOCK,
    "every other": lambda n: torch.arange(n) % 2 == 0,
}


def masked(p: Problem, pattern: str) -> Problem:
    """p with the tokens of the pattern ignored."""
    where = PATTERNS[pattern](len(p.e)).to(p.targets.device)
    return replace(p, targets=p.targets.masked_fill(where, p.ignore_index))


def live_of(p: Problem) -> Tensor:
    return p.targets != p.ignore_index


def alone(p: Problem) -> Problem:
    """The problem of the tokens that are not ignored."""
    live = live_of(p)
    return replace(p, e=p.e[live], targets=p.targets[live])


def with_rows(p: Problem, fill: Callable[[Tensor], Tensor]) -> Problem:
    """p with what fill makes of them in the rows of e that are ignored."""
    e = p.e.clone()
    ignored = ~live_of(p)
    e[ignored] = fill(e[ignored])
    return replace(p, e=e)


def _infinities(rows: Tensor) -> Tensor:
    """inf and -inf by turns, whose sums are NaN."""
    signs = 1 - 2 * (torch.arange(rows.shape[1], device=rows.device) % 2)
    return (float("inf") * signs).to(rows).expand_as(rows)


def _one_nan(rows: Tensor) -> Tensor:
    out = rows.clone()
    out[:, 3] = float("nan")
    return out


# What the e of ignored tokens may hold.
CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "another's": lambda rows: 3.0 * rows.flip(0),
    "NaN": lambda rows: torch.full_like(rows, float("nan")),
    "one NaN": _one_nan,
    "infinities": _infinities,
    "the largest": lambda rows: torch.full_like(rows, torch.finfo(rows.dtype).max),
}
