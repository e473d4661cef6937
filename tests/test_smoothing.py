"""label_smoothing and class weights: the numbers and gradients of F.cross_entropy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.problems import Problem, assert_as_good_as_dense, error, peaked
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cce_ext import IMPLS, LinearCrossEntropy, compute_z_loss, linear_cross_entropy, smoothing

EXACT = ["cce_exact", "reference"]
OPTIONS = [(0.1, False), (0.0, True), (0.3, True)]
either = pytest.mark.parametrize("s, weighted", OPTIONS, ids=["smoothed", "weighted", "both"])


def class_weights(v: int, seed: int = 5) -> Tensor:
    """Some are 0, and one is below: F.cross_entropy takes what it is given."""
    weight = torch.rand(v, generator=torch.Generator().manual_seed(seed)) + 0.1
    weight[::7] = 0.0
    weight[3] = -0.5
    return weight


def arguments(p: Problem, s: float, weighted: bool) -> dict[str, object]:
    return {"label_smoothing": s, "weight": class_weights(len(p.c)).to(p.e.device) if weighted else None}


def theirs(p: Problem, *, softcap=None, weight=None, **options) -> Tensor:
    """F.cross_entropy of dense logits of p, which it is given in fp32 or fp64."""
    logits = F.linear(p.e, p.c, p.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(logits, p.targets.long(), weight=weight, ignore_index=p.ignore_index, **options)


def ours(p: Problem, **options) -> Tensor:
    return linear_cross_entropy(p.e, p.c, p.targets, p.bias, ignore_index=p.ignore_index, **options)


def gradients(loss: Tensor, p: Problem, **options) -> list[Tensor]:
    """Of the losses with an upstream gradient each."""
    g = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return list(torch.autograd.grad((loss * g).sum(), p.inputs, **options))


def compare(p: Problem, impl: str, options: dict[str, object], **kernel) -> None:
    exact, same, q = p.to(torch.float64).leaves(), p.leaves(), p.leaves()
    results = [ours(q, impl=impl, **options, **kernel), theirs(same, **options), theirs(exact, **options)]
    assert results[0].dtype == torch.promote_types(p.e.dtype, torch.float32)
    assert_as_good_as_dense(*(x.detach() for x in results), tiny=1e-5)
    for x, y, z, leaf in zip(*map(gradients, results, (q, same, exact)), q.inputs, strict=True):
        assert x.dtype == leaf.dtype
        # The two parts nearly cancel where p is near 1, and p has the rounding of a lse, not that of a maximum.
        assert_as_good_as_dense(x, y, z, tiny=5e-5)


@either
@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_as_cross_entropy(s, weighted, impl, reduction, ignored, device):
    p = peaked(60, 16, 700, dtype=torch.float64, ignored=ignored, bias=True, device=device).leaves()
    options = {"reduction": reduction, **arguments(p, s, weighted)}
    loss, expected = ours(p, impl=impl, **options), theirs(p, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(loss, p), gradients(expected, p), rtol=1e-9, atol=1e-11)


@either
@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(s, weighted, impl, dtype, device):
    p = peaked(200, 40, 1500, dtype=dtype, ignored=0.2, bias=True, device=device)
    compare(p, impl, arguments(p, s, weighted))


@either
def test_past_one_block(s, weighted, device, monkeypatch):
    """Rows of e, of c and of their gradients in several blocks, with tails."""
    monkeypatch.setattr(smoothing, "_BLOCK_ENTRIES", {"cpu": 300, "cuda": 300})
    for dtype in (torch.float32, torch.bfloat16):
        p = peaked(61, 16, 701, dtype=dtype, ignored=0.3, device=device)
        compare(p, "cce_exact", arguments(p, s, weighted))


@either
@pytest.mark.parametrize("frozen", ["e", "c", "e and c"])
def test_frozen_inputs(s, weighted, frozen, device):
    p = peaked(60, 16, 700, dtype=torch.float64, bias=True, device=device).leaves()
    for name in frozen.split(" and "):
        getattr(p, name).requires_grad_(False)
    wanted = [x for x in p.inputs if x.requires_grad]
    options = arguments(p, s, weighted)
    got, expected = (
        torch.autograd.grad(x, wanted) for x in (ours(p, impl="cce_exact", **options), theirs(p, **options))
    )
    torch.testing.assert_close(got, expected)


@either
def test_a_frozen_side_costs_nothing(s, weighted):
    """Its gradient is not computed on the way."""
    for frozen in ("e", "c"):
        p = peaked(60, 16, 700).leaves()
        getattr(p, frozen).requires_grad_(False)
        loss = ours(p, **arguments(p, s, weighted))
        with Allocations() as seen:
            loss.backward()
        assert "cce.lce_backward" in seen.calls
        assert seen.calls["cce.lce_backward"][0 if frozen == "e" else 1].numel() == 0


@either
def test_class_weights_with_softcap(s, weighted, device):
    p = peaked(60, 16, 700, dtype=torch.float64, device=device).leaves()
    options = {**arguments(p, s, weighted), "softcap": 3.0}
    if s:
        for impl in IMPLS:
            with pytest.raises(ValueError, match="label_smoothing: expected 0 with softcap=3.0, got"):
                ours(p, impl=impl, **options)
        with pytest.raises(ValueError, match="label_smoothing: expected 0 with softcap=3.0, got"):
            LinearCrossEntropy(**options)
        return
    loss, expected = ours(p, impl="cce_exact", **options), theirs(p, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, p), gradients(expected, p))


@either
@pytest.mark.parametrize("impl", ["cce", "cce_threshold", "cce_kahan", "torch_compile"])
def test_all_impls(s, weighted, impl):
    p = peaked(60, 16, 3000, ignored=0.2, bias=True).leaves()
    options = arguments(p, s, weighted)
    loss, expected = ours(p, impl=impl, **options), theirs(p, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(loss, p), gradients(expected, p), strict=True):
        assert error(x, y) < (1e-4 if impl in ("torch_compile", "cce_threshold") else 0.1)


@either
def test_the_sampled_gradient_is_unbiased(s, weighted):
    """Some 40 standard errors of the mean of the draws would be the bias of a factor that is left out."""
    p = peaked(40, 8, 3000, dtype=torch.float64, ignored=0.2, bias=True).leaves()
    options = arguments(p, s, weighted)
    exact = gradients(ours(p, impl="cce_exact", **options), p)
    draws: list[list[Tensor]] = []
    for seed in range(300):
        torch.manual_seed(seed)
        draws.append(gradients(ours(p, filter_eps=2.0**-3, **options), p))
    for x, y in zip(zip(*draws, strict=True), exact, strict=True):
        mean = torch.stack(x).mean(0)
        one = sum(error(d, y) ** 2 for d in x) ** 0.5 / len(x) ** 0.5
        assert one > 1e-3 and error(mean, y) < 1.5 * one / len(x) ** 0.5


@either
@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_what_ignored_rows_hold_reaches_nothing(s, weighted, impl, device):
    p = peaked(60, 16, 700, device=device)
    p.targets[::4] = -100
    options = {**arguments(p, s, weighted), "reduction": "none"}
    results = []
    for content in (0.0, float("nan"), float("inf")):
        e = p.e.clone()
        e[::4] = content
        q = replace(p, e=e).leaves()
        torch.manual_seed(0)
        loss = ours(q, impl=impl, **options)
        if impl == "reference":  # which does not stop what comes of the rows themselves
            results.append([loss])
            continue
        g = torch.ones_like(loss)
        g[::4] = content
        results.append([loss, *torch.autograd.grad(loss, (q.e, q.c), g)])
        assert (results[-1][1][::4] == 0).all()
    assert (results[0][0][::4] == 0).all()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@either
@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_nothing_that_counts(s, weighted, impl):
    """Ignored tokens alone, and labels of a weight of 0: no number in the mean, as in F.cross_entropy."""
    p = peaked(20, 16, 300)
    options = arguments(p, s, weighted)
    for targets in (torch.full_like(p.targets, -100), p.targets.new_zeros(p.targets.shape)):
        q = replace(p, targets=targets)
        for reduction in ("mean", "sum", "none"):
            loss, expected = (of(q, reduction=reduction, **options) for of in (partial(ours, impl=impl), theirs))
            if expected.isfinite().all():
                torch.testing.assert_close(loss, expected)
            else:
                assert reduction == "mean" and not loss.isfinite()


@either
def test_ignore_index_among_the_classes(s, weighted):
    p = replace(peaked(60, 16, 300, dtype=torch.float64), ignore_index=7).leaves()
    p.targets[::3] = 7
    options = arguments(p, s, weighted)
    loss, expected = ours(p, impl="cce_exact", **options), theirs(p, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, p), gradients(expected, p))


@either
@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_shift_lse_and_z_loss(s, weighted, impl, device):
    p = peaked(36, 16, 300, dtype=torch.float64, ignored=0.2, device=device).leaves()
    e, targets = p.e.view(4, 9, 16), p.targets.view(4, 9)
    options = arguments(p, s, weighted)
    cut = replace(p, e=e[:, :-2].flatten(0, 1), targets=targets[:, 2:].flatten())
    for reduction in ("mean", "sum", "none"):
        more = {"reduction": reduction, **options}
        loss, lse = linear_cross_entropy(e, p.c, targets, shift=2, impl=impl, return_lse=True, **more)
        z_loss = compute_z_loss(lse, targets, shift=2)
        counts = cut.targets != -100
        expected_lse = (cut.e @ p.c.T).logsumexp(1).masked_fill(~counts, 0.0)
        torch.testing.assert_close(lse.flatten(), expected_lse)
        torch.testing.assert_close(loss.flatten(), theirs(cut, **more).flatten())
        if impl in EXACT:
            both = loss.sum() + 0.3 * z_loss
            expected = theirs(cut, **more).sum() + 0.3 * expected_lse.square().sum() / counts.sum()
            torch.testing.assert_close(*(torch.autograd.grad(x, (p.e, p.c)) for x in (both, expected)))


@either
def test_targets_out_of_range(s, weighted, monkeypatch):
    """An error where they are looked at, and NaN where not, as on CUDA: never a weight that is not there."""
    p = peaked(20, 16, 300)
    p.targets[3], p.targets[5] = 300, -7
    options = {**arguments(p, s, weighted), "reduction": "none"}
    for impl in ("cce", *EXACT):
        with pytest.raises(IndexError, match="targets: 300 at flat position 3"):
            ours(p, impl=impl, **options)
    monkeypatch.setattr("cce_ext.calls.may_look_at", lambda targets: False)
    monkeypatch.setattr("cce_ext.ops.may_look_at", lambda targets: False)
    for impl in ("cce", *EXACT):
        assert ours(p, impl=impl, **options).isnan().nonzero().flatten().tolist() == [3, 5]


def test_weights_of_any_float_dtype(device):
    p = peaked(60, 16, 300, device=device)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        weight = class_weights(300).to(device, dtype)
        options = {"weight": weight, "label_smoothing": 0.1}
        torch.testing.assert_close(ours(p, **options), theirs(p, **options), rtol=1e-5, atol=1e-5)


def test_module():
    """Its weight moves with it, as nn.CrossEntropyLoss's does."""
    p = peaked(30, 16, 300, bias=True)
    options = arguments(p, 0.1, True)
    module = LinearCrossEntropy(**options, impl="cce_exact")
    assert torch.equal(module(p.e, p.c, p.targets, p.bias), ours(p, **options))
    assert list(module.state_dict()) == ["weight"] == list(nn.CrossEntropyLoss(options["weight"]).state_dict())
    assert module.to("meta").weight.device.type == "meta"
    assert "label_smoothing=0.1" in repr(module) and "weight=[300]" in repr(module)
    assert not LinearCrossEntropy().state_dict() and "weight" not in repr(LinearCrossEntropy())


