"""Which (token, vocab tile) pairs the sampled backward visits: the Python twin of csrc/tile/sampling.h.

The two agree bit for bit in the hash, so that one seed names one set of random numbers wherever it is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE_COLUMNS = 128
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


def visit_hashes(keys: Tensor, tiles: Tensor) -> Tensor:
    """Uniform 32-bit numbers, one a (vocab tile, token) pair. keys: [N], tiles: [T], int64. Returns [T, N] int64."""
    return _mix((keys + (tiles * _GOLDEN)[:, None]) & _MASK)


def visit_probabilities(log_mass: Tensor, log_rate: float) -> Tensor:
    """q = min(1, mass * rate), floored so that no pair is out of reach: that, not the map, keeps it unbiased.

    A NaN (a map or a loss that is not finite) is visited.
    """
    q = torch.exp(log_mass.float() + log_rate).clamp_(MIN_PROBABILITY, 1.0)
    return q.nan_to_num_(nan=1.0)


def visited(hashes: Tensor, q: Tensor) -> Tensor:
    """Which pairs are visited, as bool: a hash falls under q * 2^32 with probability q."""
    return hashes < (q * 2.0**32).to(torch.int64)


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
