"""Which (token, vocab tile) pairs the sampled backward visits: the Python twin of csrc/tile/sampling.h and tile_map.h.

The two agree bit for bit in the tile map's codes, in the hash and in what is made of it, so that one seed and one map
name the same visits wherever they are drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TILE_COLUMNS = 256
# Of a token in a tile, where a forward keeps its logits: csrc/kernels/logit_codes.h.
CODE_WORDS = TILE_COLUMNS + 2
CHAIN_TOKENS = 128
CHAIN_TILES = 32
MIN_PROBABILITY = 2.0**-24

LOG2_E = 1.0 / math.log(2.0)

# The map's codes: csrc/tile/tile_map.h.
MASS_STEPS = 8
NORM_STEPS = 4
MASS_CODES = 4096
NORM_CODES = 16
MASS_OF_ONE = MASS_CODES // 2

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def num_tiles(v: int) -> int:
    return -(-v // TILE_COLUMNS)


def encode_tiles(log2_mass: Tensor, log2_norm: Tensor) -> Tensor:
    """Codes of the tile map, int16, from the base-2 logarithms of each tile's sum of exp(z - reference), and L2 norm.

    The mass is rounded to the nearest code, the norm down. NaN is the highest mass.
    """
    steps = log2_mass.float().mul(MASS_STEPS).add_(MASS_OF_ONE)
    # Not by rounding alone: the number below 0.5 plus 0.5 is 1 in fp32.
    mass = (steps + 0.5).floor_().nan_to_num_(nan=MASS_CODES - 1).clamp_(0, MASS_CODES - 1).masked_fill_(steps < 0.5, 0)
    below = (mass - MASS_OF_ONE).div_(MASS_STEPS).sub_(log2_norm.float()).mul_(NORM_STEPS)
    norm = below.ceil_().nan_to_num_(nan=0.0).clamp_(0, NORM_CODES - 1).masked_fill_(mass == 0, 0)
    code = mass.mul_(NORM_CODES).add_(norm)
    # The same 16 bits with a sign.
    return torch.where(code < 2**15, code, code.sub(2**16), out=norm).to(torch.int16)


class TileShare(NamedTuple):
    """What the codes say of tokens' tiles: base-2 logarithms of the sum of a tile's p, and of their L2 norm."""

    log2_mass: Tensor
    log2_norm: Tensor
    none: Tensor  # the mass is no more than that: to be taken as 0
    above: Tensor  # it may be more than that


def decode_tiles(tile_map: Tensor, log2_reference: Tensor) -> TileShare:
    """log2_reference, fp32: the log-sum-exp of all of a token's logits less the map's reference, in bits."""
    code = tile_map.to(torch.int32) & 0xFFFF
    mass, norm = code >> 4, code & (NORM_CODES - 1)
    log2_mass = (mass - MASS_OF_ONE).float() / MASS_STEPS - log2_reference
    return TileShare(log2_mass, log2_mass - norm.float() / NORM_STEPS, mass == 0, mass == MASS_CODES - 1)


def tile_shares(tile_map: Tensor, nll: Tensor) -> TileShare:
    """Of a map [T, N] that is relative to the tokens' label logits."""
    return decode_tiles(tile_map, (nll * LOG2_E).float())


def log2_visit_rate(eps: float) -> float:
    """Of 1/eps - 1, the visits a token may spend by chance: the one that is left is its label's own tile."""
    return math.log2(1.0 / eps - 1.0)


def even_share(eps: float, tiles: int) -> float:
    """The probability of each visit if all tiles had an even share of them."""
    return min(1.0, (1.0 / eps - 1.0) / max(1, tiles))


class OfEntropy(NamedTuple):
    """What the gradient of tokens' entropies takes, each [N]."""

    gradient: Tensor  # what comes back of each
    entropy: Tensor  # in nats


class Steepness(NamedTuple):
    """How much of a token's visits falls where its p are, and how much where log p is far from its mean, [N] fp32."""

    even: Tensor
    steep: Tensor
    entropy: Tensor


def steepness_of(a: Tensor, of: OfEntropy) -> Steepness:
    """a: [N]. The shares are those of |a| and of the entropy's gradient h in the bound |a| + |h| (2 H + 1/e).

    Where that is 0 or not finite, all falls where the p are.
    """
    a, h, entropy = a.float().abs(), of.gradient.float().abs(), of.entropy.float()
    bound = a + h * (2.0 * entropy + 1.0 / math.e)
    known = bound.isfinite() & (bound != 0)
    even = torch.where(known, (a + h * (1.0 / math.e)) / bound, 1.0)
    return Steepness(even, torch.where(known, h / bound, 0.0), entropy)


def visit_probabilities(
    share: TileShare, log2_rate: float, even_share: float, steepness: Steepness | None = None
) -> Tensor:
    """q = min(1, norm * rate), floored so that no pair is out of reach: that, not the map, keeps it unbiased.

    With a gradient of the entropy it is norm * rate * (even + steep * |log norm + H|), whose sum over a token's tiles
    is at most rate as well, and which bounds each weighed entry of dz: docs/logprobs.md.

    A tile of which the map says only "this or more" has its even share at least. A NaN (a map or a loss that is not
    finite) is visited.
    """
    q = torch.exp2(share.log2_norm + log2_rate)
    if steepness is not None:
        far = (share.log2_norm * math.log(2.0) + steepness.entropy).abs_()
        # A norm of 0 has a logarithm that is not finite.
        q *= steepness.even + torch.where(steepness.steep != 0, far * steepness.steep, 0.0)
    q = torch.where(share.above, q.clamp(min=even_share), q)
    return q.clamp_(MIN_PROBABILITY, 1.0).nan_to_num_(nan=1.0)


def tile_masses(share: TileShare) -> Tensor:
    """The sums of p that the control variate takes: at most 1, and 1 where that is no number."""
    return torch.exp2(share.log2_mass.nan_to_num(nan=0.0).clamp_(max=0.0)).masked_fill_(share.none, 0.0)


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