E, C, T = torch.randn(4, 8), torch.randn(20, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options, exception, message, of_module",
    [
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: expected a number in \[0, 1\), got -0.1", True),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing: .* got 1.0", True),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: .* got nan", True),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing: .* got '0.1'", True),
        ({"label_smoothing": None}, TypeError, "label_smoothing: .* got None", True),
        ({"weight": [1.0] * 20}, TypeError, "weight: expected a tensor, got list", True),
        ({"weight": torch.ones(20).long()}, TypeError, "weight: expected a tensor of bf16, .* got torch.int64", True),
        ({"weight": torch.ones(20, 1)}, ValueError, r"weight: expected \[V\], .* got \[20, 1\]", True),
        ({"weight": torch.ones(20, requires_grad=True)}, ValueError, "weight: .* requires no gradient", True),
        ({"weight": torch.ones(19)}, ValueError, r"weight: expected \[20\] for c of .* got \[19\]", False),
        ({"weight": torch.ones(20, device="meta")}, ValueError, "weight: expected cpu like e, got meta", False),
    ],
    ids=str,
)
def test_mistakes_name_the_argument(impl, options, exception, message, of_module):
    with pytest.raises(exception, match=message):
        linear_cross_entropy(E, C, T, impl=impl, **options)
    if of_module:
        with pytest.raises(exception, match=message):
            LinearCrossEntropy(impl=impl, **options)


