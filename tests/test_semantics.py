"""What the function and the module promise: shapes, reductions, shift, degenerate cases, errors."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.problems import Problem, peaked
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cce_ext import (
    IMPLS,
    LinearCrossEntropy,
    LinearCrossEntropyImpl,
    VocabParallelOptions,
    compute_z_loss,
    linear_cross_entropy,
)
from cce_ext.options import Options

CCE = ["cce", "cce_exact", "cce_threshold"]
EAGER = [*CCE, "reference"]


def plain(p: Problem, **options):
    """F.cross_entropy in fp64, as a user would write it."""
    p = p.to(torch.float64)
    logits = F.linear(p.e, p.c, p.bias).flatten(0, -2)
    return F.cross_entropy(logits, p.targets.flatten().long(), **options)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(impl, reduction, device):
    p = peaked(60, 16, 300, device=device, ignored=0.2, bias=True)
    loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction=reduction, impl=impl)
    torch.testing.assert_close(loss.double(), plain(p, reduction=reduction), rtol=1e-5, atol=1e-5)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("leading", [(), (7,), (3, 7), (2, 3, 7), (2, 0), (1, 1)], ids=str)
def test_leading_dimensions(impl, leading, device):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(*leading, 16, generator=g).to(device).requires_grad_()
    c = torch.randn(50, 16, generator=g).to(device).requires_grad_()
    t = torch.randint(0, 50, leading, generator=g).to(device)
    loss, lse = linear_cross_entropy(e, c, t, reduction="none", return_lse=True, impl=impl)
    assert loss.shape == lse.shape == t.shape
    torch.testing.assert_close(lse, (e @ c.T).logsumexp(-1), rtol=1e-5, atol=1e-5)
    loss.sum().backward()
    assert e.grad.shape == e.shape and c.grad.shape == c.shape


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("shift", [0, 1, True, 3])
def test_shift(impl, shift, device):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(3, 9, 16, generator=g).to(device).requires_grad_()
    c = torch.randn(50, 16, generator=g).to(device)
    t = torch.randint(0, 50, (3, 9), generator=g).to(device)
    t[1, 4] = -100
    last = 9 - int(shift)
    e_cut, t_cut = e[:, :last], t[:, int(shift) :]
    for reduction in ("none", "mean", "sum"):
        loss, lse = linear_cross_entropy(e, c, t, shift=shift, reduction=reduction, return_lse=True, impl=impl)
        expected = F.cross_entropy((e_cut @ c.T).flatten(0, 1), t_cut.flatten(), reduction=reduction)
        torch.testing.assert_close(loss.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
        assert lse.shape == t_cut.shape
        assert lse[t_cut == -100].eq(0).all() and lse[t_cut != -100].ne(0).all()
    if impl in ("cce_exact", "reference"):
        ours, theirs = torch.autograd.grad(loss, e)[0], torch.autograd.grad(expected, e)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", EAGER)
def test_ignored_tokens_are_zero_and_have_no_gradient(impl, device):
    p = peaked(60, 16, 300, device=device).leaves()
    p = replace(p, ignore_index=7, targets=p.targets.clone())
    p.targets[::3] = 7
    loss, lse = linear_cross_entropy(p.e, p.c, p.targets, ignore_index=7, reduction="none", return_lse=True, impl=impl)
    assert (loss[::3] == 0).all() and (lse[::3] == 0).all()
    # Whatever flows into them, nothing comes out.
    g = torch.full_like(loss, float("nan"))
    g[torch.arange(60) % 3 != 0] = 1.0
    loss.backward(g)
    assert (p.e.grad[::3] == 0).all() or impl == "reference"
    assert p.c.grad.isfinite().all() or impl == "reference"


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("n", [5, 0])
def test_nothing_counts(impl, n, device):
    """All ignored, or no token: as F.cross_entropy, and gradients of zero."""
    for reduction, value in (("mean", float("nan")), ("sum", 0.0)):
        e = torch.randn(n, 8, device=device, requires_grad=True)
        c = torch.randn(20, 8, device=device, requires_grad=True)
        t = torch.full((n,), -100, device=device)
        loss = linear_cross_entropy(e, c, t, reduction=reduction, impl=impl)
        torch.testing.assert_close(loss, F.cross_entropy(e @ c.T, t, reduction=reduction), equal_nan=True)
        torch.testing.assert_close(loss, torch.tensor(value, device=device), equal_nan=True)
        loss.backward()
        if impl != "reference":
            assert (e.grad == 0).all() and (c.grad == 0).all()


@pytest.mark.parametrize("impl", [*CCE, "reference", "torch_compile"])
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1])
def test_bad_targets_raise_on_the_cpu(impl, bad):
    t = torch.tensor([1, 2, bad, 3])
    with pytest.raises(IndexError, match=rf"targets: {bad} at flat position 2"):
        linear_cross_entropy(torch.randn(4, 8), torch.randn(20, 8), t, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [*CCE, "reference"])
def test_bad_targets_are_nan_on_cuda(impl, monkeypatch):
    p = peaked(4, 8, 20, device="cuda").leaves()
    p.targets[2] = 20
    loss = linear_cross_entropy(p.e, p.c, p.targets, reduction="none", impl=impl)
    assert loss.isnan().tolist() == [False, False, True, False]
    if impl != "reference":
        monkeypatch.setenv("CCE_DEBUG", "1")
        with pytest.raises(IndexError, match="targets: 20 at flat position 2"):
            linear_cross_entropy(p.e, p.c, p.targets, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_targets(impl):
    p = peaked(20, 8, 300)
    a, b = (linear_cross_entropy(p.e, p.c, t, impl=impl) for t in (p.targets, p.targets.int()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("impl", CCE)
@pytest.mark.parametrize(
    "frozen", [("e",), ("c",), ("bias",), ("e", "bias"), ("c", "bias"), ("e", "c"), ("e", "c", "bias")]
)
def test_frozen_inputs(impl, frozen, device):
    p = peaked(50, 16, 300, device=device, bias=True)
    grads = []
    for names in ((), frozen):
        q = p.leaves()
        for name in names:
            getattr(q, name).requires_grad_(False)
        torch.manual_seed(0)
        loss = linear_cross_entropy(q.e, q.c, q.targets, q.bias, impl=impl)
        if len(names) == 3:
            assert not loss.requires_grad
            return
        loss.backward()
        grads.append({name: getattr(q, name).grad for name in ("e", "c", "bias")})
    for name, full in grads[0].items():
        if name in frozen:
            assert grads[1][name] is None
        else:
            assert torch.equal(grads[1][name], full)


@pytest.mark.parametrize("impl", CCE)
def test_a_retained_graph_gives_the_same_gradient_twice(impl, device):
    p = peaked(50, 16, 3000, device=device).leaves()
    loss = linear_cross_entropy(p.e, p.c, p.targets, impl=impl)
    first = torch.autograd.grad(loss, (p.e, p.c), retain_graph=True)
    second = torch.autograd.grad(loss, (p.e, p.c))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def layouts(x: torch.Tensor):
    """x with other strides: transposed storage, padded rows, every other row, and (for constant rows) expanded."""
    yield x.T.contiguous().T
    yield torch.cat([x, x], 1)[:, : x.shape[1]]
    yield torch.stack([x, x], 1).flatten(0, 1)[::2]
    yield torch.cat([x[:, :1], x], 1)[:, 1:]


@pytest.mark.parametrize("impl", CCE)
def test_any_layout(impl, device):
    p = peaked(40, 24, 300, device=device)
    results = []
    for e, c in [(p.e, p.c), *zip(layouts(p.e), layouts(p.c), strict=True)]:
        assert torch.equal(e, p.e) and torch.equal(c, p.c)
        e, c = e.detach().requires_grad_(), c.detach().requires_grad_()
        torch.manual_seed(0)
        loss = linear_cross_entropy(e, c, p.targets, impl=impl)
        results.append([loss, *torch.autograd.grad(loss, (e, c))])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", CCE)
def test_expanded_inputs(impl, device):
    row = torch.randn(1, 16, device=device, requires_grad=True)
    c = torch.randn(300, 16, device=device)
    t = torch.randint(0, 300, (1,), device=device).expand(10)
    loss = linear_cross_entropy(row.expand(10, 16), c, t, impl=impl)
    torch.testing.assert_close(loss, F.cross_entropy(row @ c.T, t[:1]), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert row.grad.isfinite().all()


def test_only_lse_is_used(device):
    """A z-loss by itself: no gradient flows into nll."""
    p = peaked(50, 16, 300, device=device).leaves()
    _, lse = linear_cross_entropy(p.e, p.c, p.targets, return_lse=True, impl="cce_exact")
    got = torch.autograd.grad(compute_z_loss(lse), (p.e, p.c))
    expected = torch.autograd.grad((p.e @ p.c.T).logsumexp(1).square().mean(), (p.e, p.c))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss(shift, reduction):
    e, c = torch.randn(2, 8, 16), torch.randn(50, 16)
    t = torch.randint(0, 50, (2, 8))
    t[0, 5] = -100
    _, lse = linear_cross_entropy(e, c, t, shift=shift, return_lse=True)
    got = compute_z_loss(lse, t, shift=shift, reduction=reduction)
    keep = t[:, shift:] != -100
    squares = (e[:, : 8 - shift] @ c.T).logsumexp(-1).square()
    expected = {"mean": squares[keep].mean(), "sum": squares[keep].sum(), "none": squares * keep}[reduction]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_z_loss_errors():
    with pytest.raises(ValueError, match=r"targets: after shift=1 expected lse's shape \[2, 8\], got \[2, 7\]"):
        compute_z_loss(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.long), shift=1)
    with pytest.raises(ValueError, match="reduction: .*'max'"):
        compute_z_loss(torch.zeros(2, 8), reduction="max")
    for lse, targets, message in (
        ([0.0], None, "lse: expected a tensor, got list"),
        (torch.zeros(2), [0, 1], "targets: expected a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            compute_z_loss(lse, targets)
    for targets in (None, torch.tensor([0, 1])):
        for ignore_index in (1.5, "x"):
            with pytest.raises(TypeError, match=f"ignore_index: expected an integer or None, got {ignore_index!r}"):
                compute_z_loss(torch.zeros(2), targets, ignore_index=ignore_index)
    with pytest.raises(ValueError, match="ignore_index: expected a number of int32, .*, got 1099511627776"):
        compute_z_loss(torch.zeros(2), torch.tensor([0, 1], dtype=torch.int32), ignore_index=2**40)


def test_function_and_module_take_the_options():
    options = [(x.name, x.default) for x in inspect.signature(Options).parameters.values()]
    # The function's own are its tensors: four come first, and target_weights at the end.
    for takes, own in ((linear_cross_entropy, slice(4, -1)), (LinearCrossEntropy, slice(None))):
        parameters = list(inspect.signature(takes).parameters.values())[own]
        assert [(x.name, x.default) for x in parameters] == options


def test_module_is_the_function(device):
    p = peaked(30, 16, 300, device=device, bias=True)
    options = {"softcap": 3.0, "ignore_index": 5, "reduction": "none", "return_lse": True, "impl": "cce_exact"}
    module = LinearCrossEntropy(**options)
    for a, b in zip(
        module(p.e, p.c, p.targets, p.bias), linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options), strict=True
    ):
        assert torch.equal(a, b)
    assert "softcap=3.0" in repr(module)
    assert not list(module.parameters())


def test_label_logits_against_a_gather(device):
    p = peaked(30, 16, 300, device=device, bias=True, softcap=3.0, ignored=0.2)
    got = torch.ops.cce.label_logits(p.e, p.c, p.bias, p.targets, softcap=3.0)
    z = 3 * torch.tanh(F.linear(p.e, p.c, p.bias) / 3)
    expected = z.gather(1, p.targets.clamp(min=0)[:, None])[:, 0].masked_fill(p.targets == -100, 0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


E, C, T, B = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([0, 1, 2, 3]), torch.randn(20)
LEARNT = nn.Parameter(torch.tensor(30.0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "args, options, exception, message",
    [
        ((E, C[:, :7], T), {}, ValueError, r"c: expected \[V, 8\] for e of shape \[4, 8\], got \[20, 7\]"),
        ((E, C[0], T), {}, ValueError, r"c: .* got \[8\]"),
        ((E, C, T[:3]), {}, ValueError, r"targets: expected shape \[4\] .* got \[3\]"),
        ((E, C, T, B[:19]), {}, ValueError, r"bias: expected \[20\] .* got \[19\]"),
        ((E.sum(), C, T), {}, ValueError, r"e: expected \[\.\., D\]"),
        ((E.double(), C, T), {}, TypeError, "c: expected torch.float64 like e, got torch.float32"),
        ((E, C, T, B.half()), {}, TypeError, "bias: expected torch.float32 like e, got torch.float16"),
        ((E.long(), C, T), {}, TypeError, "e: expected a tensor of bf16, fp16, fp32 or fp64, got torch.int64"),
        ((E.to(torch.float8_e4m3fn), C, T), {}, TypeError, "e: expected a tensor of bf16, .*, got torch.float8_e4m3fn"),
        ((3, C, T), {}, TypeError, "e: expected a tensor, got int"),
        ((E, nn.Linear(8, 20), T), {}, TypeError, "c: expected a tensor, got Linear; give its weight"),
        ((E, C, [0, 1, 2, 3]), {}, TypeError, "targets: expected a tensor, got list"),
        ((E, C, T, [0.0] * 20), {}, TypeError, "bias: expected a tensor, got list"),
        ((E[:, :0], C[:, :0], T), {}, ValueError, r"e: expected \[\.\., D\] with D >= 1, got \[4, 0\]"),
        ((E, C, T.float()), {}, TypeError, "targets: expected int64 or int32, got torch.float32"),
        ((E, C.to("meta"), T), {}, ValueError, "c: expected cpu like e, got meta"),
        ((E, C, T), {"reduction": "max"}, ValueError, "reduction: .* got 'max'"),
        ((E, C, T), {"softcap": 0.0}, ValueError, "softcap: .* got 0.0"),
        ((E, C, T), {"softcap": "30"}, TypeError, "softcap: .* got '30'"),
        ((E, C, T), {"softcap": LEARNT}, ValueError, "softcap: .* got a tensor that requires a gradient: it is given"),
        ((E, C, T), {"softcap": torch.ones(2)}, ValueError, r"softcap: .* or None, got a tensor of shape \[2\]"),
        ((E, C, T), {"ignore_index": "x"}, TypeError, "ignore_index: expected an integer or None, got 'x'"),
        ((E, C, T.int()), {"ignore_index": 2**31}, ValueError, "ignore_index: .* int32.*, got 2147483648"),
        ((E, C, T.int()), {"ignore_index": -(2**40), "shift": 1}, ValueError, "ignore_index: .*, got -1099511627776"),
        ((E, C, T), {"shift": "a"}, TypeError, "shift: expected an integer or a bool, got 'a'"),
        ((E, C, T), {"shift": 4}, ValueError, "shift: expected 0 <= shift < 4, .* got 4"),
        ((E, C, T), {"shift": -1}, ValueError, "shift: .* got -1"),
        ((E, C, T), {"vocab_parallel_options": (0, 20)}, TypeError, r"vocab_parallel_options: .*, got \(0, 20\)"),
        ((E, C, T), {"mean_group": 3}, TypeError, "mean_group: expected a process group or None, got int"),
        ((E, C, T), {"generator": 3}, TypeError, "generator: expected a torch.Generator or None, got int"),
    ],
)
def test_mistakes_name_the_argument(impl, args, options, exception, message):
    with pytest.raises(exception, match=message):
        linear_cross_entropy(*args, impl=impl, **options)


@pytest.mark.parametrize("impl", EAGER)
@pytest.mark.parametrize("shift", [0, 1])
def test_int32_has_every_ignore_index_of_its_own(impl, shift):
    for ignore_index in (-(2**31), 2**31 - 1):
        targets = torch.tensor([0, 1, ignore_index, 3], dtype=torch.int32)
        options = {"shift": shift, "reduction": "none", "impl": impl}
        loss = linear_cross_entropy(E, C, targets, ignore_index=ignore_index, **options)
        assert torch.equal(loss, linear_cross_entropy(E, C, torch.tensor([0, 1, -100, 3]), **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_softcap_may_be_a_tensor_of_one_number(impl):
    for softcap in (LEARNT.detach(), LEARNT.detach()[None]):
        loss = linear_cross_entropy(E, C, T, softcap=softcap, impl=impl)
        torch.testing.assert_close(loss, linear_cross_entropy(E, C, T, softcap=30.0, impl=impl))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"impl": "fast"}, "impl: expected one of cce, .*, got 'fast'"),
        ({"impl": []}, r"impl: expected one of cce, .*, got \[\]"),
        ({"impl": None}, "impl: expected one of cce, .*, got None"),
        ({"filter_eps": "low"}, "filter_eps: .* got 'low'"),
        ({"filter_eps": 0.0}, r"filter_eps: the sampling eps must be in \(0, 0.5\], got 0.0"),
        ({"filter_eps": 0.7}, "filter_eps: .* got 0.7"),
        ({"filter_eps": float("nan")}, "filter_eps: .* got nan"),
        ({"filter_eps": 1.0, "impl": "cce_threshold"}, "filter_eps: the threshold must be in"),
    ],
)
def test_bad_methods(options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(E, C, T, **options)
    with pytest.raises(ValueError, match=message):
        LinearCrossEntropy(**options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options, exception, message",
    [
        ({"shift": -1}, ValueError, "shift: expected 0 <= shift, got -1"),
        ({"shift": "a"}, TypeError, "shift: expected an integer or a bool, got 'a'"),
        ({"vocab_parallel_options": "x"}, TypeError, "vocab_parallel_options: expected .* or None, got 'x'"),
        ({"vocab_parallel_options": slice(0, 20)}, TypeError, "vocab_parallel_options: .*, got slice"),
    ],
)
def test_a_module_refuses_what_no_call_could_take(impl, options, exception, message):
    with pytest.raises(exception, match=message):
        LinearCrossEntropy(impl=impl, **options)


def test_a_module_takes_any_shift_and_rows():
    module = LinearCrossEntropy(shift=True, vocab_parallel_options=VocabParallelOptions(3, 9))
    assert module.options["shift"] is True and module.options["vocab_parallel_options"].stop == 9


def test_filter_eps_that_is_no_number():
    with pytest.raises(TypeError, match=r"filter_eps: expected a number, 'auto' or None, got \[1\]"):
        linear_cross_entropy(E, C, T, filter_eps=[1])


@pytest.mark.parametrize("impl", CCE)
@pytest.mark.parametrize("name", ["filter_e_grad", "filter_c_grad"])
def test_filters_that_are_no_flags(impl, name):
    for value in ("x", "", [True], ()):
        for call in (functools.partial(linear_cross_entropy, E, C, T), LinearCrossEntropy):
            with pytest.raises(TypeError, match=rf"{name}: expected a bool, got {re.escape(repr(value))}"):
                call(impl=impl, **{name: value})
    for value in (0, 1, np.True_):
        linear_cross_entropy(E, C, T, impl=impl, **{name: value})


def test_apples_order_of_the_modules_options():
    for more in ((), (False, False, True, True, "cce")):
        with pytest.raises(TypeError, match="return_lse: expected a bool, got 'auto'; give options by name: Apple's"):
            LinearCrossEntropy(-100, None, "mean", 0, "auto", *more)


def test_apples_names():
    """All that its two releases know: as members too, and filter_eps="high", which is "auto"."""
    e, c = E.clone().requires_grad_(), C.clone().requires_grad_()

    def gradient(**options):
        torch.manual_seed(1)
        return torch.autograd.grad(linear_cross_entropy(e, c, T, **options), (e, c))

    exact, sampled = gradient(impl="cce_exact"), gradient()
    for impl, expected in (
        ("cce_kahan_full", exact),
        ("cce_kahan_full_c_full_e", exact),
        (LinearCrossEntropyImpl.CCE_EXACT, exact),
        (LinearCrossEntropyImpl["CCE_KAHAN_FULL_C_FULL_E"], exact),
        (LinearCrossEntropyImpl.CCE, sampled),
    ):
        assert all(torch.equal(x, y) for x, y in zip(gradient(impl=impl), expected, strict=True)), impl
    assert all(torch.equal(x, y) for x, y in zip(gradient(filter_eps="high"), sampled, strict=True))
    for member in LinearCrossEntropyImpl:
        LinearCrossEntropy(impl=member)
        assert member.value == member.name.lower()
    dense = linear_cross_entropy(e, c, T, impl=LinearCrossEntropyImpl.TORCH_COMPILE)
    torch.testing.assert_close(dense, linear_cross_entropy(e, c, T))


def test_mixed_dtypes_need_autocast():
    e = torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(50, 16, requires_grad=True)
    bias = torch.randn(50, requires_grad=True)
    t = torch.randint(0, 50, (10,))
    with pytest.raises(TypeError, match="autocast"):
        linear_cross_entropy(e, c, t, bias)
    calls = [
        linear_cross_entropy,
        torch.ops.cce.linear_cross_entropy,
        lambda e, c, t, bias: torch.ops.cce.lce_forward(e, c, bias, t, torch.tensor([1]))[0].mean(),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(e, c, t, bias)
        grads = torch.autograd.grad(loss, (e, c, bias))
        assert loss.dtype == torch.float32
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
        expected = F.cross_entropy(F.linear(e, c.bfloat16(), bias.bfloat16()).float(), t)
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)


def test_upstream_gradients_scale(device):
    """A loss scale passes through, up to 2^16 in fp16 training."""
    p = peaked(50, 16, 300, device=device).leaves()
    grads = [
        torch.autograd.grad(scale * linear_cross_entropy(p.e, p.c, p.targets, impl="cce_exact"), (p.e, p.c))
        for scale in (1.0, 2.0**16)
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x * 2.0**16, y)


def test_class_weights_from_per_token_losses(device):
    p = peaked(50, 16, 300, device=device).leaves()
    weight = torch.rand(300, device=device) + 0.5
    nll = linear_cross_entropy(p.e, p.c, p.targets, reduction="none", impl="cce_exact")
    ours = (nll * weight[p.targets]).sum() / weight[p.targets].sum()
    theirs = F.cross_entropy(p.e @ p.c.T, p.targets, weight=weight)
    torch.testing.assert_close(ours, theirs)
    for x, y in zip(torch.autograd.grad(ours, (p.e, p.c)), torch.autograd.grad(theirs, (p.e, p.c)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_label_smoothing_from_loss_and_lse(device):
    p = peaked(50, 16, 300, device=device).leaves()
    nll, lse = linear_cross_entropy(p.e, p.c, p.targets, reduction="none", return_lse=True, impl="cce_exact")
    ours = (0.9 * nll + 0.1 * (lse - p.e @ p.c.mean(0))).mean()
    theirs = F.cross_entropy(p.e @ p.c.T, p.targets, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    for x, y in zip(torch.autograd.grad(ours, (p.e, p.c)), torch.autograd.grad(theirs, (p.e, p.c)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


# ---- around the loss: autocast, checkpoints, transforms ----


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl not in ("torch_compile", "reference")])
def test_backward_inside_autocast(impl):
    """Where the backward is called changes nothing: its own sums stay in fp32."""
    p = peaked(40, 16, 1000, dtype=torch.float32).leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(p.e, p.c, p.targets, impl=impl)
        inside = torch.autograd.grad(loss, (p.e, p.c), retain_graph=True)
    outside = torch.autograd.grad(loss, (p.e, p.c))
    assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints_draw_anew_each_step_and_the_same_twice(reentrant):
    """Reentrant checkpointing runs the forward without a gradient first; it is that run that moves the generator on."""
    p = peaked(200, 16, 4000)

    def gradient(loss):
        q = p.leaves()
        loss(q.e, q.c).backward()
        return q.c.grad

    def loss(e, c):
        return linear_cross_entropy(e, c, p.targets, filter_eps=2.0**-4)

    torch.manual_seed(3)
    plain = [gradient(loss) for _ in range(2)]
    torch.manual_seed(3)
    saved = [gradient(lambda e, c: checkpoint(loss, e, c, use_reentrant=reentrant)) for _ in range(2)]
    assert not torch.equal(*plain)
    assert all(torch.equal(x, y) for x, y in zip(plain, saved, strict=True))


def test_inference_leaves_the_generator_alone():
    p = peaked(20, 16, 1000).leaves()
    before = torch.get_rng_state()
    with torch.inference_mode():
        linear_cross_entropy(p.e, p.c, p.targets)
    linear_cross_entropy(p.e.detach(), p.c.detach(), p.targets)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("impl", ["cce", "cce_exact", "cce_threshold"])
def test_transforms_that_would_lose_the_gradient_are_refused(impl):
    p = peaked(20, 16, 300)

    def loss(e, impl=impl):
        return linear_cross_entropy(e, p.c, p.targets, impl=impl)

    tangent = torch.ones_like(p.e)
    with pytest.raises(NotImplementedError, match="forward-mode AD .* served by impl='reference' only"):
        torch.func.jvp(loss, (p.e,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode AD"):
        linear_cross_entropy(p.e, forward_ad.make_dual(p.c, torch.ones_like(p.c)), p.targets, impl=impl)
    two = torch.stack([p.e, 2 * p.e])
    for transformed, e in ((torch.func.grad(loss), p.e), (torch.func.vmap(torch.func.grad(loss)), two)):
        with pytest.raises(NotImplementedError, match="torch.func.grad .* served by impl='reference' only"):
            transformed(e)
    losses = torch.func.vmap(loss)(two)
    torch.testing.assert_close(losses, torch.stack([loss(p.e), loss(2 * p.e)]))

    def reference(e):
        return loss(e, "reference")

    exact = torch.func.grad(reference)(p.e)
    value, derivative = torch.func.jvp(reference, (p.e,), (tangent,))
    torch.testing.assert_close((value, derivative), (loss(p.e), (exact * tangent).sum()))
