"""Inputs whose softmax looks like a trained language model's, and the statistics that say how far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOPICS = 48
DOCUMENT = 512
CANDIDATES = 32


@dataclass(frozen=True)
class Problem:
    """One instance of the loss: e [N, D], c [V, D] and targets [N] (int64) on one device."""

    e: Tensor
    c: Tensor
    targets: Tensor


def lm(n: int, d: int, v: int, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
    """Zipf-like unigram frequencies, shared topics per document, and a few confident candidates per token.

    The recipe and every constant in it: docs/design.md, "lm-like inputs".
    """
    if d <= TOPICS:
        raise ValueError(f"d: lm inputs need a hidden width above {TOPICS}, got {d}")
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


def draw_targets(e: Tensor, c: Tensor, generator: torch.Generator, block: int = 1024) -> Tensor:
    """Targets [N] drawn from softmax(e @ c.T), a block of tokens at a time (Gumbel-max)."""
    out = torch.empty(len(e), dtype=torch.int64, device=e.device)
    for i in range(0, len(e), block):
        z = (e[i : i + block] @ c.T).float()
        noise = torch.empty_like(z).exponential_(generator=generator)
        out[i : i + block] = (z - noise.log_()).argmax(1)
    return out


def statistics(p: Problem, block: int = 512) -> dict[str, float]:
    """How peaked the softmax is: means over the tokens of the figures that the recipe was fitted to.

    above: entries of a row with p > 2^-12; tiles256: share of (token, 256-column tile) pairs holding one;
    blocks: share of 128 x 256 blocks holding one; entropy: nats; mass_below: probability of the entries under 2^-12;
    visits: expected visits a token of the sampled backward at eps = 2^-7 with 128-column tiles.
    """
    n, v = len(p.e), len(p.c)
    sums = dict.fromkeys(("above", "tiles256", "blocks", "entropy", "mass_below", "visits"), 0.0)
    for i in range(0, n, block):
        logp = (p.e[i : i + block] @ p.c.T).float().log_softmax(1)
        prob = logp.exp()
        rows = len(prob)
        big = prob > 2**-12
        pad = torch.nn.functional.pad
        tiles = pad(big, (0, -v % 256)).view(rows, -1, 256).any(2)
        blocks = pad(tiles, (0, 0, 0, -rows % 128)).view(-1, 128, tiles.shape[1]).any(1)
        mass = pad(prob, (0, -v % 128)).view(rows, -1, 128).sum(2)
        sums["above"] += big.sum().item()
        sums["tiles256"] += tiles.float().mean(1).sum().item()
        sums["blocks"] += blocks.float().mean().item() * rows
        sums["entropy"] += -(prob * logp).sum().item()
        sums["mass_below"] += prob.masked_fill(big, 0).sum().item()
        sums["visits"] += (mass * 128).clamp(max=1).sum().item()
    return {k: s / n for k, s in sums.items()}
