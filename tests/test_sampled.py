"""The sampled backward: unbiased whatever it is told, bounded in its visits, and a function of its seed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.problems import oracle, peaked, uniform, upstream

from cce_ext import control_variate, linear_cross_entropy, portable
from cce_ext.sampling import CHAIN_TILES, CHAIN_TOKENS, TILE_COLUMNS, draw_visits, encode_tiles, tile_shares

EPS = 2.0**-4


@pytest.fixture
def problem(device):
    return peaked(64, 12, 3000, device=device, dtype=torch.float64, bias=True, ignored=0.1)


def forward(p, method="sampled"):
    return torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, None, method=method, eps=EPS, softcap=p.softcap)[:3]


def backward(p, outputs, seed, tile_map=None, eps=EPS):
    nll, lse, own_map = outputs
    g_nll, g_lse = upstream(p)
    return torch.ops.cce.lce_backward(
        g_nll.double(),
        g_lse.double(),
        None,
        p.e,
        p.c,
        p.bias,
        p.targets,
        nll,
        lse,
        own_map if tile_map is None else tile_map,
        None,
        torch.tensor([seed], device=p.e.device),
        eps=eps,
        softcap=p.softcap,
        need_bias=p.bias is not None,
    )


def deviations(p, outputs, tile_map=None, draws=1024):
    """Of each draw from the exact gradient, relative to it: for e, c and bias a [draws, elements]."""
    exact = oracle(p, *upstream(p))[2]
    stacks = zip(*(backward(p, outputs, 1000 + k, tile_map) for k in range(draws)), strict=True)
    return [(torch.stack(stack) - g).flatten(1) / g.norm() for stack, g in zip(stacks, exact, strict=True)]


def rms_of_means(deviation, k):
    """Root mean square error of the mean of k draws."""
    return deviation.unflatten(0, (-1, k)).mean(1).norm(dim=1).square().mean().sqrt().item()


def assert_unbiased(p, all_deviations):
    # What is sampled is the softmax's part of the gradient, so that a wrong weight shows along it.
    g_nll, g_lse = upstream(p)
    softmax_part = oracle(p, torch.zeros_like(g_nll), g_nll + g_lse)[2]
    for deviation, direction in zip(all_deviations, softmax_part, strict=True):
        one = rms_of_means(deviation, 1)
        assert one > 0.01, "one draw shows no variance: nothing was tested"
        # As 1/sqrt(K): a bias would stay, however many draws.
        assert one / rms_of_means(deviation, 16) == pytest.approx(4, rel=0.15)
        assert one / rms_of_means(deviation, 256) == pytest.approx(16, rel=0.35)
        along = deviation @ direction.flatten()
        assert abs(along.mean() / along.std() * math.sqrt(len(along))) < 4.5, "the mean is off by its own error"


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_mean_over_seeds_approaches_the_exact_gradient(softcap, problem):
    p = replace(problem, softcap=softcap)
    assert_unbiased(p, deviations(p, forward(p)))


def random_map(outputs, lowest, highest):
    """Codes that have nothing to do with the logits: of p's norms between 2^lowest and 2^highest."""
    nll, _, right = outputs
    g = torch.Generator().manual_seed(0)
    mass, below = (torch.rand(right.shape, generator=g).to(nll.device) for _ in range(2))
    log2_mass = lowest + (highest - lowest) * mass + nll / math.log(2)
    return encode_tiles(log2_mass, log2_mass - 4 * below)


def no_masses(a, live, lse, share, softcap, visited, q, *others):
    """Other masses than the map has, some above 1, some below 0."""
    g = torch.Generator().manual_seed(0)
    mass = torch.randn(q.shape, generator=g).to(q.device) / 4
    return (mass * a * (1 - visited / q.to(a.dtype))).masked_fill(~live, 0.0)


def no_spread(self, t0, t1):
    """Random numbers for the mean token's softmax and for the rows that it makes."""
    g = torch.Generator().manual_seed(t0)
    sizes = (t1 - t0, TILE_COLUMNS), (t1 - t0, self.e.shape[1])
    return tuple(torch.randn(size, generator=g, dtype=torch.float64).to(self.e.device) / 4 for size in sizes)


