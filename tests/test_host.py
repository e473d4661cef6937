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


EVEN = np.float32(2.0**-6)


def code_of(mass, norm=0):
    return np.uint16(mass * 16 + norm)


def test_visit_probability(host):
    """By norm * rate, from the floor up to 1, for each code of a norm."""
    norm = np.arange(16)
    log2_reference = np.linspace(-8, 40, 200, dtype=np.float32)[:, None]
    q = host.visit_probability(code_of(2048, norm), log2_reference, np.float32(7), EVEN)
    assert q.dtype == np.float32
    expected = np.clip(2.0 ** (7 - norm / 4 - log2_reference.astype(np.float64)), 2.0**-24, 1)
    np.testing.assert_allclose(q, expected, rtol=4e-6)  # the float32 sum's rounding, seen through exp2
    assert (np.diff(q, axis=0) <= 0).all() and (np.diff(q, axis=1) <= 0).all()


def test_visit_probability_at_the_ends(host):
    """No number is visited. What is only known to be at least so much has an even share; a code of 0 the floor."""
    inf, nan, floor = np.inf, np.nan, 2.0**-24
    assert host.visit_probability(code_of(2048), nan, 4.0, EVEN) == 1
    assert host.visit_probability(code_of(4095), nan, 4.0, EVEN) == 1
    assert host.visit_probability(code_of(2048), -inf, 4.0, EVEN) == 1
    assert host.visit_probability(code_of(2048), inf, 4.0, EVEN) == floor
    assert host.visit_probability(code_of(4095), 700.0, 4.0, EVEN) == EVEN
    assert host.visit_probability(code_of(4095), inf, 4.0, EVEN) == EVEN
    assert host.visit_probability(code_of(4095), 256.0, 4.0, EVEN) == 1
    assert host.visit_probability(code_of(4094), 700.0, 4.0, EVEN) == floor
    assert host.visit_probability(code_of(0), 0.0, 7.0, EVEN) == floor


def test_tile_mass(host):
    assert host.tile_mass(code_of(2048), 0.0) == 1 and host.tile_mass(code_of(2048 - 8, 15), 2.0) == 0.125
    assert host.tile_mass(code_of(2049), 0.0) == 1  # rounding takes no mass above 1
    assert host.tile_mass(code_of(0), 0.0) == 0 and host.tile_mass(code_of(0), -1000.0) == 0
    assert host.tile_mass(code_of(4095), 1000.0) < 1e-37


def test_a_code_holds_mass_and_norm(host):
    """Within half a step, and never above the norm; what is out of range is marked."""
    rng = np.random.default_rng(0)
    mass = rng.uniform(-255, 255, 20000).astype(np.float32)
    norm = (mass - rng.uniform(0, 3.6, mass.shape)).astype(np.float32)
    for m, n, code in zip(mass, norm, host.encode_tile(mass, norm), strict=True):
        log2_mass, log2_norm, none, above = host.decode_tile(int(code), 0.0)
        assert abs(log2_mass - m) <= 1 / 16 and not none and not above
        assert 0 <= n - log2_norm <= 1 / 4 or (n > log2_mass and log2_norm == log2_mass)
    inf, nan = np.inf, np.nan
    for m, none, above in (
        (-inf, True, False),
        (-256, True, False),
        (256, False, True),
        (inf, False, True),
        (nan, False, True),
    ):
        assert host.decode_tile(int(host.encode_tile(m, m)), 0.0)[2:] == (none, above)


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
    assert (host.kMassSteps, host.kNormSteps) == (sampling.MASS_STEPS, sampling.NORM_STEPS)
    assert (host.kMassCodes, host.kNormCodes) == (sampling.MASS_CODES, sampling.NORM_CODES)
    assert (host.kChainTokens, host.kChainTiles) == (sampling.CHAIN_TOKENS, sampling.CHAIN_TILES)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_python_draws_the_same_hashes(host, seed):
    tokens, tiles = np.arange(300, dtype=np.uint32), np.arange(1000, 1200, dtype=np.uint32)
    keys = sampling.row_keys(torch.tensor([seed]), torch.from_numpy(tokens.astype(np.int64)))
    twin = sampling.visit_hashes(keys, torch.from_numpy(tiles.astype(np.int64))[:, None])
    expected = host.visit_hash(host.row_key(seed, tokens)[None, :], tiles[:, None])
    np.testing.assert_array_equal(twin.numpy(), expected.astype(np.int64))


