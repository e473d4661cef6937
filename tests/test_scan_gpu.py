"""The kernels of scan="fp8": how far its loss is from the truth, that it is unbiased, and hard inputs. On Hopper.

Its options, and what is refused: test_scan.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from support.graphs import captured
from support.problems import Problem, error, full_of_nan, oracle, peaked, uniform, upstream
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench.problems import inputs
from cce_ext import LinearCrossEntropy, linear_cross_entropy
from cce_ext.sampling import log2_visit_rate, tile_shares, visit_probabilities

DEVICE = "cuda"


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return None  # the marker says it
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"the 8-bit scan takes compute capability 9.0, this is {major}.{minor}"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

ops = torch.ops.cce
EPS = 2.0**-8
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


# ---- Problems ----


def problem(n: int, d: int, v: int, *, dtype: torch.dtype = torch.bfloat16, scale: float = 2.5, **options) -> Problem:
    """Peaked as a trained model's are: logits of up to 25 over most others' 5."""
    p = peaked(n, d, v, device=DEVICE, **options)
    return replace(p, e=scale * p.e).to(dtype)


def lm() -> Problem:
    p = inputs.lm(512, 512, 32768, dtype=torch.bfloat16, device=DEVICE)
    return Problem(p.e, p.c, p.targets)


def outliers() -> Problem:
    """Four dimensions of the hidden states are 100 times the rest."""
    p = problem(512, 1024, 20000, scale=1.5)
    g = torch.Generator().manual_seed(9)
    at = torch.randperm(1024, generator=g)[:4].to(DEVICE)
    large = 100 * p.e.float().square().mean().sqrt() * (1 + 0.1 * torch.randn(len(p.e), 4, generator=g).to(DEVICE))
    e = p.e.clone()
    e[:, at] = large.to(e.dtype)
    return replace(p, e=e)


PROBLEMS = {"lm": lm, "peaked": lambda: problem(512, 256, 20000), "outliers": outliers}
each_problem = pytest.mark.parametrize("name", PROBLEMS)


@cache
def named(name: str) -> Problem:
    return PROBLEMS[name]()


@cache
def exact_of(name: str) -> tuple[Tensor, Tensor]:
    return exact_loss(named(name))


# ---- Calls ----


def forward(p: Problem, seed: int = 1, *, eps: float = EPS, scan: str | None = "fp8") -> tuple[Tensor, Tensor, Tensor]:
    """nll, lse and the map."""
    options = {"ignore_index": p.ignore_index, "softcap": p.softcap, "eps": eps, "scan": scan}
    return ops.lce_forward(p.e, p.c, p.bias, p.targets, torch.tensor([seed], device=DEVICE), **options)[:3]


def gradients(
    p: Problem, seed: int, ups: tuple[Tensor, Tensor], *, eps: float = EPS, scan: str | None = "fp8"
) -> list[Tensor]:
    options = {"ignore_index": p.ignore_index, "softcap": p.softcap, "eps": eps}
    outputs, seeds = forward(p, seed, eps=eps, scan=scan), torch.tensor([seed], device=DEVICE)
    args = (*ups, None, p.e, p.c, p.bias, p.targets, *outputs, None, seeds)
    return [g for g in ops.lce_backward(*args, **options, need_bias=p.bias is not None) if g.numel()]


def exact_loss(p: Problem) -> tuple[Tensor, Tensor]:
    zero = torch.zeros(len(p.e), device=DEVICE)
    return oracle(p, zero, zero)[:2]


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_near(p: Problem, outputs: tuple[Tensor, ...], tolerance: float = 0.06) -> None:
    """As near as the correction brings it: four times the most noise that there can be, and little in the mean.

    The scan by itself is off by a few hundredths to some tenths.
    """
    for x, y in zip(outputs[:2], exact_loss(p), strict=True):
        off = x.double() - y
        assert off.isfinite().all()
        assert off.abs().max() < tolerance and rms(off) < tolerance / 6


# ---- How true it is ----


@each_problem
def test_the_loss_is_nearer_than_that_of_dense_16_bits(name):
    """Dense torch rounds the logits to bf16. Its root mean square error, against a quarter of it."""
    p, (nll, lse) = named(name), exact_of(name)
    dense = F.cross_entropy((p.e @ p.c.T).float(), p.targets, reduction="none")
    draws = [forward(p, seed) for seed in range(4)]
    ours = rms(torch.stack([d[0].double() - nll for d in draws]))
    assert ours <= 0.25 * rms(dense.double() - nll), (ours, rms(dense.double() - nll))
    torch.testing.assert_close(draws[0][1] - draws[0][0], (lse - nll).float(), rtol=1e-5, atol=1e-4)  # label's logit


@each_problem
@pytest.mark.parametrize("eps", [2.0**-4, EPS])
def test_the_sum_of_exponentials_is_unbiased(name, eps):
    """The mean over seeds of exp(lse - exact lse) is 1: of all tokens, and of those with a small and a large loss."""
    p, (nll, lse) = named(name), exact_of(name)
    ratio = torch.stack([(forward(p, seed, eps=eps)[1].double() - lse).exp() for seed in range(64)])
    by_loss = nll.argsort()
    for tokens in (by_loss, *by_loss.chunk(4)):
        means = ratio[:, tokens].mean(1)  # tokens of a chain are not independent: seeds are
        off = (means.mean() - 1).abs().item()
        # Sums are fp32, and so are the logits of the visits: a relative 1e-5 of a sum of exponentials.
        assert off < 4 * means.std().item() / 64**0.5 + 2e-5, f"{off:.2g}, sigma {means.std().item() / 8:.2g}"


@each_problem
def test_visits_stay_within_their_bound(name):
    """By the scan's map a token has as many as by the 16-bit forward's, and no more than 1/eps in the mean."""
    p, expected = named(name), {}
    for scan in ("fp8", None):
        nll, _, tile_map = forward(p, scan=scan)
        q = visit_probabilities(tile_shares(tile_map, nll), log2_visit_rate(EPS), 0.0)
        expected[scan] = 1 + q.sum(0).mean().item()
        assert q.sum(0).max() <= 1.05 / EPS
    assert 0.9 < expected["fp8"] / expected[None] < 1.1, expected


@each_problem
def test_the_gradient_is_as_near_as_without(name):
    """The root mean square over seeds of one draw's error: at most 5 % above that of the 16-bit forward's.

    Dimensions of e that are 100 times the rest have the scan's map wrong by more, which costs variance.
    """
    most = 1.25 if name == "outliers" else 1.05
    p = named(name)
    ups = upstream(p)
    exact = oracle(p, *ups)[2]
    errors = {}
    for scan in ("fp8", None):
        draws = [gradients(p, seed, ups, scan=scan) for seed in range(16)]
        errors[scan] = [rms(torch.tensor([error(d[k], x) for d in draws])) for k, x in enumerate(exact)]
    for scanned, plain in zip(errors["fp8"], errors[None], strict=True):
        assert scanned <= most * plain, errors


@pytest.mark.parametrize("name", ["lm", "peaked"])
def test_the_gradient_is_unbiased(name):
    """A mean of 64 draws is four times as near as one of 4."""
    p = named(name)
    ups = upstream(p)
    exact = oracle(p, *ups)[2]
    sums, errors = [torch.zeros_like(x) for x in exact], {}
    for k in range(64):
        for total, x in zip(sums, gradients(p, k, ups, eps=2.0**-4), strict=True):
            total += x.double()
        if k + 1 in (4, 64):
            errors[k + 1] = [error(total / (k + 1), x) for total, x in zip(sums, exact, strict=True)]
    for few, many in zip(errors[4], errors[64], strict=True):
        assert many < 0.35 * few + 0.002, errors


# ---- Hard inputs ----

HARD = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 20.0},
    "ignored": {"ignored": 0.3},
    "all": {"bias": True, "softcap": 20.0, "ignored": 0.3},
}


@each_dtype
@pytest.mark.parametrize("shape", [(300, 128, 5120), (300, 72, 5001), (129, 50, 3000), (1, 256, 20000), (1, 9, 257)])
@pytest.mark.parametrize("options", HARD)
def test_options_and_odd_sizes(options, shape, dtype):
    """V that is no multiple of 256, D of none of 16, one token; ignored tokens and what is allocated hold NaN."""
    p = problem(*shape, dtype=dtype, scale=2.0, **HARD[options])
    ignored = p.targets == p.ignore_index
    p.e[ignored] = float("nan")
    ups = upstream(p)
    with full_of_nan():
        outputs, got = forward(p), gradients(p, 1, ups)
    clean = replace(p, e=p.e.masked_fill(ignored[:, None], 0.0))
    assert_near(clean, outputs)
    assert (outputs[0][ignored] == 0).all() and (outputs[1][ignored] == 0).all() and (got[0][ignored] == 0).all()
    for x, y in zip(got, oracle(clean, *ups)[2], strict=True):
        assert x.dtype == dtype and x.isfinite().all() and error(x, y) < 0.15


def test_a_vocabulary_masked_by_its_bias():
    """Rows that a bias of -inf takes out, of a whole tile and of a part, whatever they hold."""
    p = problem(200, 128, 5000, bias=True)
    p.bias[300:900] = -float("inf")
    p.targets[:] = torch.where((p.targets >= 300) & (p.targets < 900), 1, p.targets)
    ups = upstream(p)
    assert_near(p, forward(p))
    got = gradients(p, 1, ups)
    assert (got[1][300:900] == 0).all() and (got[2][300:900] == 0).all()
    kept = torch.ones(5000, dtype=torch.bool, device=DEVICE)
    kept[300:900] = False
    moved = p.targets - 600 * (p.targets >= 900)
    exact = oracle(Problem(p.e, p.c[kept], moved, p.bias[kept]), *ups)[2]
    for x, y in zip((got[0], got[1][kept], got[2][kept]), exact, strict=True):
        assert error(x, y) < 0.1


def test_a_label_far_in_the_tail():
    """Losses around 50: the map is relative to the label."""
    p = problem(200, 128, 5000, scale=5.0)
    targets = (p.e.double() @ p.c.double().T).argmin(1)
    p = replace(p, targets=targets)
    outputs = forward(p)
    assert exact_loss(p)[0].mean() > 50
    assert_near(p, outputs)


def test_a_flat_softmax():
    """e = 0: whole tiles have a mass that the map has without rounding, so that nothing is left to correct."""
    outputs = forward(uniform(100, 64, 5120, dtype=torch.bfloat16, device=DEVICE))
    assert all((x.cpu() - torch.tensor(5120.0).log()).abs().max() < 1e-4 for x in outputs[:2])


@pytest.mark.parametrize("bad", ["e", "c"])
def test_nan_shows(bad):
    """In the loss of the tokens that it reaches, and of them alone."""
    p = problem(200, 128, 5000)
    getattr(p, bad)[7] = float("nan")
    nan = forward(p)[0].isnan()
    assert nan[7] and (nan.sum() == 1 if bad == "e" else nan.all())


def test_no_token_counts():
    p = problem(50, 64, 3000)
    p = replace(p, targets=torch.full_like(p.targets, -100))
    nll, lse, _ = forward(p)
    assert (nll == 0).all() and (lse == 0).all()
    assert forward(replace(p, e=p.e[:0], targets=p.targets[:0]))[0].shape == (0,)


# ---- How it is called ----


def loss_of(p: Problem, **options) -> Tensor:
    return linear_cross_entropy(p.e, p.c, p.targets, p.bias, softcap=p.softcap, **options)


def test_a_seed_is_a_result():
    p = problem(300, 128, 20000, bias=True).leaves()

    def step(seed):
        torch.manual_seed(seed)
        loss = loss_of(p, scan="fp8", reduction="none")
        return loss.detach(), *torch.autograd.grad(loss.sum(), p.inputs)

    first, again, other = step(3), step(3), step(4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])
    assert error(first[1], again[1]) < 1e-3  # dE's sums have no order


def test_a_step_in_a_cuda_graph():
    """Captured once; each replay reads new inputs and draws anew, the scan's visits as well."""
    p = problem(400, 64, 5000).leaves()

    def step():
        loss = loss_of(p, scan="fp8")
        return loss, *torch.autograd.grad(loss, (p.e, p.c))

    graph, held = captured(step)
    results = []
    for k in (1, 1, 2):
        with torch.no_grad():
            other = problem(400, 64, 5000, seed=k)
            p.e.copy_(other.e), p.c.copy_(other.c), p.targets.copy_(other.targets)
        graph.replay()
        torch.cuda.synchronize()
        results.append([x.clone() for x in held])
        exact = oracle(p, torch.full((400,), 1 / 400, device=DEVICE), torch.zeros(400, device=DEVICE))
        assert abs(held[0] - exact[0].mean()) < 2e-3
        for x, y in zip(held[1:], exact[2], strict=True):
            assert error(x, y) < 0.1
    assert not torch.equal(results[0][0], results[1][0]), "a replay must draw anew"


