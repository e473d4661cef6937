"""The sampled gradient of logprobs, lse and entropy together: unbiased whatever it is told, and bounded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.logprobs import dense, gradients, ours, temperatures, upstream
from support.problems import Problem, peaked, uniform

from cce_ext import control_variate, portable, sampling
from cce_ext.options import ENTROPY
from cce_ext.sampling import OfEntropy, encode_tiles

EPS = 2.0**-4


@pytest.fixture
def problem(device):
    return peaked(64, 12, 3000, device=device, dtype=torch.float64, bias=True, ignored=0.1)


def forward(p: Problem, scale: torch.Tensor | None = None):
    """nll, lse, map and entropies."""
    *out, stats, _ = torch.ops.cce.lce_forward(
        p.e, p.c, p.bias, p.targets, None, softcap=p.softcap, stats=ENTROPY, scale=scale
    )
    return *out, stats[0]


def backward(p: Problem, outputs, seed, tile_map=None, ups=None, scale=None, eps=EPS):
    nll, lse, own_map, entropy = outputs
    g_logprobs, g_lse, g_entropy = upstream(p) if ups is None else ups
    return torch.ops.cce.lce_backward(
        *(-g_logprobs.to(nll), g_lse.to(nll), g_entropy.to(nll), p.e, p.c, p.bias, p.targets, nll, lse),
        *(own_map if tile_map is None else tile_map, entropy, torch.tensor([seed], device=p.e.device)),
        eps=eps,
        softcap=p.softcap,
        need_bias=True,
        scale=scale,
    )


def exact(p: Problem, ups=None, temperature=1.0):
    leaf = p.to(torch.float64).leaves()
    return gradients(dense(leaf, temperature=temperature), leaf, upstream(p) if ups is None else ups)


def deviations(p: Problem, outputs, tile_map=None, draws=2048, temperature=None):
    """Of each draw from the exact gradient, relative to it: for e, c and bias a [draws, elements]."""
    scale = None if temperature is None else 1.0 / temperature
    stacks = zip(*(backward(p, outputs, 1000 + k, tile_map, scale=scale) for k in range(draws)), strict=True)
    right = exact(p, temperature=1.0 if temperature is None else temperature)
    return [(torch.stack(stack) - g).flatten(1) / g.norm() for stack, g in zip(stacks, right, strict=True)]


def rms_of_means(deviation, k):
    """Root mean square error of the mean of k draws."""
    return deviation.unflatten(0, (-1, k)).mean(1).norm(dim=1).square().mean().sqrt().item()


def assert_unbiased(p: Problem, all_deviations, temperature=1.0):
    """As 1/sqrt(K): a bias would stay, however many draws. And none along the parts by themselves."""
    g = upstream(p)
    softmax_part = exact(p, [torch.zeros_like(g[0]), g[1] - g[0], torch.zeros_like(g[2])], temperature)
    entropy_part = exact(p, [torch.zeros_like(g[0]), torch.zeros_like(g[0]), g[2]], temperature)
    for deviation, *directions in zip(all_deviations, softmax_part, entropy_part, strict=True):
        one = rms_of_means(deviation, 1)
        assert one > 0.01, "one draw shows no variance: nothing was tested"
        assert one / rms_of_means(deviation, 16) == pytest.approx(4, rel=0.15)
        assert one / rms_of_means(deviation, 256) == pytest.approx(16, rel=0.35)
        for direction in directions:
            along = deviation @ direction.flatten()
            assert abs(along.mean() / along.std() * math.sqrt(len(along))) < 4.5, "the mean is off by its own error"


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_mean_over_seeds_approaches_the_exact_gradient(softcap, problem):
    p = replace(problem, softcap=softcap)
    temperature = temperatures(p).double().clamp(0.5, 2.0)
    outputs = forward(p, 1.0 / temperature)
    assert_unbiased(p, deviations(p, outputs, temperature=temperature), temperature)


def no_masses(a, live, lse, share, softcap, visited, q, of_entropy, scale):
    """Other masses than the map has, and another logarithm of p."""
    g = torch.Generator().manual_seed(0)
    mass = torch.randn(q.shape, generator=g).to(q.device) / 4
    weight = a - of_entropy.gradient * (of_entropy.entropy - 3.0)
    return (mass * weight * (1 - visited / q.to(a.dtype))).masked_fill(~live, 0.0)


def other_entropies(a, of_entropy):
    """Steepness of other entropies than the tokens have."""
    return sampling.steepness_of(a, of_entropy._replace(entropy=of_entropy.entropy.flip(0) + 1.0))


WRONG = {
    "map": [],
    "masses": [(portable, "remainders", no_masses)],
    "entropies that q is made of": [(portable, "steepness_of", other_entropies)],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_costs_variance_only(what, problem, monkeypatch):
    outputs = forward(problem)
    tile_map = None
    if what == "map":
        g = torch.Generator().manual_seed(0)
        mass, below = (torch.rand(outputs[2].shape, generator=g).to(outputs[0].device) for _ in range(2))
        log2_mass = -8.0 + 8.0 * mass + outputs[0] / math.log(2)
        tile_map = encode_tiles(log2_mass, log2_mass - 4 * below)
    for change in WRONG[what]:
        monkeypatch.setattr(*change)
    assert_unbiased(problem, deviations(problem, outputs, tile_map))


def probabilities(p: Problem, ups, eps: float, outputs=None):
    """q [tiles, N] but for the labels' tiles, which are always visited, and |a| + |h| (2 H + 1/e) [N]."""
    nll, _, tile_map, entropy = forward(p) if outputs is None else outputs
    a = (ups[1] - ups[0]).to(nll)
    steepness = sampling.steepness_of(a, OfEntropy(ups[2].to(nll), entropy))
    rates = sampling.log2_visit_rate(eps), sampling.even_share(eps, len(tile_map))
    q = sampling.visit_probabilities(sampling.tile_shares(tile_map, nll), *rates, steepness)
    return q, a.abs() + ups[2].to(nll).abs() * (2 * entropy + 1 / math.e)


