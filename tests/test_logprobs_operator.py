"""linear_logprobs as PyTorch sees it, the same bits in any batch, and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from support.logprobs import ALL, FIELDS, dense, gradients, ours, temperatures, upstream
from support.problems import error, peaked
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import cce_ext
from cce_ext import IMPLS, LogProbs, linear_logprobs
from cce_ext.options import ENTROPY, LOG_SUM_SQ_PROBS, MAXIMUM, MEAN_LOGITS, STATS_ROWS

operator = torch.ops.cce.linear_logprobs
KERNELS = [x for x in IMPLS if x not in ("torch_compile", "reference")]


def problem(device="cpu", **options):
    return peaked(20, 16, 300, device=device, bias=True, ignored=0.2, **options)


# ---- the operators ----


OPTIONS = [
    {"method": "sampled", "stats": ENTROPY, "softcap": 3.0},
    {"method": "exact", "need_map": False, "stats": LOG_SUM_SQ_PROBS | MEAN_LOGITS},
    {"method": "threshold", "eps": 1e-3, "stats": (1 << STATS_ROWS) - 1, "batch_invariant": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["method"])
def test_opcheck(options, device):
    p = problem(device)
    q, seed, scale = p.leaves(), torch.tensor([3], device=device), 1.0 / temperatures(p)
    options = {**options, "scale": scale}
    torch.library.opcheck(torch.ops.cce.lce_forward.default, (q.e, q.c, q.bias, q.targets, seed), options)
    nll, lse, tile_map, stats, _ = torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, seed, **options)
    rest = {k: v for k, v in options.items() if k not in ("need_map", "stats", "batch_invariant")}
    saved = (p.e, p.c, p.bias, p.targets, nll, lse, tile_map, stats[0].clone(), seed)
    for needs in ({}, {"need_e": False, "need_bias": True}, {"need_c": False}):
        torch.library.opcheck(
            torch.ops.cce.lce_backward.default,
            (torch.rand_like(nll), None, torch.rand_like(nll), *saved),
            {**rest, **needs},
        )
    torch.library.opcheck(torch.ops.cce.label_logits.default, (p.e, p.c, p.bias, p.targets), {"scale": scale})


def test_opcheck_of_the_whole(device):
    q = problem(device).leaves()
    for options in ({}, {"outputs": ",".join(ALL), "temperatures": temperatures(q), "shift": 1, "softcap": 4.0}):
        torch.library.opcheck(
            operator.default, (q.e, q.c, q.targets, q.bias), {"impl": "cce_exact", "temperature": 0.5, **options}
        )


def test_the_function_and_the_operator_agree(device):
    p = problem(device)
    for options, others in (
        ({}, {}),
        ({"temperature": temperatures(p), "outputs": ALL}, {"temperatures": temperatures(p), "outputs": ",".join(ALL)}),
        ({"outputs": ("is_top1",), "softcap": 2.0, "logit_scale": 0.5, "shift": 2, "filter_eps": None},) * 2,
    ):
        others = {**others, "outputs": "is_top1"} if others.get("outputs") == ("is_top1",) else others
        out = linear_logprobs(p.e, p.c, p.targets, p.bias, **options)
        for name, x, y in zip(FIELDS, out, operator(p.e, p.c, p.targets, p.bias, **others), strict=True):
            assert (
                (y.shape == (0,) and y.is_floating_point() == (name != "is_top1")) if x is None else torch.equal(x, y)
            )


def test_defaults_are_those_of_the_schema():
    theirs = {x.name: x.default_value for x in operator.default._schema.arguments[4:]}
    parameters = inspect.signature(linear_logprobs).parameters
    for name, value in theirs.items():
        expected = {"filter_eps": -1.0, "outputs": ",".join(parameters["outputs"].default), "temperatures": None}
        assert value == (expected[name] if name in expected else parameters[name].default)


def test_what_is_not_asked_for_has_no_numbers(device):
    p = problem(device)
    out = torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, None)
    assert out[3].shape == (0, 0) and out[4].shape == (0,) and out[4].dtype == torch.int64
    counts = p.targets != -100
    for bit in range(STATS_ROWS):
        *_, stats, argmax = torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, None, stats=1 << bit)
        others = [i for i in range(STATS_ROWS) if i != bit]
        assert stats.shape == (STATS_ROWS, 20) and not stats[others].any() and not stats[:, ~counts].any()
        assert stats[bit][counts].all()
        assert argmax.shape == ((20,) if 1 << bit == MAXIMUM else (0,))
    assert not argmax[~counts].any()


def test_operators_name_what_is_wrong():
    p = problem()
    ops, ones = torch.ops.cce, torch.ones(20)
    with pytest.raises(ValueError, match="stats: expected a sum of 1, 2, 4 and 8, got 16"):
        ops.lce_forward(p.e, p.c, None, p.targets, None, stats=16)
    with pytest.raises(ValueError, match=r"scale: expected \[20\], one for each token, got \[1\]"):
        ops.lce_forward(p.e, p.c, None, p.targets, None, scale=ones[:1])
    with pytest.raises(TypeError, match=r"scale: expected torch.float32 for e of torch.float32, got torch.float64"):
        ops.label_logits(p.e, p.c, None, p.targets, scale=ones.double())
    q = p.leaves()
    with pytest.raises(ValueError, match="scale: expected a tensor that requires no gradient"):
        ops.lce_forward(q.e, q.c, None, q.targets, None, scale=ones.requires_grad_())
    nll, lse, tile_map, *_ = ops.lce_forward(p.e, p.c, None, p.targets, None)
    with pytest.raises(ValueError, match="entropy: expected what lce_forward gave, since g_entropy is given, got None"):
        ops.lce_backward(nll, None, nll, p.e, p.c, None, p.targets, nll, lse, tile_map, None, torch.tensor([1]))


# ---- compilers, autocast, checkpoints, transforms ----


class Head(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.options = nn.Linear(16, 16), nn.Linear(16, 300), options

    def forward(self, x, t, temperature):
        h = torch.tanh(self.body(x))
        return linear_logprobs(h, self.head.weight, t, self.head.bias, temperature=temperature, **self.options)


class OperatorHead(Head):
    def forward(self, x, t, temperature):
        h = torch.tanh(self.body(x))
        options = {"temperatures": temperature, **self.options, "outputs": ",".join(self.options["outputs"])}
        return operator(h, self.head.weight, t, self.head.bias, **options)


def batch(n, device="cpu"):
    g = torch.Generator().manual_seed(n)
    targets = torch.randint(0, 300, (3, n), generator=g)
    targets[0, 0] = -100
    return [x.to(device) for x in (torch.randn(3, n, 16, generator=g), targets, torch.rand(3, n, generator=g) + 0.5)]


@pytest.mark.parametrize("head", [Head, OperatorHead])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["cce_exact", "cce", "reference"])
def test_fullgraph(head, dynamic, impl, device):
    torch._dynamo.reset()
    model = head(outputs=ALL, impl=impl, shift=1).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    parameters = list(model.parameters())
    for n in (10, 13):
        torch.manual_seed(0)
        got, expected = (
            compiled(*batch(n, device)),
            Head(outputs=ALL, impl="reference", shift=1).to(device)(*batch(n, device)),
        )
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(got[0].sum() + got[1].sum() + got[2].sum(), parameters)
        same = model(*batch(n, device))
        wanted = torch.autograd.grad(same[0].sum() + same[1].sum() + same[2].sum(), parameters)
        for x, y in zip(grads, wanted, strict=True):
            assert error(x, y) < (0.3 if impl == "cce" else 1e-5)


def test_inductor(device):
    torch._dynamo.reset()
    model = Head(outputs=("entropy", "is_top1"), impl="torch_compile").to(device)
    got, expected = model(*batch(9, device)), Head(outputs=ALL, impl="reference").to(device)(*batch(9, device))
    for name in ("logprobs", "lse", "entropy", "is_top1"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert got.mean_logits is None


def test_export():
    model = OperatorHead(outputs=ALL, impl="cce_exact")
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, tuple(batch(10)), dynamic_shapes=({1: length},) * 3)
    for x, y in zip(program.module()(*batch(13)), model(*batch(13)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, device):
    """The second forward draws the seed of the first."""
    p = peaked(50, 16, 3000, device=device, bias=True)
    results = []
    for around in (checkpoint, lambda function, *args, **_: function(*args)):
        torch.manual_seed(0)
        q = p.leaves()

        def function(e, c, bias):
            return tuple(linear_logprobs(e, c, p.targets, bias, temperature=0.7)[:3])

        out = around(function, q.e, q.c, q.bias, use_reentrant=reentrant)
        sum((x * g).sum() for x, g in zip(out, upstream(p), strict=True)).backward()
        results.append([x.grad for x in q.inputs])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_autocast(device):
    p = peaked(50, 16, 700, device=device).leaves()
    with torch.autocast(device, torch.bfloat16):
        out = ours(p, impl="cce_exact", temperature=temperatures(p))
    low = p.to(torch.bfloat16)
    same = ours(low, impl="cce_exact", temperature=temperatures(p))
    assert all(torch.equal(x, y) for x, y in zip(out, same, strict=True)) and out.entropy.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in gradients(out, p, upstream(p)))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("output", ["logprobs", "lse", "entropy"])
def test_no_second_derivative(impl, output):
    p = problem().leaves()
    (d_e,) = torch.autograd.grad(getattr(ours(p, impl=impl), output).sum(), p.e, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        d_e.sum().backward()


def test_forward_mode_is_refused():
    p = problem()
    with forward_ad.dual_level():
        e = forward_ad.make_dual(p.e, torch.ones_like(p.e))
        with pytest.raises(NotImplementedError, match="forward-mode AD .* impl='reference' only"):
            linear_logprobs(e, p.c, p.targets)
    with pytest.raises(NotImplementedError, match=r"torch.func.grad"):
        torch.func.grad(lambda e: linear_logprobs(e, p.c, p.targets).entropy.sum())(p.e)


def test_reference_has_a_second_derivative():
    p = problem(dtype=torch.float64).leaves()

    def entropies(e: Tensor) -> Tensor:
        return linear_logprobs(e, p.c.detach(), p.targets, impl="reference", temperature=0.8).entropy

    assert torch.autograd.gradgradcheck(entropies, p.e)


# ---- the same bits in any batch ----


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("d", "v", "softcap", "bias"),
    [(16, 700, None, True), (33, 3000, 3.0, False), (257, 5000, None, False), (40_000, 100, None, False)],
)
def test_batch_invariance(d, v, softcap, bias, dtype, device, two_threads):
    """Of how many tokens, in which order, beside which, and padded how.

    Odd widths of fp64 are MKL's hard case, sums long enough for two threads PyTorch's.
    """
    p = replace(peaked(200, d, v, dtype=dtype, device=device, bias=bias), softcap=softcap)
    of_tokens = temperatures(p)
    whole = ours(p, temperature=of_tokens, batch_invariant=True)
    g = torch.Generator().manual_seed(0)
    batches = [torch.randperm(200, generator=g), torch.tensor([7]), torch.arange(17, 82), torch.arange(99).repeat(2)]
    batches += [torch.randperm(200, generator=g)[:count] for count in (2, 63, 65, 128)]
    for index in batches:
        for ignored in (0.0, 0.5):
            drop = (torch.rand(len(index), generator=g) < ignored).to(device)
            i = index.to(device)
            q = replace(p, e=p.e[i], targets=p.targets[i].masked_fill(drop, -100))
            if ignored:
                q = replace(q, e=q.e.masked_fill(drop[:, None], float("nan")))
            part = ours(q, temperature=of_tokens[i], batch_invariant=True)
            for name, x, y in zip(FIELDS, part, whole, strict=True):
                assert torch.equal(x[~drop], y[i][~drop]), name


def test_batch_invariant_results_are_right(device):
    p = peaked(70, 33, 3000, device=device, bias=True, ignored=0.2)
    out, expected = ours(p, temperature=0.7, batch_invariant=True), dense(p.to(torch.float64), temperature=0.7)
    for x, y in zip(out, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=2e-5)
    leaf, exact = p.leaves(), p.to(torch.float64).leaves()
    ups = upstream(p)
    got = gradients(ours(leaf, impl="cce_exact", batch_invariant=True), leaf, ups)
    assert all(error(x, y) < 1e-4 for x, y in zip(got, gradients(dense(exact), exact, ups), strict=True))


# ---- errors ----


LEARNT = nn.Parameter(torch.tensor(3.0))
BAD = [
    ({"outputs": ("entropy", "perplexity")}, ValueError, "outputs: expected some of entropy, .*, got 'perplexity'"),
    ({"outputs": "entropy"}, TypeError, "outputs: expected a tuple of some of .*, got 'entropy'"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature: expected a positive number, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a positive number, got nan"),
    ({"temperature": "hot"}, TypeError, "temperature: expected a positive number, got 'hot'"),
    ({"temperature": torch.tensor(2)}, TypeError, "temperature: expected a number or a float tensor, got torch.int64"),
    ({"temperature": torch.ones(20).requires_grad_()}, ValueError, "temperature: .* requires no gradient"),
    ({"temperature": torch.ones(7)}, ValueError, r"temperature: expected one number or the targets' shape \[20\], got"),
    ({"temperature": torch.full((20,), -2.0)}, ValueError, "temperature: expected positive numbers, got -2.0"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature: expected positive numbers, got 0.0"),
    ({"logit_scale": 0}, ValueError, "logit_scale: expected a positive number, got 0"),
    ({"logit_scale": None}, TypeError, "logit_scale: expected a positive number, got None"),
    ({"softcap": -3.0}, ValueError, "softcap: expected a positive number or None, got -3.0"),
    ({"softcap": float("inf")}, ValueError, "softcap: expected a positive number or None, got inf"),
    ({"softcap": LEARNT}, ValueError, "softcap: expected a positive number or None, got a tensor that requires a"),
    ({"softcap": LEARNT, "temperature": torch.ones(20)}, ValueError, "softcap: .*, got a tensor that requires a"),
    ({"logit_scale": LEARNT}, ValueError, "logit_scale: expected a positive number, got a tensor that requires a"),
    ({"logit_scale": LEARNT, "temperature": torch.ones(20)}, ValueError, "logit_scale: .*, got a tensor that requires"),
    (
        {"logit_scale": torch.ones(20)},
        ValueError,
        r"logit_scale: expected a positive number, got a tensor of shape \[20",
    ),
    ({"impl": "fast"}, ValueError, "impl: expected one of .*, got 'fast'"),
    ({"impl": []}, ValueError, r"impl: expected one of .*, got \[\]"),
    ({"filter_eps": 2.0}, ValueError, "filter_eps: the sampling eps must be in"),
    ({"shift": 20}, ValueError, "shift: expected 0 <= shift < 20"),
    ({"batch_invariant": 1}, TypeError, "batch_invariant: expected a bool, got 1"),
    ({"batch_invariant": True, "impl": "reference"}, ValueError, "batch_invariant: .* impl='reference'"),
    ({"batch_invariant": True, "impl": "torch_compile"}, ValueError, "batch_invariant: .* impl='torch_compile'"),
    ({"generator": 3}, TypeError, "generator: expected a torch.Generator"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index: expected an integer or None, got 0.5"),
    ({"hidden": torch.zeros(20)}, ValueError, r"weight: expected \[V, 20\] for hidden of shape \[20\]"),
    ({"hidden": None}, TypeError, "hidden: expected a tensor, got NoneType"),
    ({"weight": torch.zeros(300, 9)}, ValueError, r"weight: expected \[V, 16\] for hidden of shape \[20, 16\], got"),
    ({"weight": torch.zeros(300, 16).double()}, TypeError, "weight: expected torch.float32 like hidden"),
    ({"weight": nn.Linear(16, 300)}, TypeError, "weight: expected a tensor, got Linear; give its weight"),
    ({"bias": torch.zeros(9)}, ValueError, r"bias: expected \[300\] for weight of shape"),
    ({"targets": torch.full((20,), 300)}, IndexError, r"targets: 300 at flat position 0: not in \[0, 300\)"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[x[2][:40] for x in BAD])
def test_errors_name_the_argument(change, kind, message):
    p = peaked(20, 16, 300)
    arguments = {"hidden": p.e, "weight": p.c, "targets": p.targets} | change
    with pytest.raises(kind, match=message):
        linear_logprobs(**arguments)


def test_what_an_ignored_token_has_for_temperature_is_not_looked_at():
    p = peaked(20, 16, 300)
    p.targets[3] = -100
    temperature = torch.ones(20).index_fill(0, torch.tensor([3]), -1.0)
    assert ours(p, temperature=temperature).lse.isfinite().all()


def test_it_is_exported():
    assert cce_ext.linear_logprobs is linear_logprobs and cce_ext.LogProbs is LogProbs
    assert {"linear_logprobs", "LogProbs"} <= set(cce_ext.__all__)