def test_another_stream():
    p = problem(400, 64, 5000)
    ready = forward(p)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        e = p.e.clone()  # not there before the stream has woken
        late = forward(replace(p, e=e))
        assert not stream.query(), "the host waited for the device"
    stream.synchronize()
    assert torch.equal(late[0], ready[0]) and torch.equal(late[2], ready[2])


def test_compiled():
    torch._dynamo.reset()
    p = problem(300, 128, 20000).leaves()
    loss = torch.compile(lambda e, c, t: linear_cross_entropy(e, c, t, scan="fp8"), fullgraph=True)(p.e, p.c, p.targets)
    got = torch.autograd.grad(loss, (p.e, p.c))
    nll, _, exact = oracle(p, torch.full((300,), 1 / 300, device=DEVICE), torch.zeros(300, device=DEVICE))
    assert abs(loss - nll.mean()) < 2e-3
    assert all(error(x, y) < 0.1 for x, y in zip(got, exact, strict=True))


def test_weights_and_label_smoothing():
    """Beside the corrected loss and lse, as beside others."""
    p = problem(300, 128, 20000).leaves()
    weight = torch.rand(20000, device=DEVICE) + 0.5
    options = {"label_smoothing": 0.1, "weight": weight, "return_lse": True}
    loss, lse = loss_of(p, scan="fp8", **options)
    exact, exact_lse = loss_of(p.to(torch.float64), impl="reference", **options)
    assert abs(loss - exact) < 2e-3 and rms(lse.double() - exact_lse) < 5e-3