# ---- memory ----


class Allocations(TorchDispatchMode):
    """Storages that operations have given results in, by address, and the operators' results by name."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.calls: dict[str, tuple[Tensor, ...]] = {}
        self.kept: list[Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.calls[str(function).removesuffix(".default")] = results
        for x in results:
            if isinstance(x, Tensor):
                self.kept.append(x)
                storage = x.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
        return out


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_the_classifiers_size_but_its_gradient(s, weighted, dtype, monkeypatch):
    """Nor of e's. Blocks are smaller than either, as they are at full size."""
    monkeypatch.setattr(smoothing, "_BLOCK_ENTRIES", {"cpu": 1 << 12})
    p = peaked(512, 64, 4096, dtype=dtype).leaves()
    with Allocations() as seen:
        torch.autograd.grad(ours(p, impl="cce_exact", **arguments(p, s, weighted)), (p.e, p.c))
    d_e, d_c, _ = (x.untyped_storage() for x in seen.calls["cce.lce_backward"])
    own = {x.untyped_storage().data_ptr() for x in (p.e, p.c)} | {d_e.data_ptr(), d_c.data_ptr()}
    others = {address: size for address, size in seen.storages.items() if address not in own}
    assert max(others.values()) < d_e.nbytes()


# ---- around the loss: compilers, autocast, checkpoints, transforms ----


