"""The operators' gradient, and the short way that eager mode takes to their kernels: who is to see an operator does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.problems import peaked
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cce_ext.autograd
from cce_ext import linear_cross_entropy

IMPLS = ["cce", "cce_exact", "cce_threshold"]
OPERATORS = ["lce_forward", "lce_backward"]

no_gradient_twice = pytest.raises(NotImplementedError, match="cannot be differentiated again")
no_forward_mode = pytest.raises(NotImplementedError, match="forward-mode AD .* served by impl='reference' only")


def loss_and_gradients(p, **options):
    torch.manual_seed(0)
    loss, lse = linear_cross_entropy(p.e, p.c, p.targets, p.bias, return_lse=True, **options)
    wanted = [x for x in p.inputs if x.requires_grad]
    return [loss, lse, *torch.autograd.grad(loss + lse.sum(), wanted)]


@pytest.fixture
def short_way_only(monkeypatch):
    """The operators can only be called by what calls their kernels, from autocast's functions neither."""
    operators = {name: SimpleNamespace(default=getattr(torch.ops.cce, name).default) for name in OPERATORS}
    for module in (cce_ext.autograd, cce_ext.ops):
        monkeypatch.setattr(module, "ops", SimpleNamespace(**operators))


# ---- the short way ----


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", ["", "e", "c", "bias"])
def test_both_ways_give_the_same(impl, autocast, frozen, device, monkeypatch):
    p = peaked(50, 16, 3000, device=device, bias=True, ignored=0.2).leaves()
    if frozen:
        getattr(p, frozen).requires_grad_(False)
    results = []
    for short in (True, False):
        monkeypatch.setattr(cce_ext.autograd, "_has_short_way", lambda *inputs, short=short: short)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            results.append(loss_and_gradients(p, impl=impl, softcap=3.0))
    assert len(results[0]) == 2 + 3 - bool(frozen)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("autocast", [False, True])
def test_eager_mode_takes_the_short_way(impl, autocast, short_way_only):
    p = peaked(20, 16, 300, bias=True).leaves()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss_and_gradients(p, impl=impl)
        with torch.no_grad():
            linear_cross_entropy(p.e, p.c, p.targets, impl=impl)
        with torch.inference_mode():
            linear_cross_entropy(p.e, torch.nn.Parameter(p.c), p.targets, impl=impl)
        torch.ops.cce.linear_cross_entropy(p.e, p.c, p.targets, impl=impl).backward()


def test_what_the_short_way_saves_may_not_be_changed():
    p = peaked(20, 16, 300).leaves()
    for x in p.inputs:
        loss = linear_cross_entropy(p.e, p.c, p.targets)
        with torch.no_grad():
            x += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- who is to see the operators ----