def spiked(n: int, tiles: int, *, device: str) -> Problem:
    """All of the probability is one column's of each tile, the same in each: the most visits there can be."""
    p = uniform(n, 8, tiles * sampling.TILE_COLUMNS, device=device)
    p.e.fill_(1.0)
    p.c.fill_(-8.0)
    p.c[:: sampling.TILE_COLUMNS] = 0.0
    p.targets.zero_()
    return p


def skewed(n: int, tiles: int, *, device: str) -> Problem:
    """The same, with nine tenths in one of them: tiles whose log norm is far from the mean, on either side."""
    p = spiked(n, tiles, device=device)
    p.c[sampling.TILE_COLUMNS] = math.log(9 * tiles) / 8
    return p


@pytest.mark.parametrize("eps", [0.5, 2.0**-3, 2.0**-5])
@pytest.mark.parametrize("make", [peaked, uniform, spiked, skewed])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.01), (0.0, 1.0)], ids=str)
def test_visits_stay_under_one_over_eps(make, eps, weights, device):
    p = make(200, 12, 25605, device=device) if make in (peaked, uniform) else make(200, 100, device=device)
    g = upstream(p)
    q, _ = probabilities(p, [g[0] * weights[0], g[1] * 0, g[2] * weights[1]], eps)
    q.scatter_(0, (p.targets // sampling.TILE_COLUMNS)[None], 1.0)
    # The map's steps: a mass is rounded to an eighth of a bit, a norm down.
    assert q.sum(0).max() <= 2 ** (1 / 16) / eps


@pytest.mark.parametrize("make", [peaked, uniform, spiked])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.01), (0.0, 1.0), (0.01, 1.0)], ids=str)
def test_weighed_entries_are_bounded(make, weights, device):
    """|dz| / q <= (|a| + |h| (2 H + 1/e)) / rate, within the map's steps, as the loss's are bounded by |a| / rate."""
    eps = 2.0**-6
    p = spiked(50, 30, device=device) if make is spiked else make(50, 12, 7680, device=device)
    g = upstream(p)
    ups = [g[0] * weights[0], g[1] * 0, g[2] * weights[1]]
    q, bound = probabilities(p, ups, eps)
    z = p.e.double() @ p.c.double().T
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1, keepdim=True)
    dz = log_p.exp() * (-ups[0].double()[:, None] - ups[2].double()[:, None] * (log_p + entropy))
    weighed = (dz.abs().unflatten(1, (-1, sampling.TILE_COLUMNS)).amax(2).T / q.double()).masked_fill(q == 1.0, 0.0)
    # A norm is up to half a step of mass and one of its own lower than it was, which moves |log norm + H| as well.
    limit = 2 ** (1 / 16 + 1 / 4) * (bound + ups[2].abs() * 0.25) / (1 / eps - 1)
    assert (weighed <= limit).all()
    assert make is not peaked or (weighed > 0.02 * bound / (1 / eps - 1)).any()