WRONG = {
    "map": [],
    "masses": [(portable, "remainders", no_masses)],
    "spread": [(control_variate.ControlVariate, "spread", no_spread)],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_costs_variance_only(what, problem, monkeypatch):
    """A random map, random masses, a random spread of them: the mean stays."""
    outputs = forward(problem)
    right = deviations(problem, outputs, draws=256)
    for change in WRONG[what]:
        monkeypatch.setattr(*change)
    bad = deviations(problem, outputs, random_map(outputs, -8, 0) if what == "map" else None)
    assert_unbiased(problem, bad)
    for b, r in zip(bad, right, strict=True):
        assert rms_of_means(b, 1) > 1.2 * rms_of_means(r, 1)


def improbable(softcap, far, *, device="cpu"):
    """Half of the labels lie far nats below the peak."""
    p = peaked(64, 12, 3000, device=device, dtype=torch.float64, bias=True)
    c, bias, targets = p.c.clone(), p.bias.clone(), p.targets.clone()
    targets[::2] = 700
    bias[700] = -far if softcap is None else -2.0 * softcap
    return replace(p, c=c, bias=bias, targets=targets, softcap=softcap)


@pytest.mark.slow
@pytest.mark.parametrize(("far", "softcap"), [(100.0, None), (500.0, None), (500.0, 500.0)])
def test_improbable_labels_have_visits_and_no_bias(far, softcap, device):
    """All other tiles are far above what the codes are relative to. Their steps do not grow; their end is marked."""
    p = improbable(softcap, far, device=device)
    outputs = forward(p)
    assert outputs[0][::2].min() > 0.9 * far
    visits = count_visits(p, EPS, seeds=40)[:, ::2].float()
    # Not the label's alone, and not the floor's.
    assert visits.mean() > 2 and visits.mean() < 1 / EPS
    assert_unbiased(p, deviations(p, outputs))


@pytest.fixture(scope="module")
def drawn():
    """Probabilities of 256 tokens by 64 tiles, which chain each pair is of, and what 1500 seeds draw."""
    g = torch.Generator().manual_seed(0)
    q = torch.rand(64, 256, generator=g) * 0.2
    live = torch.ones(256, dtype=torch.bool)
    visits = torch.stack([draw_visits(torch.tensor([seed]), 0, q, live) for seed in range(1500)]).double()
    tile, block = torch.arange(64)[:, None], torch.arange(256)[None] // CHAIN_TOKENS
    of_token = (tile // CHAIN_TILES) * 256 + torch.arange(256)[None]
    chain = torch.where((block + tile) % 2 == 0, of_token, 10000 + 2 * tile + block)
    return q.double(), chain.unique(return_inverse=True)[1], visits


def by_chain(chain, values):
    return values.new_zeros(*values.shape[:-2], int(chain.max()) + 1).index_add_(
        -1, chain.flatten(), values.flatten(-2)
    )


def test_each_pair_is_visited_with_its_probability(drawn):
    q, _, visits = drawn
    z = (visits.mean(0) - q) / (q * (1 - q) / len(visits)).sqrt()
    assert z.abs().max() < 5 and z.std() == pytest.approx(1, abs=0.03)


def test_a_chain_has_its_expected_visits_rounded_up_or_down(drawn):
    q, chain, visits = drawn
    excess = by_chain(chain, visits) - by_chain(chain, q)
    assert excess.abs().max() < 1 + 1e-6
    # Of pairs drawn one by one the variance would be q (1 - q) for each.
    assert excess.square().mean() < 0.2 * by_chain(chain, q * (1 - q)).mean()


def test_chains_draw_independently(drawn):
    _, chain, visits = drawn
    # A chain whose expectation is a whole number has no variance.
    correlation = torch.corrcoef(by_chain(chain, visits).T).nan_to_num(0.0).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(len(visits))
    assert correlation.std() == pytest.approx(1 / math.sqrt(len(visits)), rel=0.05)


def count_visits(p, eps, seeds):
    """Visits of each token, one row a seed."""
    counts = torch.zeros(seeds, len(p.e), dtype=torch.long)
    seed = 0
    original = portable.Gradients.add

    def counting(self, v0, v1, visits, **options):
        for visit in visits:
            counts[seed, visit.rows.cpu()] += 1
        original(self, v0, v1, visits, **options)

    outputs = forward(p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable.Gradients, "add", counting)
        for seed in range(seeds):
            backward(p, outputs, seed, eps=eps)
    return counts


def spiked(n, tiles, *, device):
    """All of the probability is one column's of each tile, the same in each: the most visits there can be."""
    p = uniform(n, 8, tiles * TILE_COLUMNS, device=device)
    p.e.fill_(1.0)
    p.c.fill_(-8.0)
    p.c[::TILE_COLUMNS] = 0.0
    p.targets.zero_()
    return p


@pytest.mark.parametrize("eps", [2.0**-3, 2.0**-5])
@pytest.mark.parametrize("make", [peaked, uniform, spiked])
def test_visits_stay_under_one_over_eps(make, eps, device):
    p = spiked(200, 100, device=device) if make is spiked else make(200, 12, TILE_COLUMNS * 100 + 5, device=device)
    visits = count_visits(p, eps, seeds=20).float()
    mean, noise = visits.mean().item(), visits.mean(1).std().item() / math.sqrt(20)
    assert mean - 3 * noise <= 1 / eps
    if make is spiked:
        assert mean > 0.9 / eps, "this softmax should need nearly all of them"
    else:
        assert mean < 0.6 / eps


def test_a_token_that_does_not_count_has_no_visits(device):
    p = peaked(100, 12, 3000, device=device, ignored=0.4)
    visits = count_visits(p, EPS, seeds=2)
    assert (visits[:, (p.targets == -100).cpu()] == 0).all()
    assert (visits[:, (p.targets != -100).cpu()] > 0).all()


def sampled_gradients(p, **options):
    p = p.leaves()
    linear_cross_entropy(p.e, p.c, p.targets, p.bias, impl="cce", filter_eps=EPS, **options).backward()
    return [x.grad for x in p.inputs]


def test_equal_under_one_manual_seed_and_different_under_another(device):
    p = peaked(100, 12, 3000, device=device)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(sampled_gradients(p))
    for a, b, other in zip(*draws, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, other)


def test_a_generator_of_the_users_own(device):
    """It decides the draw alone, moves on, and leaves PyTorch's where it was."""
    p = peaked(100, 12, 3000, device=device)
    torch.manual_seed(1)
    untouched = sampled_gradients(p)[0]
    torch.manual_seed(1)
    own = torch.Generator(device).manual_seed(7)
    first, second = sampled_gradients(p, generator=own)[0], sampled_gradients(p, generator=own)[0]
    assert torch.equal(sampled_gradients(p)[0], untouched)
    assert torch.equal(sampled_gradients(p, generator=own.manual_seed(7))[0], first)
    assert not torch.equal(first, second)


def test_each_call_draws_anew(device):
    p = peaked(100, 12, 3000, device=device)
    assert not torch.equal(sampled_gradients(p)[0], sampled_gradients(p)[0])


def test_the_forward_of_evaluation_leaves_the_generator_alone():
    p = peaked(20, 12, 300)
    state = torch.get_rng_state()
    with torch.no_grad():
        linear_cross_entropy(p.e, p.c, p.targets)
    linear_cross_entropy(p.e, p.c.requires_grad_(), p.targets, impl="cce_exact")
    assert torch.equal(state, torch.get_rng_state())


def test_the_map_has_mass_and_norm_of_each_tile(device):
    """The mass to half a step, the norm never too high: no token expects more than 1/eps visits."""
    p = peaked(80, 24, 1000, device=device)
    nll, _, tile_map = forward(p)
    assert tile_map.dtype == torch.int16
    softmax = torch.nn.functional.pad((p.e @ p.c.T).double().softmax(1), (0, -1000 % 256)).unflatten(1, (-1, 256))
    share = tile_shares(tile_map, nll)
    assert (share.log2_mass - softmax.sum(2).T.log2()).abs().max() <= 1 / 16 + 1e-4
    off = share.log2_norm - softmax.norm(dim=2).T.log2()
    assert off.max() <= 1e-4 and off.min() >= -1 / 4 - 1e-4


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0, 60.0, -60.0, 3000.0])
def test_the_map_is_the_same_for_any_offset(shift, device):
    """With and without an offset of exp, also where only some tokens need one."""
    p = peaked(80, 24, 1000, device=device, dtype=torch.float64, bias=True)
    first = forward(p)
    moved = replace(p, bias=p.bias + shift)
    for x, y in zip(forward(moved), (first[0], first[1] + shift, first[2]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-9)
    rows = torch.arange(80, device=device)[:, None] % 3 == 0
    e = torch.cat([p.e, torch.where(rows, shift, 0.0).double()], 1)
    mixed = replace(p, e=e, c=torch.cat([p.c, torch.ones_like(p.c[:, :1])], 1))
    for x, y in zip(forward(mixed), (first[0], first[1] + e[:, -1], first[2]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-9)
