"""The control variate of the sampled backward: what it takes off the error, and what it must not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import error, oracle, peaked, upstream

from cce_ext import classifier, control_variate, linear_cross_entropy, portable, sampling

pytest.importorskip("tqdm", reason="the benchmark's inputs need it")

from bench.problems.inputs import lm

EPS = 2.0**-5


@pytest.fixture(autouse=True)
def one_thread():
    """For products so small threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forward(p):
    return torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, None, softcap=p.softcap)[:3]


def backward(p, outputs, seed=1, *, eps=EPS, ups=None, **options):
    return torch.ops.cce.lce_backward(
        *(upstream(p) if ups is None else ups),
        *(None, p.e, p.c, p.bias, p.targets, *outputs, None, torch.tensor([seed], device=p.e.device)),
        eps=eps,
        softcap=p.softcap,
        **{"need_bias": p.bias is not None} | options,
    )[: 2 + (p.bias is not None)]


def without(monkeypatch):
    """The sampled backward as it would be without its control variate."""
    plain = portable.remainders
    monkeypatch.setattr(portable, "remainders", lambda *inputs: torch.zeros_like(plain(*inputs)))


def dense_control_variate(p, outputs, seed, eps):
    """What it adds to the gradients, densely and in fp64."""
    nll, lse, tile_map = outputs
    g_nll, g_lse = (g.double().masked_fill(p.targets == -100, 0.0) for g in upstream(p))
    a, live = g_nll + g_lse, (g_nll + g_lse != 0) | (g_nll != 0)
    share = sampling.tile_shares(tile_map, nll)
    q = sampling.visit_probabilities(share, sampling.log2_visit_rate(eps), sampling.even_share(eps, len(tile_map)))
    q.scatter_(0, (p.targets.clamp(min=0) // 256)[None], 1.0)
    visited = sampling.draw_visits(torch.tensor([seed], device=p.e.device), 0, q, live)
    factor = a * share.log2_mass.double().exp2().clamp(max=1.0) * (1 - visited / q.double())
    q = p.to(torch.float64)
    cap = q.softcap or float("inf")
    if q.softcap:
        z = (lse.double() + share.log2_norm.double() * 0.6931471805599453).clamp(-cap, cap)
        factor *= 1 - (z / cap) ** 2
    mean = q.e[live].mean(0)
    z = q.c @ mean + (0.0 if q.bias is None else q.bias)
    z = torch.tanh(z / cap) * cap if q.softcap else z
    tile = torch.arange(len(z), device=z.device) // 256
    pi = torch.cat([part.softmax(0) for part in z.split(256)])
    dz = (factor * live).T[:, tile] * pi
    return [dz @ q.c, dz.T @ q.e.masked_fill(~live[:, None], 0.0), dz.sum(0)]


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("v", [100, 256, 2000, 2048])
@pytest.mark.parametrize("n", [1, 70])
def test_it_is_what_it_is_said_to_be(n, v, softcap, device, monkeypatch):
    p = peaked(n, 24, v, device=device, bias=True, softcap=softcap, ignored=0.2 if n > 1 else 0.0)
    outputs = forward(p)
    got = backward(p, outputs, eps=0.25)
    without(monkeypatch)
    rest = backward(p, outputs, eps=0.25)
    for x, y, added, whole in zip(
        got, rest, dense_control_variate(p, outputs, 1, 0.25), oracle(p, *upstream(p))[2], strict=True
    ):
        assert (x.double() - y.double() - added).norm() <= 1e-5 * whole.norm()
        assert added.any() == (v > 256)


@pytest.mark.parametrize("eps", [2.0**-5, 2.0**-8])
def test_it_lowers_the_error_of_lm_inputs(eps, monkeypatch):
    p = lm(256, 512, 16384, dtype=torch.float32)
    nll, lse, tile_map, *_ = torch.ops.cce.lce_forward(p.e, p.c, None, p.targets, None)
    inputs = (torch.ones_like(nll), None, None, p.e, p.c, None, p.targets, nll, lse, tile_map, None)
    exact = torch.ops.cce.lce_backward(*inputs, None, method="exact", eps=0.5)

    def errors():
        draws = [torch.ops.cce.lce_backward(*inputs, torch.tensor([k]), eps=eps) for k in range(4)]
        return [sum(error(draw[k], exact[k]) for draw in draws) / 4 for k in (0, 1)]

    of_e, of_c = errors()
    without(monkeypatch)
    plain_of_e, plain_of_c = errors()
    # 2.27 and 1.37 times at the larger eps, 1.97 and 1.39 at the smaller one.
    assert plain_of_e > 1.5 * of_e
    assert plain_of_c > 1.15 * of_c


def test_a_side_that_is_exact_has_none(device):
    p = peaked(60, 24, 3000, device=device, bias=True)
    outputs, exact = forward(p), oracle(p, *upstream(p))[2]
    sampled = backward(p, outputs)
    of_e, of_c, of_bias = backward(p, outputs, filter_e=False)
    assert error(of_e, exact[0]) < 1e-5 and torch.equal(of_c, sampled[1]) and torch.equal(of_bias, sampled[2])
    of_e, of_c, of_bias = backward(p, outputs, filter_c=False)
    assert torch.equal(of_e, sampled[0]) and error(of_c, exact[1]) < 1e-5 and error(of_bias, exact[2]) < 1e-5
    for need in ("need_e", "need_c", "need_bias"):
        needs = dict.fromkeys(("need_e", "need_c", "need_bias"), False) | {need: True}
        grads = backward(p, outputs, **needs)
        assert [torch.equal(x, y) for x, y in zip(grads, sampled, strict=True)] == list(needs.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_tokens_that_do_not_count_may_be_nan(dtype, device):
    p = peaked(60, 24, 3000, device=device, bias=True, ignored=0.3, dtype=dtype)
    outputs = forward(p)
    g_nll, g_lse = upstream(p)
    g_nll[5] = g_lse[5] = 0.0  # neither does one without a gradient
    none = p.targets == -100
    e, padded = p.e.clone(), [x.clone() for x in outputs]
    e[none], e[5] = 0.0, 0.0
    expected = backward(replace(p, e=e), outputs, ups=(g_nll, g_lse))
    e[none], e[5] = float("nan"), float("inf")
    padded[2][:, none] = -1
    g_nll[none] = g_lse[none] = float("nan")
    got = backward(replace(p, e=e), padded, ups=(g_nll, g_lse))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    assert (got[0][none] == 0).all() and (got[0][5] == 0).all()


def test_rows_of_c_that_are_nan_stay_away_from_tokens_that_do_not_count(device):
    p = peaked(60, 24, 3000, device=device, ignored=0.3)
    p.c[700] = float("nan")
    of_e = backward(p, forward(p))[0]
    none = p.targets == -100
    assert (of_e[none] == 0).all() and of_e[~none].isnan().all()


def test_nothing_counts(device):
    p = peaked(20, 24, 3000, device=device, bias=True, ignored=1.0)
    p.e.fill_(float("nan"))
    assert all((g == 0).all() for g in backward(p, forward(p)))


def test_columns_that_are_masked_have_no_gradient(device):
    """A bias of -inf: of some columns of a tile, of two whole tiles, of the last one."""
    p = peaked(60, 24, 3000, device=device, bias=True)
    masked = torch.zeros(3000, dtype=torch.bool, device=device)
    masked[200:1300] = masked[2816:] = True
    p.bias[masked] = -float("inf")
    p.targets.copy_(p.targets % 200)
    outputs, exact = forward(p), oracle(p, *upstream(p))[2]
    grads = backward(p, outputs)
    assert all(g.isfinite().all() for g in grads) and (grads[1][masked] == 0).all() and (grads[2][masked] == 0).all()
    draws = [backward(p, outputs, k) for k in range(64)]
    for drawn, one, y in zip(zip(*draws, strict=True), grads, exact, strict=True):
        assert error(sum(drawn) / 64, y) < max(1e-5, 0.25 * error(one, y))


@pytest.mark.parametrize("code", [0, 0xFFFF, 0xFFF0, 16, 0x8000, 0x7FFF])
def test_codes_at_the_ends(code, device):
    """Whatever the map says of all tiles, also for tokens whose loss is huge: finite, and right in the mean."""
    p = peaked(60, 24, 3000, device=device, bias=True, dtype=torch.float64)
    p.bias[7] = -400.0
    p.targets[:20] = 7
    nll, lse, tile_map = forward(p)
    outputs = nll, lse, torch.full_like(tile_map, code if code < 1 << 15 else code - (1 << 16))
    exact = oracle(p, *upstream(p))[2]
    draws = [backward(p, outputs, k, eps=0.25) for k in range(64)]
    for drawn, y in zip(zip(*draws, strict=True), exact, strict=True):
        assert all(x.isfinite().all() for x in drawn)
        # At other codes some q are at their floor, and no draw here has their visits.
        if code in (0xFFFF, 0xFFF0):
            one = sum(error(x, y) for x in drawn) / 64
            assert error(sum(drawn) / 64, y) < max(1e-12, 0.25 * one)


def test_blocks_are_no_matter(device, monkeypatch):
    """Small ones, so that every loop runs several times and with tails, against one of each."""
    p = peaked(411, 32, 9000, device=device, ignored=0.1, bias=True, dtype=torch.float64)
    outputs = forward(p)
    expected = backward(p, outputs)
    monkeypatch.setattr(classifier, "BLOCK_LOGITS", {"cpu": 1 << 13, "cuda": 1 << 13})
    monkeypatch.setattr(classifier, "BLOCK_ROWS", 32)
    small = forward(p)
    assert torch.equal(small[2], outputs[2])
    for x, y in zip(backward(p, small), expected, strict=True):
        assert error(x, y) < 1e-12


def test_a_retained_graph_gives_the_same_twice(device):
    p = peaked(60, 24, 3000, device=device, bias=True).leaves()
    loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, filter_eps=EPS)
    one, two = (torch.autograd.grad(loss, p.inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_gradient_is_rounded_once(dtype):
    """Half precision has fp32's gradient of the same inputs, rounded; the mean token is rounded too."""
    p = peaked(60, 24, 3000, device="cpu", bias=True, dtype=dtype)
    outputs = forward(p)
    got, wide = backward(p, outputs), p.to(torch.float32)
    mean = control_variate.ControlVariate.__init__

    def rounded(self, *inputs):
        mean(self, *inputs)
        self.mean = self.mean.to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_variate.ControlVariate, "__init__", rounded)
        expected = backward(wide, outputs)
    for x, y in zip(got, expected, strict=True):
        assert (
            (x - y.to(dtype)).abs() <= 1e-3 * y.abs().max() * torch.finfo(dtype).eps + torch.finfo(dtype).eps * y.abs()
        ).all()
        assert (x == y.to(dtype)).float().mean() > 0.99