def test_without_an_entropys_gradient_the_rule_is_the_losss(device):
    """To the bit, for tokens of a batch in which others have one."""
    p = peaked(200, 12, 5000, device=device)
    g = upstream(p)
    g[2][::2] = 0.0
    q, _ = probabilities(p, g, EPS)
    nll, _, tile_map, _ = forward(p)
    rates = sampling.log2_visit_rate(EPS), sampling.even_share(EPS, len(tile_map))
    plain = sampling.visit_probabilities(sampling.tile_shares(tile_map, nll), *rates)
    assert torch.equal(q[:, ::2], plain[:, ::2]) and not torch.equal(q, plain)


def test_what_is_not_finite_is_visited(device):
    p = peaked(8, 12, 5000, device=device)
    g = upstream(p)
    for i, value in enumerate((float("nan"), float("inf"), 0.0)):
        for x in g:
            x[i] = value
    steepness = sampling.steepness_of(g[1] - g[0], OfEntropy(g[2], forward(p)[3]))
    assert (steepness.even[:3] == 1).all() and (steepness.steep[:3] == 0).all() and (steepness.steep[3:] > 0).all()


def test_a_seed_gives_the_same(device):
    p = peaked(64, 12, 3000, device=device, bias=True)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        leaf = p.leaves()
        results.append(gradients(ours(leaf, filter_eps=EPS), leaf, upstream(p)))
    generator = torch.Generator(device).manual_seed(3)
    leaf = p.leaves()
    results.append(gradients(ours(leaf, filter_eps=EPS, generator=generator), leaf, upstream(p)))
    for one, two, three, four in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, four) and not torch.equal(one, three)


def test_the_variate_takes_from_the_entropys_noise(monkeypatch):
    pytest.importorskip("tqdm", reason="the benchmark's inputs need it")
    from bench.problems.inputs import lm

    p = lm(256, 512, 16384, dtype=torch.float32)
    p = Problem(p.e, p.c, p.targets)
    ups = [None, None, torch.ones(256)]

    def errors():
        draws = []
        for seed in range(4):
            torch.manual_seed(seed)
            leaf = p.leaves()
            draws.append(gradients(ours(leaf, outputs=("entropy",)), leaf, ups))
        return [sum(((d[k] - right[k]).norm() / right[k].norm()).item() for d in draws) / 4 for k in (0, 1)]

    leaf = p.leaves()
    right = gradients(ours(leaf, outputs=("entropy",), impl="cce_exact"), leaf, ups)
    of_e, of_c = errors()
    plain = control_variate.remainders
    monkeypatch.setattr(portable, "remainders", lambda *inputs: torch.zeros_like(plain(*inputs)))
    plain_of_e, plain_of_c = errors()
    # 0.045 and 0.018 instead of 0.095 and 0.023.
    assert of_e < 0.06 and plain_of_e > 1.6 * of_e and plain_of_c > 1.1 * of_c