def test_python_encodes_the_same(host):
    """At steps' edges and beside them, at both ends, and for what is no number."""
    rng = np.random.default_rng(0)
    edges = (np.arange(-5, 4100) - 2048 + np.array([[-0.5], [0], [0.5]])).ravel() / 8
    beside = [np.nextafter(edges.astype(np.float32), np.float32(x)) for x in (-np.inf, np.inf)]
    mass = np.concatenate([edges, *beside, rng.normal(0, 120, 100_000), rng.normal(0, 5, 100_000)]).astype(np.float32)
    below = rng.choice([0, 0.25, 0.5, 3.75, 4], mass.shape) + rng.choice([0, 0, 1], mass.shape) * rng.normal(
        2, 3, mass.shape
    )
    norm = (mass - below).astype(np.float32)
    ends = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38, 0, 255.9, -255.95], np.float32)
    pairs = np.stack(np.meshgrid(ends, ends)).reshape(2, -1)
    mass, norm = np.concatenate([mass, pairs[0]]), np.concatenate([norm, pairs[1]])
    twin = sampling.encode_tiles(torch.from_numpy(mass), torch.from_numpy(norm))
    assert twin.dtype == torch.int16
    np.testing.assert_array_equal(twin.numpy().view(np.uint16), host.encode_tile(mass, norm))


def test_python_decodes_the_same(host):
    codes = np.arange(1 << 16, dtype=np.uint16)
    rng = np.random.default_rng(0)
    tile_map = torch.from_numpy(codes.view(np.int16))
    for reference in (0.0, *rng.uniform(0, 30, 3), 721.3, -3.7, np.inf, np.nan):
        reference = np.float32(reference)
        share = sampling.decode_tiles(tile_map, torch.tensor(reference))
        expected = np.array([host.decode_tile(int(code), reference) for code in codes[::7]], np.float32)
        for x, y in zip(share, expected.T, strict=True):
            np.testing.assert_array_equal(x.numpy()[::7], y)
        for log2_rate, even in ((np.float32(sampling.log2_visit_rate(2.0**-7)), EVEN), (np.float32(0), np.float32(1))):
            # Two exp2, which may differ in the last bit.
            q = sampling.visit_probabilities(share, float(log2_rate), float(even))
            np.testing.assert_allclose(q, host.visit_probability(codes, reference, log2_rate, even), rtol=2.5e-7)
        mass = host.tile_mass(codes, reference)
        np.testing.assert_allclose(sampling.tile_masses(share), mass, rtol=2.5e-7, atol=1e-44)


def test_rates():
    assert 2 ** sampling.log2_visit_rate(2.0**-8) == pytest.approx(255)
    assert sampling.even_share(2.0**-8, 1000) == 0.255 and sampling.even_share(2.0**-8, 3) == 1


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


def pair_plan(host, **changes):
    arguments = dict(
        dtype=host.DType.bfloat16,
        n=1000,
        k=5,
        d=64,
        v=500,
        e_address=1 << 20,
        e_row_stride=64,
        c_row_stride=64,
        grad_c_address=1 << 21,
    )
    return host.plan_pair_gradients(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes",
    [{"d": 61}, {"e_address": (1 << 20) + 2}, {"e_row_stride": 63}, {"c_row_stride": 68}, {"grad_c_address": 8}],
    ids=str,
)
def test_pair_gradients_fall_back_to_elements(host, changes):
    """Where a row that is read or written does not begin, or end, at a multiple of 16 bytes."""
    whole = pair_plan(host)
    assert whole["vector_loads"] and whole["columns"] == 128 * 8
    single = pair_plan(host, **changes)
    assert not single["vector_loads"] and single["columns"] == 128


@pytest.mark.parametrize("n, k", [(1, 1), (1, 16), (17, 1), (1000, 5), (8192, 64), (8192, 256), (100003, 7)])
def test_segments_of_pairs(host, n, k):
    """They are all of them, not too many, and the same for every width and dtype: sums have one order."""
    plan = pair_plan(host, n=n, k=k)
    assert (plan["segments"] - 1) * plan["pairs"] < n * k <= plan["segments"] * plan["pairs"]
    assert plan["segments"] <= host.kPairSegments and plan["pairs"] >= 16
    for other in ({"d": 61}, {"dtype": host.DType.float64}, {"grad_c_address": 0}):
        assert pair_plan(host, n=n, k=k, **other)["segments"] == plan["segments"]


def test_label_logits_grid(host):
    per_block = host.kLabelLogitsTokensPerBlock
    assert plan(host, n=0)["blocks"] == 0
    assert plan(host, n=1)["blocks"] == 1
    assert plan(host, n=per_block)["blocks"] == 1
    assert plan(host, n=per_block + 1)["blocks"] == 2
    assert plan(host, n=per_block << 31)["blocks"] == 2**31 - 1
