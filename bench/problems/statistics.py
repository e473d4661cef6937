"""How peaked the softmax of a problem is."""

from __future__ import annotations

from torch.nn import functional as F

from cce_ext.options import DEFAULT_SAMPLING_EPS
from cce_ext.sampling import TILE_COLUMNS

from .inputs import Problem


def statistics(p: Problem, block: int = 512) -> dict[str, float]:
    """Means over the tokens of the figures that the recipe of lm inputs was fitted to.

    above: entries of a row with p > 2^-12; tiles256: share of (token, 256-column tile) pairs holding one;
    blocks: share of 128 x 256 blocks holding one; entropy: nats; mass_below: probability of the entries under 2^-12;
    visits: expected visits a token of the sampled backward at its default eps, without what the tile map rounds, and
    without those of labels that are improbable.
    """
    n, v = len(p.e), len(p.c)
    sums = dict.fromkeys(("above", "tiles256", "blocks", "entropy", "mass_below", "visits"), 0.0)
    for i in range(0, n, block):
        logp = (p.e[i : i + block] @ p.c.T).float().log_softmax(1)
        prob = logp.exp()
        rows = len(prob)
        big = prob > 2**-12
        tiles = F.pad(big, (0, -v % 256)).view(rows, -1, 256).any(2)
        blocks = F.pad(tiles, (0, 0, 0, -rows % 128)).view(-1, 128, tiles.shape[1]).any(1)
        norm = F.pad(prob, (0, -v % TILE_COLUMNS)).view(rows, -1, TILE_COLUMNS).norm(dim=2)
        sums["above"] += big.sum().item()
        sums["tiles256"] += tiles.float().mean(1).sum().item()
        sums["blocks"] += blocks.float().mean().item() * rows
        sums["entropy"] += -(prob * logp).sum().item()
        sums["mass_below"] += prob.masked_fill(big, 0).sum().item()
        sums["visits"] += (norm * (1 / DEFAULT_SAMPLING_EPS - 1)).clamp(max=1).sum().item()
    return {k: s / n for k, s in sums.items()}