def test_evaluation_is_that_of_16_bits():
    p, module = problem(300, 128, 20000).leaves(), LinearCrossEntropy(scan="fp8", reduction="none")
    with torch.no_grad():
        evaluated = module(p.e, p.c, p.targets)
        assert torch.equal(evaluated, linear_cross_entropy(p.e, p.c, p.targets, reduction="none"))
    assert not torch.equal(module(p.e, p.c, p.targets), evaluated)


def test_a_reentrant_checkpoint():
    """Its first forward, without gradients, draws what the second does."""
    p = problem(300, 128, 20000)

    def scanned(e: Tensor) -> Tensor:
        return linear_cross_entropy(e, p.c, p.targets, scan="fp8")

    def step(run) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        e = p.e.clone().requires_grad_()
        loss = run(e)
        loss.backward()
        return loss.detach(), e.grad

    saved, kept = step(lambda e: checkpoint(scanned, e, use_reentrant=True)), step(scanned)
    assert torch.equal(saved[0], kept[0]) and error(saved[1], kept[1]) < 1e-3


@pytest.mark.parametrize(
    "options, said",
    [
        ({"scan": "fp4"}, "scan"),
        ({"method": "exact"}, "scan='fp8' takes method='sampled'"),
        ({"need_map": False}, "need_map=True"),
        ({"stats": 1}, "neither stats, scale nor batch_invariant"),
        ({"seed": None}, "seed must be one int64"),
    ],
    ids=str,
)
def test_what_the_operator_needs(options, said):
    p = problem(20, 64, 1000)
    given = {"scan": "fp8", "seed": torch.tensor([1], device=DEVICE), **options}
    with pytest.raises(RuntimeError, match=said):
        ops.lce_forward(p.e, p.c, None, p.targets, given.pop("seed"), **given)
