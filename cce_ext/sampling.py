"""Which (token, vocab tile) pairs the sampled backward visits: the Python twin of csrc/tile/sampling.h.

The two agree bit for bit in the hash and in what is made of it, so that one seed and one map name the same visits
wherever they are drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE_COLUMNS = 256
CHAIN_TOKENS = 128
CHAIN_TILES = 32
MIN_PROBABILITY = 2.0**-24

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def log_visit_rate(eps: float) -> float:
    """log(1/eps - 1): the visits a token may spend by chance; the one that is left is its label's own tile."""
    return math.log(1.0 / eps - 1.0)


def row_keys(seed: Tensor, rows: Tensor) -> Tensor:
    """Hash key of each token. seed: [1] int64; rows: [N] int64 token indices. Returns [N] int64 in [0, 2^32).

    The seed is mixed before it meets the index: neighbouring seeds must not deal the same keys to other tokens.
    """
    first = _mix((seed + _GOLDEN) & _MASK)
    second = _mix(first ^ ((seed >> 32) & _MASK))
    return _mix((_mix(rows ^ first) + second) & _MASK)


def visit_hashes(keys: Tensor, indices: Tensor) -> Tensor:
    """Uniform 32-bit numbers, one a pair of key and index, both int64: they broadcast."""
    return _mix((keys + indices * _GOLDEN) & _MASK)


def visit_probabilities(log_peak: Tensor, log_rate: float) -> Tensor:
    """q = min(1, peak * rate), floored so that no pair is out of reach: that, not the map, keeps it unbiased.

    A NaN (a map or a loss that is not finite) is visited.
    """
    q = torch.exp(log_peak.float() + log_rate).clamp_(MIN_PROBABILITY, 1.0)
    return q.nan_to_num_(nan=1.0)


def draw_visits(seed: Tensor, first_tile: int, q: Tensor, live: Tensor) -> Tensor:
    """Which pairs are visited, as bool [T, N]: each with its probability q [T, N]; of tokens that are not live, none.

    first_tile, the number of q's first tile, must be a multiple of CHAIN_TILES. How: csrc/tile/sampling.h.
    """
    tiles, n = q.shape
    sure = (q >= 1.0) & live
    steps = (q * 2.0**32).to(torch.int64).masked_fill_(sure | ~live, 0)
    # [runs of tiles, tiles, blocks of tokens, tokens]
    steps = torch.nn.functional.pad(steps, (0, -n % CHAIN_TOKENS, 0, -tiles % CHAIN_TILES))
    steps = steps.unflatten(1, (-1, CHAIN_TOKENS)).unflatten(0, (-1, CHAIN_TILES))
    runs, _, blocks, _ = steps.shape

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device=q.device)

    tile = first_tile + numbers(runs * CHAIN_TILES).view(runs, CHAIN_TILES, 1, 1)
    block = numbers(blocks).view(1, 1, blocks, 1)
    token = numbers(blocks * CHAIN_TOKENS).view(1, 1, blocks, CHAIN_TOKENS)
    of_token = (block + tile) % 2 == 0
    token_chains = visit_hashes(row_keys(seed, token), first_tile // CHAIN_TILES + numbers(runs).view(runs, 1, 1, 1))
    tile_chains = visit_hashes(row_keys(seed, tile ^ _MASK), block)
    sums = torch.where(
        of_token,
        steps.where(of_token, 0).cumsum(1) + token_chains,
        steps.where(~of_token, 0).cumsum(3) + tile_chains,
    )
    wraps = (sums >> 32) != (sums - steps >> 32)
    drawn: Tensor = wraps.flatten(2).flatten(0, 1)[:tiles, :n]
    return drawn | sure


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer (Appleby, public domain) on the low halves of int64. Overwrites x."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x &= _MASK
    x ^= x >> 13
    x *= 0xC2B2AE35
    x &= _MASK
    x ^= x >> 16
    return x