@either
@pytest.mark.parametrize("impl, dynamic", [("cce", False), ("cce_exact", True), ("reference", False)])
def test_compile(s, weighted, impl, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    p = peaked(60, 16, 700, ignored=0.2, bias=True).leaves()
    options = arguments(p, s, weighted)
    loss, expected = compiled(p.e, p.c, p.targets, p.bias, impl=impl, **options), theirs(p, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(loss, p), gradients(expected, p), strict=True):
        assert error(x, y) < (0.1 if impl == "cce" else 1e-5)


@pytest.mark.slow
def test_compile_by_inductor():
    torch._dynamo.reset()
    module = torch.compile(LinearCrossEntropy(label_smoothing=0.1, weight=class_weights(700)), fullgraph=True)
    p = peaked(60, 16, 700, ignored=0.2, bias=True).leaves()
    expected = theirs(p, **arguments(p, 0.1, True))
    loss = module(p.e, p.c, p.targets, p.bias)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(gradients(loss, p), gradients(expected, p), strict=True):
        assert error(x, y) < 0.1


@either
@pytest.mark.parametrize("impl", ["cce_exact", "reference"])
def test_autocast(s, weighted, impl, device):
    """What is cast is cast once: the sums are those of the same rounded inputs without it, in the backward as well."""
    p = peaked(60, 16, 700, ignored=0.2, bias=True, device=device)
    options = arguments(p, s, weighted)
    rounded, q = p.to(torch.bfloat16).leaves(), p.leaves()
    expected = ours(rounded, impl=impl, **options)
    with torch.autocast(device, torch.bfloat16):
        loss = ours(q, impl=impl, **options)
        got = gradients(loss, q)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for x, y in zip(got, gradients(expected, rounded), strict=True):
        assert x.dtype == torch.float32 and error(x, y) < 1e-3


@either
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoints_draw_anew_each_step_and_the_same_twice(s, weighted, reentrant, frozen):
    p = peaked(200, 16, 4000)
    options = {**arguments(p, s, weighted), "filter_eps": 2.0**-4}

    def gradient(run):
        e, c = p.e.detach().requires_grad_(), p.c.detach().requires_grad_(not frozen)
        run(lambda e, c: linear_cross_entropy(2 * e, c, p.targets, **options), e, c).backward()
        return e.grad

    torch.manual_seed(3)
    plain = [gradient(lambda loss, *x: loss(*x)) for _ in range(2)]
    torch.manual_seed(3)
    saved = [gradient(lambda loss, *x: checkpoint(loss, *x, use_reentrant=reentrant)) for _ in range(2)]
    assert not torch.equal(*plain)
    assert all(torch.equal(x, y) for x, y in zip(plain, saved, strict=True))


@either
def test_a_backward_through_a_retained_graph_gives_the_same_twice(s, weighted):
    """What comes back is added to in place: nothing that is kept."""
    p = peaked(60, 16, 700, bias=True).leaves()
    loss = ours(p, impl="cce_exact", **arguments(p, s, weighted))
    first = gradients(loss, p, retain_graph=True)
    kept = [x.clone() for x in first]
    second = gradients(loss, p)
    for x, y, z in zip(first, second, kept, strict=True):
        assert torch.equal(x, z) and torch.equal(y, z)


@either
def test_a_second_derivative(s, weighted):
    p = peaked(30, 16, 300, dtype=torch.float64).leaves()
    options = arguments(p, s, weighted)

    def twice(loss):
        d_e, d_c = torch.autograd.grad(loss, (p.e, p.c), create_graph=True)
        return torch.autograd.grad(d_e.square().sum() + d_c.square().sum(), (p.e, p.c))

    torch.testing.assert_close(twice(ours(p, impl="reference", **options)), twice(theirs(p, **options)))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        twice(ours(p, impl="cce_exact", **options))


@either
def test_transforms(s, weighted):
    p = peaked(30, 16, 300, dtype=torch.float64).leaves()
    options = arguments(p, s, weighted)

    def loss(e, impl="cce_exact"):
        return linear_cross_entropy(e, p.c, p.targets, impl=impl, **options)

    two = torch.stack([p.e, 2 * p.e])
    together, alone = torch.func.vmap(loss)(two), torch.stack([loss(x) for x in two])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), (p.e, p.c), retain_graph=True) for x in (together, alone))
    )
    torch.testing.assert_close(
        torch.func.grad(lambda e: loss(e, "reference"))(p.e), torch.autograd.grad(loss(p.e), p.e)[0]
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p.e.detach(), torch.ones_like(p.e))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            loss(dual)
        tangent = forward_ad.unpack_dual(loss(dual, "reference")).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(loss(p.e), p.e)[0].sum())