class Seen:
    """What was called under it, and whether a gradient could be asked for there."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def saw(self, function):
        self.calls.append((str(function).removesuffix(".default"), torch.is_grad_enabled()))

    @property
    def operators(self):
        return [(name, grad) for name, grad in self.calls if name.startswith("cce.")]


class FunctionMode(Seen, TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.saw(function)
        return function(*args, **(kwargs or {}))


class DispatchMode(Seen, TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.saw(function)
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    seen = Seen()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.saw(function)
        return super().__torch_function__(function, types, args, kwargs)


def test_a_function_mode_sees_the_operator_with_its_gradient():
    p = peaked(20, 16, 300).leaves()
    with FunctionMode() as mode:
        linear_cross_entropy(p.e, p.c, p.targets)
    assert mode.operators == [("cce.lce_forward", True)]


def test_a_subclass_sees_the_operator_with_its_gradient():
    p = peaked(20, 16, 300).leaves()
    loss = linear_cross_entropy(p.e.as_subclass(Subclass), p.c, p.targets)
    assert type(loss) is Subclass and Subclass.seen.operators == [("cce.lce_forward", True)]


def test_a_dispatch_mode_sees_the_operators():
    p = peaked(20, 16, 300).leaves()
    with DispatchMode() as mode:
        linear_cross_entropy(p.e, p.c, p.targets).backward()
    assert [name for name, _ in mode.operators] == ["cce.lce_forward", "cce.lce_backward"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_has_the_operator():
    p = peaked(20, 16, 300).leaves()
    inputs = (p.e, p.c.detach(), p.targets)
    traced = torch.jit.trace(lambda e, c, t: linear_cross_entropy(e, c, t, impl="cce_exact"), inputs)
    assert "cce::lce_forward" in str(traced.graph)
    assert torch.equal(traced(*inputs), linear_cross_entropy(*inputs))


def test_vmap_has_the_gradient():
    p = peaked(20, 16, 300)
    e = torch.stack([p.e, 2 * p.e]).requires_grad_()

    def loss(e):
        return linear_cross_entropy(e, p.c, p.targets, impl="cce_exact")

    ours = torch.autograd.grad(torch.func.vmap(loss)(e).sum(), e)
    assert torch.equal(*ours, *torch.autograd.grad(loss(e[0]) + loss(e[1]), e))


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_make_fx_has_the_operators(tracing_mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    p = peaked(20, 16, 300).leaves()

    def gradient(e, c, targets):
        return torch.autograd.grad(linear_cross_entropy(e, c, targets), (e, c))

    graph = make_fx(gradient, tracing_mode=tracing_mode)(p.e, p.c, p.targets).graph
    names = [str(node.target) for node in graph.nodes if "cce" in str(node.target)]
    assert names == ["cce.lce_forward.default", "cce.lce_backward.default"]


def test_compiled_autograd_takes_an_eager_forward():
    torch._dynamo.reset()
    p = peaked(20, 16, 300).leaves()
    loss = linear_cross_entropy(p.e, p.c, p.targets)
    expected = torch.autograd.grad(loss, p.inputs, retain_graph=True)

    @torch.compile(backend="aot_eager")
    def backward(loss):
        loss.backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        backward(loss)
    assert all(torch.equal(x.grad, y) for x, y in zip(p.inputs, expected, strict=True))


# ---- what has no gradient ----


@pytest.mark.parametrize("inputs", [("e",), ("c",), ("bias",), ("e", "c", "bias")])
def test_no_second_derivative(inputs):
    p = peaked(5, 8, 20, bias=True).leaves()
    wanted = [getattr(p, name) for name in inputs]
    loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias)
    for g in torch.autograd.grad(loss, wanted, create_graph=True):
        with no_gradient_twice:
            g.sum().backward(retain_graph=True)


def test_operators_without_a_gradient_say_so():
    p = peaked(20, 16, 300, bias=True).leaves()
    logits = torch.ops.cce.label_logits(p.e, p.c, p.bias, p.targets)
    with pytest.raises(NotImplementedError, match="label_logits has no gradient"):
        logits.sum().backward()
    nll, lse, tile_map, *_ = torch.ops.cce.lce_forward(p.e, p.c, None, p.targets, None, method="exact")
    assert nll.requires_grad and lse.requires_grad and not tile_map.requires_grad
    arguments = (torch.ones_like(nll), None, None, p.e, p.c, None, p.targets, nll, lse, tile_map, None, None)
    d_e, _, _ = torch.ops.cce.lce_backward(*arguments, method="exact")
    with no_gradient_twice:
        d_e.sum().backward()


def dual(x):
    return forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("name", ["e", "c", "bias"])
@pytest.mark.parametrize("trains", [True, False])
def test_operators_refuse_tangents(name, trains):
    """Of forward-mode AD a tangent of 0 would be all that is left."""
    p = peaked(20, 16, 300, bias=True)
    p = p.leaves() if trains else p
    nll, lse, tile_map = (x.detach() for x in torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, None)[:3])
    with forward_ad.dual_level():
        e, c, bias = (dual(x) if name == of else x for of, x in (("e", p.e), ("c", p.c), ("bias", p.bias)))
        for call in (torch.ops.cce.linear_cross_entropy, linear_cross_entropy):
            with no_forward_mode:
                call(e, c, p.targets, bias)
        for grad_enabled in (True, False):
            with torch.set_grad_enabled(grad_enabled):
                with no_forward_mode:
                    torch.ops.cce.lce_forward(e, c, bias, p.targets, None)
                with no_forward_mode:
                    torch.ops.cce.label_logits(e, c, bias, p.targets)
                with no_forward_mode:
                    torch.ops.cce.lce_backward(
                        *(nll, None, None, e, c, bias, p.targets, nll, lse, tile_map, None, torch.tensor([1]))
                    )
    # A level at which the loss has no tangent is none of its business.
    with forward_ad.dual_level():
        dual(torch.ones(3))
        linear_cross_entropy(p.e, p.c, p.targets)


def test_forward_over_reverse_is_refused():
    p = peaked(20, 16, 300).leaves()
    loss = linear_cross_entropy(p.e, p.c, p.targets)
    with forward_ad.dual_level(), no_forward_mode:
        torch.autograd.grad(loss, p.e, dual(torch.tensor(1.0)))


def test_forward_mode_is_refused_at_any_call():
    p = peaked(20, 16, 300)
    tangents = (torch.ones_like(p.e),)
    operator = torch.ops.cce.lce_forward
    with no_forward_mode:
        torch.func.jvp(lambda e: operator(e, p.c, None, p.targets, None)[0], (p.e,), tangents)
    torch._dynamo.reset()
    with no_forward_mode:
        torch.compile(
            lambda e, t: torch.func.jvp(lambda e: linear_cross_entropy(e, p.c, p.targets), (e,), (t,)),
            backend="aot_eager",
        )(p.e, *tangents)


# ---- what is launched beside the operators ----


@pytest.mark.parametrize("shift", [0, 1])
def test_a_mean_launches_little_else(shift, device):
    p = peaked(20, 16, 300, device=device, dtype=torch.bfloat16).leaves()
    cut = ["slice", "constant_pad_nd"] if shift else []
    with DispatchMode() as mode:
        loss = linear_cross_entropy(p.e, p.c, p.targets, shift=shift)
        forward, mode.calls = mode.calls, []
        torch.autograd.grad(loss, p.inputs)
    # A view of what it saves is autograd's way to look at it.
    forward, backward = ([x.split(".")[1] for x, _ in calls if x != "aten.detach"] for calls in (forward, mode.calls))
    reduced, divided = (["reduce_nll"], []) if device == "cuda" else (["ne", "sum", "sum", "div"], ["div"])
    assert forward == [*cut, "randint", "lce_forward", *reduced]
    assert backward == ["ones_like", *divided, "expand", "lce_backward"]
