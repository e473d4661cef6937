"""The C++ that needs no GPU: the sampling hash and the choice of kernel configurations."""

import numpy as np
import pytest
import torch

from cce_ext import sampling

U32 = 1 << 32


def fmix32(x):
    """MurmurHash3's finalizer, once more and in another language."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % U32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % U32
    return x ^ (x >> 16)


def row_key(seed, token):
    first = fmix32((seed % U32 + 0x9E3779B9) % U32)
    second = fmix32(first ^ (seed >> 32) % U32)
    return fmix32((fmix32(token ^ first) + second) % U32)


def visit_hash(key, tile):
    return fmix32((key + tile * 0x9E3779B9) % U32)


def hashes(host, seed, tokens, tiles):
    """[tokens, tiles] of hashes."""
    keys = host.row_key(seed, np.arange(tokens, dtype=np.uint32))
    return host.visit_hash(keys[:, None], np.arange(tiles, dtype=np.uint32)[None, :])


def below(h, q):
    """Where a hash falls under q: what a chain of one pair is."""
    return h < int(q * U32)


def chi_square(values, buckets):
    """Its deviation from the mean of a uniform distribution, in standard deviations, per row of values."""
    counts = np.stack([np.bincount(row, minlength=buckets) for row in values])
    expected = values.shape[1] / buckets
    statistic = ((counts - expected) ** 2 / expected).sum(1)
    return (statistic - (buckets - 1)) / np.sqrt(2 * (buckets - 1))


# ---- the hash ----


KNOWN_ANSWERS = [  # seed, token, tile, row key, hash
    (0, 0, 0, 0x1C29BA82, 0x9B2C426D),
    (1, 2, 3, 0xA658BC58, 0x9ECA8D97),
    (-1, 8191, 1999, 0x8713E6F7, 0x2C948A2B),
    (0x123456789ABCDEF, 0xFFFFFFFF, 0x80000000, 0x56AEAC02, 0x2A7C15E3),
]


def test_known_answers(host):
    # The finalizer has published values; the others fix our use of it, which the backward's draws depend on.
    assert [int(host.fmix32(x)) for x in (0, 1, 0xFFFFFFFF)] == [0, 0x514E28B7, 0x81F16F39]
    for seed, token, tile, key, value in KNOWN_ANSWERS:
        assert int(host.row_key(seed, token)) == key
        assert int(host.visit_hash(key, tile)) == value


def test_equals_the_definition(host):
    rng = np.random.default_rng(0)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), *map(int, rng.integers(-(2**63), 2**63, 200))]
    for seed in seeds:
        token, tile = map(int, rng.integers(0, U32, 2))
        key = row_key(seed, token)
        assert int(host.row_key(seed, token)) == key
        assert int(host.visit_hash(key, tile)) == visit_hash(key, tile)


@pytest.mark.parametrize("seed", [0, 1, 12345, -7, 1 << 40])
def test_uniform(host, seed):
    h = hashes(host, seed, 1024, 2048)
    for bits in (h >> 24, h & 0xFF):  # the high byte decides visits; the low one catches a weak mix
        assert abs(chi_square(bits.reshape(1, -1).astype(np.int64), 256)[0]) < 5
        for view in (bits, bits.T):  # within a token over tiles, and within a tile over tokens
            deviations = chi_square((view >> 4).astype(np.int64), 16)
            assert abs(deviations.mean()) < 5 / np.sqrt(len(deviations))
            assert np.abs(deviations).max() < 9  # of thousands, with chi-square's heavy right tail


@pytest.mark.parametrize("q", [2.0**-7, 0.1, 0.5])
def test_visit_rate(host, q):
    tokens, tiles = 2048, 2001
    visits = below(hashes(host, 99, tokens, tiles), q)
    for axis, count in ((0, tokens), (1, tiles)):
        z = (visits.mean(axis) - q) / np.sqrt(q * (1 - q) / count)
        assert np.abs(z).max() < 6
        assert abs(z.std() - 1) < 0.1
    assert abs(visits.mean() - q) < 5 * np.sqrt(q * (1 - q) / visits.size)


def test_avalanche(host):
    """Each input bit flips each output bit about half the time."""
    rng = np.random.default_rng(1)
    n = 8192
    seed = rng.integers(-(2**63), 2**63, n)
    token, tile = (rng.integers(0, U32, n).astype(np.uint32) for _ in range(2))

    def value(seed, token, tile):
        return host.visit_hash(host.row_key(seed, token), tile)

    before = value(seed, token, tile)
    flipped = [value(seed ^ np.int64(np.uint64(1 << b).view(np.int64)), token, tile) for b in range(64)]
    flipped += [value(seed, token ^ np.uint32(1 << b), tile) for b in range(32)]
    flipped += [value(seed, token, tile ^ np.uint32(1 << b)) for b in range(32)]
    changed = np.stack(flipped) ^ before
    rates = np.stack([((changed >> np.uint32(b)) & 1).mean(1) for b in range(32)])
    assert rates.shape == (32, 128)
    assert np.abs(rates - 0.5).max() < 0.03  # 5.4 standard deviations


@pytest.mark.parametrize("other", [1, 2, 1 << 32, -1])
def test_seeds_are_independent(host, other):
    tokens, tiles, q = 1024, 2048, 0.125
    a = below(hashes(host, 0, tokens, tiles), q)
    b = below(hashes(host, other, tokens, tiles), q)
    both = (a & b).mean()
    assert abs(both - q * q) < 5 * np.sqrt(q * q * (1 - q * q) / a.size)


def test_neighbours_are_independent(host):
    h = hashes(host, 5, 1024, 2048)
    a = below(h, 0.125)
    for b in (np.roll(a, 1, 0), np.roll(a, 1, 1), np.roll(a, (1, 1), (0, 1))):
        assert abs((a & b).mean() - 1 / 64) < 5 * np.sqrt(63 / 64 / 64 / a.size)


# ---- visits ----


def test_visit_probability(host):
    log_peak = np.linspace(-30, 1, 400, dtype=np.float32)
    log_rate = np.float32(np.log(128))
    q = host.visit_probability(log_peak, log_rate)
    assert q.dtype == np.float32
    expected = np.clip(np.exp(log_peak.astype(np.float64) + np.float64(log_rate)), 2.0**-24, 1)
    np.testing.assert_allclose(q, expected, rtol=4e-6)  # the float32 sum's rounding, seen through exp
    assert (np.diff(q) >= 0).all()


def test_visit_probability_of_no_number(host):
    inf, nan, floor = np.inf, np.nan, 2.0**-24
    assert host.visit_probability(nan, 4.0) == 1
    assert host.visit_probability(inf, -inf) == 1  # not a number either
    assert host.visit_probability(inf, 4.0) == 1
    assert host.visit_probability(-inf, 4.0) == floor
    assert host.visit_probability(-1e30, 4.0) == floor
    assert host.visit_probability(np.float32(-87), np.float32(0)) == floor


def test_visit_step(host):
    one = np.float32(1)
    assert host.visit_step(np.float32(0.5)) == U32 // 2
    assert host.visit_step(np.float32(2.0**-24)) == 256
    assert host.visit_step(np.nextafter(one, np.float32(0))) == U32 - 256
    assert host.visit_step(one) == 0  # such a pair is visited whatever its chain says
    assert host.chain_wraps(np.uint32(4), np.uint32(5)) and not host.chain_wraps(np.uint32(5), np.uint32(5))


def test_neighbouring_seeds_deal_no_key_twice(host):
    """A token's key must not be another token's under the next seed: their draws would be one draw."""
    tokens = np.arange(1024, dtype=np.uint32)
    keys = np.stack([host.row_key(seed, tokens) for seed in range(64)])
    collisions = keys.size - len(np.unique(keys))
    assert collisions <= 5  # 0.5 expected of 2^16 random 32-bit numbers


# ---- the Python twin ----


def test_constants(host):
    assert host.kTileColumns == sampling.TILE_COLUMNS
    assert (host.kChainTokens, host.kChainTiles) == (sampling.CHAIN_TOKENS, sampling.CHAIN_TILES)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_python_draws_the_same_hashes(host, seed):
    tokens, tiles = np.arange(300, dtype=np.uint32), np.arange(1000, 1200, dtype=np.uint32)
    keys = sampling.row_keys(torch.tensor([seed]), torch.from_numpy(tokens.astype(np.int64)))
    twin = sampling.visit_hashes(keys, torch.from_numpy(tiles.astype(np.int64))[:, None])
    expected = host.visit_hash(host.row_key(seed, tokens)[None, :], tiles[:, None])
    np.testing.assert_array_equal(twin.numpy(), expected.astype(np.int64))


def test_python_has_the_same_probabilities(host):
    rng = np.random.default_rng(0)
    log_peak = np.concatenate([rng.normal(-6, 5, 5000), [np.nan, -np.inf, np.inf, -80, 0]]).astype(np.float32)
    rate = sampling.log_visit_rate(2.0**-7)
    q = sampling.visit_probabilities(torch.from_numpy(log_peak), rate)
    np.testing.assert_allclose(q, host.visit_probability(log_peak, np.float32(rate)), rtol=1e-5)


def test_python_draws_the_same_visits(host):
    """Against the chains pair by pair: tails of tokens and of tiles, certain pairs, tokens that are not live."""
    seed, tiles, n, first = -77, 75, 300, 2 * sampling.CHAIN_TILES
    rng = np.random.default_rng(3)
    q = rng.uniform(0, 0.4, (tiles, n)).astype(np.float32)
    q[rng.random(q.shape) < 0.1] = 1
    live = rng.random(n) < 0.9
    expected = np.zeros(q.shape, bool)
    chains = {}
    for t in range(tiles):
        for i in range(n):
            tile, block = first + t, i // sampling.CHAIN_TOKENS
            if host.chain_of_token(block, tile):
                name, start = (i, tile // sampling.CHAIN_TILES), host.token_chain(host.row_key(seed, i), tile)
            else:
                name, start = (tile, "tile", block), host.tile_chain(seed, tile, block)
            step = int(host.visit_step(q[t, i])) if live[i] else 0
            total = chains[name] = (chains.get(name, int(start)) + step) % U32
            expected[t, i] = live[i] and (q[t, i] == 1 or host.chain_wraps(total, step))
    twin = sampling.draw_visits(torch.tensor([seed]), first, torch.from_numpy(q), torch.from_numpy(live))
    np.testing.assert_array_equal(twin.numpy(), expected)


# ---- configurations ----


def plan(host, **changes):
    arguments = dict(
        dtype=host.DType.bfloat16,
        n=1000,
        d=64,
        v=500,
        e_address=1 << 20,
        e_row_stride=64,
        c_address=1 << 21,
        c_row_stride=64,
    )
    return host.plan_label_logits(**{**arguments, **changes})


def test_label_logits_uses_vectors_where_it_can(host):
    assert plan(host)["vector_loads"]
    assert plan(host, d=61)["vector_loads"]  # a strided view: what is left over is read element by element
    assert plan(host, e_row_stride=72, c_row_stride=0)["vector_loads"]
    assert plan(host, n=1, e_row_stride=3)["vector_loads"]
    assert plan(host, dtype=host.DType.float64, d=2, e_row_stride=2, c_row_stride=2)["vector_loads"]
    assert "16-byte" in plan(host)["reason"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"d": 7, "e_row_stride": 8, "c_row_stride": 8}, "shorter"),
        ({"e_address": (1 << 20) + 2}, "e does not start"),
        ({"c_address": (1 << 20) + 8}, "c does not start"),
        ({"e_row_stride": 63}, "e's rows"),
        ({"c_row_stride": 68}, "c's rows"),
    ],
)
def test_label_logits_falls_back_to_elements(host, changes, reason):
    result = plan(host, **changes)
    assert not result["vector_loads"]
    assert reason in result["reason"]


def test_label_logits_grid(host):
    per_block = host.kLabelLogitsTokensPerBlock
    assert plan(host, n=0)["blocks"] == 0
    assert plan(host, n=1)["blocks"] == 1
    assert plan(host, n=per_block)["blocks"] == 1
    assert plan(host, n=per_block + 1)["blocks"] == 2
    assert plan(host, n=per_block << 31)["blocks"] == 2**31 - 1


def test_exp2_polynomial(host):
    x = np.concatenate([np.linspace(-126, 127, 200_001), np.linspace(-2, 0, 200_001)]).astype(np.float32)
    error = host.exp2_polynomial(x) / np.exp2(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 2e-7
    integers = np.arange(-126, 128, dtype=np.float32)
    assert np.array_equal(host.exp2_polynomial(integers), np.ldexp(np.float32(1), integers.astype(int)))
    assert not host.exp2_polynomial(np.array([-np.inf, -1e30, -128, -127], np.float32)).any()
    assert np.isnan(host.exp2_polynomial(np.array([np.nan], np.float32)))[0]
