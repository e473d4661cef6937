"""The inputs of the benchmarks.

lm: as a trained language model's. randn: logits N(0, 1). uniform: every p is 1/V. saved: a real model's, from a file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOPICS = 48
DOCUMENT = 512
CANDIDATES = 32
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Problem:
    """One instance of a task: e [N, D], c [V, D] and targets [N] (int64) on one device.

    origin: what a saved one says of where it is from. frozen: "e" or "c" where that one requires no gradient.
    weights: what tokens count for, of the tasks that have it (tasks.py). With soft targets targets are [N, K] as well.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    origin: dict[str, Any] | None = None
    frozen: str | None = None
    weights: Tensor | None = None

    def rows(self, which: slice | Tensor) -> Problem:
        """The problem of these tokens alone."""
        weights = None if self.weights is None else self.weights[which]
        return replace(self, e=self.e[which], targets=self.targets[which], weights=weights)

    def live(self) -> Tensor:
        """Which tokens are not ignored, [N] bool: those that have a target."""
        live = self.targets != IGNORE_INDEX
        return live if live.dim() == 1 else live.any(1)


def make(data: str, n: int, d: int, v: int, *, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """The problem of one of KINDS."""
    return KINDS[data](n, d, v, dtype=dtype, device=device, seed=seed)


def lm(n: int, d: int, v: int, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
    """Zipf-like unigram frequencies, shared topics per document, and a few confident candidates per token.

    The recipe and every constant in it: docs/design.md, "lm-like inputs".
    """
    if d <= TOPICS:
        raise ValueError(f"lm inputs need a hidden width above {TOPICS}, got {d}")
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, device=device)

    noisy = torch.log(torch.arange(1, v + 1, device=device, dtype=torch.float32)) + normal(v)
    rank = torch.empty(v, device=device)
    rank[noisy.argsort()] = torch.arange(v, device=device, dtype=torch.float32)
    log_frequency = -1.05 * torch.log(rank + 2.7)

    basis = torch.linalg.qr(normal(d, 1 + TOPICS)).Q
    u, topics = basis[:, 0], basis[:, 1:]

    b = normal(v, d) / math.sqrt(d)
    b -= (b @ basis) @ basis.T
    c = b + ((log_frequency - log_frequency.mean()) / 4)[:, None] * u
    c += (normal(v, TOPICS) / math.sqrt(TOPICS)) @ topics.T

    documents = normal(-(-n // DOCUMENT), TOPICS).repeat_interleave(DOCUMENT, 0)[:n]
    e = 4 * u + 2 * (0.97 * documents + 0.25 * normal(n, TOPICS)) @ topics.T
    candidates = torch.multinomial(log_frequency.softmax(0), n * CANDIDATES, replacement=True, generator=g)
    confidence = 0.4 + 1.2 * uniform(n, 1)
    strength = 10 * confidence * uniform(n, CANDIDATES) ** 4
    for k in range(CANDIDATES):
        direction = b[candidates[k::CANDIDATES]]
        e += strength[:, k, None] * direction / direction.square().sum(1, keepdim=True)

    e, c = e.to(dtype), c.to(dtype)
    return Problem(e, c, draw_targets(e, c, g))


def randn(n: int, d: int, v: int, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
    """Gaussian e and c, scaled so that logits have variance 1; targets without preference."""
    g = torch.Generator(device).manual_seed(seed)
    e = torch.randn(n, d, generator=g, device=device)
    c = torch.randn(v, d, generator=g, device=device) / math.sqrt(d)
    return Problem(e.to(dtype), c.to(dtype), torch.randint(0, v, (n,), generator=g, device=device))


def uniform(
    n: int, d: int, v: int, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Problem:
    """As randn, with e = 0: every p is 1/V, which is the most visits that the sampled backward can have."""
    p = randn(n, d, v, dtype=dtype, device=device, seed=seed)
    return Problem(torch.zeros_like(p.e), p.c, p.targets)


def saved(file: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Problem:
    """What torch.save({"e": .., "c": .., "targets": ..}, file) holds: e [.., D], c [V, D], targets [..].

    It may hold "origin" besides: a dict, of what JSON can say, which goes into the results file.
    Raises OSError for a file that cannot be read, ValueError for one that holds something else.
    """
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{file}: torch.load cannot read it: {first_line(error)}") from error
    names = ("e", "c", "targets")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), Tensor) for name in names):
        raise ValueError(f"{file}: expected a dict with the tensors e, c and targets")
    e, c, targets = (content[name] for name in names)
    if not (c.dim() == 2 and e.shape == (*targets.shape, c.shape[1]) and targets.numel() and len(c)):
        shapes = ", ".join(f"{name} {list(content[name].shape)}" for name in names)
        raise ValueError(f"{file}: expected e [.., D], c [V, D] and targets [..], got {shapes}")
    outside = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= len(c)))
    if outside.any():
        raise ValueError(
            f"{file}: targets: {targets[outside][0].item()} is neither in [0, {len(c)}) nor {IGNORE_INDEX}"
        )
    origin = content.get("origin")
    try:
        json.dumps(origin, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: origin: {first_line(error)}") from error
    dtype = e.dtype if dtype is None else dtype
    return Problem(e.reshape(-1, c.shape[1]).to(dtype), c.to(dtype), targets.reshape(-1).long(), origin)


def label(data: str) -> str:
    """The name of data in a results file: a saved file's own folder is nobody else's business."""
    return "saved:" + Path(data.removeprefix("saved:")).name if data.startswith("saved:") else data


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


KINDS = {"lm": lm, "randn": randn, "uniform": uniform}


def draw_targets(e: Tensor, c: Tensor, generator: torch.Generator, block: int = 1024) -> Tensor:
    """Targets [N] drawn from softmax(e @ c.T), a block of tokens at a time (Gumbel-max)."""
    out = torch.empty(len(e), dtype=torch.int64, device=e.device)
    for i in range(0, len(e), block):
        z = (e[i : i + block] @ c.T).float()
        noise = torch.empty_like(z).exponential_(generator=generator)
        out[i : i + block] = (z - noise.log_()).argmax(1)
    return out
