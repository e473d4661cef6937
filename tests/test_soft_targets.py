"""target_weights: several labels a token, against dense torch and F.cross_entropy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import assert_as_good_as_dense, error, peaked
from support.soft import Soft, ours, soft, theirs
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cce_ext import IMPLS, LinearCrossEntropy, classifier, compute_z_loss, linear_cross_entropy

EXACT = ["cce_exact", "reference"]
KS = [1, 3, 64]


def gradients(loss: Tensor, x: Soft, *more: Tensor, **options) -> list[Tensor]:
    """Of the losses with an upstream gradient each."""
    g = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return list(torch.autograd.grad((loss * g).sum(), (*x.p.inputs, *more), **options))


def compare(x: Soft, impl: str, **kernel) -> None:
    exact, same, q = x.to(torch.float64).leaves(), x.leaves(), x.leaves()
    results = [ours(q, impl=impl, **kernel), theirs(same, **kernel), theirs(exact, **kernel)]
    assert results[0].dtype == torch.promote_types(x.p.e.dtype, torch.float32)
    assert_as_good_as_dense(*(y.detach() for y in results), tiny=1e-5)
    for a, b, c, leaf in zip(*map(gradients, results, (q, same, exact)), q.p.inputs, strict=True):
        assert a.dtype == leaf.dtype
        # The labels' part is added to a gradient that is rounded already: one rounding more.
        assert_as_good_as_dense(a, b, c, tiny=max(5e-5, torch.finfo(a.dtype).eps / 2))


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("k", [*KS, 256])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_against_dense(impl, k, reduction, softcap, device):
    x = soft(60, 16, 700, k, dtype=torch.float64, bias=True, device=device).leaves()
    weights = x.weights.double().requires_grad_()
    x = replace(x, weights=weights)
    options = {"reduction": reduction, "softcap": softcap}
    loss, expected = ours(x, impl=impl, **options), theirs(x, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    got, wanted = gradients(loss, x), gradients(expected, x)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradient_of_the_weights(impl, k, softcap, device):
    """lse - z of each label, those of a weight of 0 included, and 0 where a label is ignored."""
    x = soft(60, 16, 700, k, dtype=torch.float64, bias=True, device=device).leaves()
    x = replace(x, weights=x.weights.double().requires_grad_())
    (got,) = torch.autograd.grad(ours(x, impl=impl, softcap=softcap, reduction="sum"), x.weights)
    logits = F.linear(x.p.e, x.p.c, x.p.bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    entries = x.targets != -100
    expected = -logits.log_softmax(1).gather(1, x.targets.clamp(min=0)).masked_fill(~entries, 0.0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities_of_all_classes(impl, reduction, device):
    """As F.cross_entropy has them."""
    p = peaked(40, 16, 90, dtype=torch.float64, bias=True, device=device).leaves()
    probabilities = torch.rand(40, 90, dtype=torch.float64, device=device).softmax(1)
    order = torch.rand(40, 90, device=device).argsort(1)
    x = Soft(p, order, probabilities.gather(1, order))
    expected = F.cross_entropy(F.linear(p.e, p.c, p.bias), probabilities, reduction=reduction)
    loss = ours(x, impl=impl, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x), gradients(expected, x))


@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "torch_compile"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_label_of_weight_one_is_the_loss_of_one_label(impl, reduction, device):
    """To the bit, the sampled gradient too; but for the mean on CUDA, which one label has from a kernel of its own."""
    p = peaked(60, 16, 3000, ignored=0.2, bias=True, device=device)
    x = Soft(p, p.targets[:, None], torch.ones(60, 1, device=device)).leaves()
    torch.manual_seed(0)
    loss = ours(x, impl=impl, reduction=reduction)
    got = gradients(loss, x)
    torch.manual_seed(0)
    expected = linear_cross_entropy(x.p.e, x.p.c, p.targets, x.p.bias, impl=impl, reduction=reduction)
    near = {"rtol": 1e-6, "atol": 1e-9} if device == "cuda" and reduction == "mean" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(loss, expected, **near)
    torch.testing.assert_close(got, gradients(expected, x), **near)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(impl, k, dtype, device):
    compare(soft(200, 40, 1500, k, dtype=dtype, bias=True, device=device), impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one_label", [False, True])
def test_past_one_block(dtype, one_label, device, monkeypatch):
    """Blocks of tokens, of labels, and of one label's tokens, with tails."""
    monkeypatch.setattr(classifier, "BLOCK_LOGITS", {"cpu": 4000, "cuda": 4000})
    x = soft(301, 24, 701, 5, dtype=dtype, bias=True, device=device)
    if one_label:
        x.targets[:, 1] = 17
    compare(x, "cce_exact")


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("n, d, v, k", [(1, 1, 1, 1), (1, 5, 1, 3), (7, 3, 2, 256), (1, 16, 300, 7)])
def test_odd_sizes(impl, n, d, v, k, device):
    compare(soft(n, d, v, k, ignored=0.0, bias=True, device=device), impl, reduction="sum")


def test_no_tokens(device):
    x = soft(4, 8, 30, 3, device=device)
    x = Soft(replace(x.p, e=x.p.e[:0]), x.targets[:0], x.weights[:0]).leaves()
    loss = ours(x, reduction="sum")
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, x.p.inputs))


def test_a_confident_token(device):
    """p - w of the heaviest label is formed before it is rounded, and in bf16 stays what it is."""
    p = peaked(32, 64, 500, dtype=torch.bfloat16, device=device)
    c = p.c.clone()
    e = (c[p.targets] * 40 / c[p.targets].float().square().sum(1, keepdim=True)).to(c.dtype)
    targets = torch.stack([p.targets, (p.targets + 1) % 500], 1)
    weights = torch.tensor([0.999, 0.001], device=device).expand(32, 2)
    x = Soft(replace(p, e=e, c=c), targets, weights)
    exact, q = x.to(torch.float64).leaves(), x.leaves()
    for a, b in zip(gradients(ours(q, impl="cce_exact"), q), gradients(theirs(exact), exact), strict=True):
        assert 0 < b.abs().max() < 0.1 and error(a, b) < 0.01


@pytest.mark.parametrize("frozen", ["e", "c", "e and c"])
def test_frozen_inputs(frozen, device):
    x = soft(60, 16, 700, 5, dtype=torch.float64, bias=True, device=device).leaves()
    for name in frozen.split(" and "):
        getattr(x.p, name).requires_grad_(False)
    wanted = [y for y in x.p.inputs if y.requires_grad]
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x), wanted) for f in (lambda y: ours(y, impl="cce_exact"), theirs))
    )


def test_a_frozen_side_costs_nothing():
    for frozen in ("e", "c"):
        x = soft(60, 16, 700, 5).leaves()
        getattr(x.p, frozen).requires_grad_(False)
        loss = ours(x)
        with Allocations() as seen:
            loss.backward()
        assert seen.calls["cce.lce_backward"][0 if frozen == "e" else 1].numel() == 0
        # Nor is the heaviest label's pair looked at.
        assert (seen.arguments["cce.add_pair_gradients"][1] < 0).any(1).all()
        *_, grad_e, grad_c, grad_bias = seen.arguments["cce.add_pair_gradients"]
        assert (grad_e is None) == (frozen == "e") and (grad_c is None) == (frozen == "c") and grad_bias is None


@pytest.mark.parametrize("impl", ["cce", "cce_threshold", "cce_kahan", "torch_compile"])
@pytest.mark.parametrize("k", [1, 5])
def test_all_impls(impl, k):
    x = soft(60, 16, 3000, k, bias=True).leaves()
    loss, expected = ours(x, impl=impl), theirs(x)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(loss, x), gradients(expected, x), strict=True):
        assert error(a, b) < (1e-4 if impl in ("torch_compile", "cce_threshold") else 0.1)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_sampled_gradient_is_unbiased(softcap):
    """Some 40 standard errors of the mean of the draws would be the bias of a factor that is left out."""
    x = soft(40, 8, 3000, 6, dtype=torch.float64, bias=True).leaves()
    options = {"softcap": softcap}
    exact = gradients(ours(x, impl="cce_exact", **options), x)
    draws: list[list[Tensor]] = []
    for seed in range(300):
        torch.manual_seed(seed)
        draws.append(gradients(ours(x, filter_eps=2.0**-3, **options), x))
    for a, b in zip(zip(*draws, strict=True), exact, strict=True):
        mean = torch.stack(a).mean(0)
        one = sum(error(d, b) ** 2 for d in a) ** 0.5 / len(a) ** 0.5
        assert one > 1e-3 and error(mean, b) < 1.5 * one / len(a) ** 0.5


def test_the_labels_force_no_visits(monkeypatch):
    """One tile a token is visited for sure, as for one label, whatever the others are."""
    from cce_ext import portable

    x = soft(50, 8, 256 * 64, 64, ignored=0.0).leaves()
    x.targets.copy_(torch.arange(64) * 256 + torch.arange(50)[:, None])
    draw, visits = portable.draw_visits, []

    def watched(*args, **options):
        visits.append(draw(*args, **options))
        return visits[-1]

    monkeypatch.setattr(portable, "draw_visits", watched)
    ours(replace(x, p=replace(x.p, e=torch.zeros_like(x.p.e).requires_grad_())), filter_eps=0.5).backward()
    assert 50 <= sum(int(v.sum()) for v in visits) < 50 * 4


@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_what_ignored_rows_hold_reaches_nothing(impl, device):
    x = soft(60, 16, 700, 5, device=device)
    x.targets[::4] = -100
    results = []
    for content in (0.0, float("nan"), float("inf")):
        e, weights = x.p.e.clone(), x.weights.clone()
        e[::4] = content
        weights[::4] = content
        weights[x.targets == -100] = content
        q = Soft(replace(x.p, e=e), x.targets, weights).leaves()
        torch.manual_seed(0)
        loss = ours(q, impl=impl, reduction="none")
        if impl == "reference":  # which does not stop what comes of the rows themselves
            results.append([loss])
            continue
        g = torch.ones_like(loss)
        g[::4] = content
        results.append([loss, *torch.autograd.grad(loss, (q.p.e, q.p.c), g)])
        assert (results[-1][1][::4] == 0).all()
    assert (results[0][0][::4] == 0).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_nothing_that_counts(impl):
    x = soft(20, 16, 300, 3)
    x = replace(x, targets=torch.full_like(x.targets, -100))
    assert (ours(x, impl=impl, reduction="none") == 0).all()
    assert ours(x, impl=impl, reduction="sum") == 0
    assert ours(x, impl=impl).isnan()


@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_a_masked_class_of_weight_zero(impl):
    """Its logit is -inf, and 0 times that would be NaN. A weight that is not 0 makes the loss inf."""
    x = soft(20, 16, 300, 3, ignored=0.0, bias=True)
    bias = x.p.bias.clone()
    bias[7] = -float("inf")
    x.targets[x.targets == 7] = 8
    x.targets[3, 2], x.weights[3, 2] = 7, 0.0
    x = replace(x, p=replace(x.p, bias=bias)).leaves()
    loss = ours(x, impl=impl, reduction="none")
    assert loss.isfinite().all()
    torch.testing.assert_close(loss, theirs(x, reduction="none"), rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients(loss, x))
    x.weights[3, 2] = 0.01
    assert ours(x, impl=impl, reduction="none").isinf().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.0, -1.0], [0.0]], ids=str)
@pytest.mark.parametrize("impl", ["cce_exact", "reference"])
def test_a_masked_class_of_weight_zero_that_is_the_heaviest(impl, weights):
    """Padding, whose weights are all 0, over a masked vocabulary."""
    e, c, bias = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8), torch.zeros(20)
    bias[5] = -float("inf")
    targets = torch.tensor([[5, 7], [6, 7], [5, 5]])[:, : len(weights)]
    given = torch.tensor([weights, [0.5] * len(weights), [0.0] * len(weights)])
    loss = linear_cross_entropy(e, c, targets, bias, target_weights=given, impl=impl, reduction="none")
    log_p = (e @ c.T + bias).log_softmax(1).gather(1, targets)
    expected = -(given * log_p).masked_fill(given == 0, 0.0).sum(1)
    torch.testing.assert_close(loss, expected)
    (mine,), (theirs,) = (torch.autograd.grad(x.sum(), e, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(mine, theirs)


def test_ignore_index_among_the_classes():
    x = soft(60, 16, 300, 5, dtype=torch.float64)
    x.targets[x.targets == -100] = 7
    x = replace(x, p=replace(x.p, ignore_index=7)).leaves()
    x.targets[::3] = 7
    loss, expected = ours(x, impl="cce_exact"), theirs(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x), gradients(expected, x))


@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_shift_lse_and_z_loss(impl, device):
    x = soft(36, 16, 300, 3, dtype=torch.float64, device=device).leaves()
    e, targets, weights = (y.view(4, 9, -1) for y in (x.p.e, x.targets, x.weights))
    cut = Soft(replace(x.p, e=e[:, :-2].flatten(0, 1)), targets[:, 2:].flatten(0, 1), weights[:, 2:].flatten(0, 1))
    for reduction in ("mean", "sum", "none"):
        more = {"reduction": reduction, "target_weights": weights}
        loss, lse = linear_cross_entropy(e, x.p.c, targets, shift=2, impl=impl, return_lse=True, **more)
        # With an ignore_index that is no class, a token's largest target says whether it counts.
        z_loss = compute_z_loss(lse, targets.amax(-1), shift=2)
        expected_lse = (cut.p.e @ x.p.c.T).logsumexp(1).masked_fill(~cut.counts, 0.0)
        torch.testing.assert_close(lse.flatten(), expected_lse)
        assert loss.shape == (() if reduction != "none" else (4, 7))
        torch.testing.assert_close(loss.flatten(), theirs(cut, reduction=reduction).flatten())
        if impl in EXACT:
            both = loss.sum() + 0.3 * z_loss
            expected = theirs(cut, reduction=reduction).sum()
            expected = expected + 0.3 * expected_lse.square().sum() / cut.counts.sum()
            torch.testing.assert_close(*(torch.autograd.grad(y, (x.p.e, x.p.c)) for y in (both, expected)))


def test_targets_out_of_range(monkeypatch):
    """An error where they are looked at, and NaN where not, as on CUDA: in the gradient too."""
    x = soft(20, 16, 300, 3, ignored=0.0)
    x.targets[3, 2], x.targets[5, 0], x.weights[5, 0] = 300, -7, 9.0
    for impl in ("cce", *EXACT):
        with pytest.raises(IndexError, match="targets: 300 at flat position 11"):
            ours(x, impl=impl)
    for module in ("calls", "ops", "pairs"):
        monkeypatch.setattr(f"cce_ext.{module}.may_look_at", lambda targets: False)
    for impl in ("cce", *EXACT):
        q = x.leaves()
        loss = ours(q, impl=impl, reduction="none")
        assert loss.isnan().nonzero().flatten().tolist() == [3, 5]
        (d_e,) = torch.autograd.grad(loss.sum(), q.p.e)
        if impl != "reference":
            assert d_e.isnan().all(1).nonzero().flatten().tolist() == [3, 5]


def test_weights_and_targets_of_any_dtype(device):
    x = soft(60, 16, 300, 5, device=device)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        y = replace(x, weights=x.weights.to(dtype), targets=x.targets.int())
        torch.testing.assert_close(ours(y), theirs(y), rtol=1e-5, atol=1e-5)


def test_module():
    x = soft(30, 16, 300, 3, bias=True)
    module = LinearCrossEntropy(impl="cce_exact", softcap=5.0)
    got = module(x.p.e, x.p.c, x.targets, x.p.bias, target_weights=x.weights)
    assert torch.equal(got, ours(x, softcap=5.0))


E, C, T, W = torch.randn(4, 8), torch.randn(20, 8), torch.zeros(4, 3).long(), torch.ones(4, 3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "targets, options, exception, message",
    [
        (T, {}, ValueError, r"targets: expected shape \[4\] .* \[4, 3\]; several labels a token need target_weights"),
        (T, {"target_weights": W.tolist()}, TypeError, "target_weights: expected a tensor, got list"),
        (T, {"target_weights": T}, TypeError, "target_weights: expected a tensor of bf16, .* got torch.int64"),
        (
            T,
            {"target_weights": W[:, :2]},
            ValueError,
            r"target_weights: expected targets' shape \[4, 3\], got \[4, 2\]",
        ),
        (
            T[:, 0],
            {"target_weights": W[:, 0]},
            ValueError,
            r"targets: with target_weights expected \[4, K\], .* got \[4\]",
        ),
        (
            T[:3],
            {"target_weights": W[:3]},
            ValueError,
            r"targets: with target_weights expected \[4, K\].* got \[3, 3\]",
        ),
        (T[:, :0], {"target_weights": W[:, :0]}, ValueError, r"targets: .* K >= 1 labels a token, .* got \[4, 0\]"),
        (T, {"target_weights": W.to("meta")}, ValueError, "target_weights: expected cpu like targets, got meta"),
        (T.float(), {"target_weights": W}, TypeError, "targets: expected int64 or int32, got torch.float32"),
        (T, {"target_weights": W, "weight": torch.ones(20)}, ValueError, "weight: expected None with target_weights"),
        (
            T.int(),
            {"target_weights": W, "ignore_index": 2**31, "shift": 1},
            ValueError,
            "ignore_index: .*, got 2147",
        ),
        (T, {"target_weights": W, "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 with target_w"),
    ],
    ids=str,
)
def test_mistakes_name_the_argument(impl, targets, options, exception, message):
    with pytest.raises(exception, match=message):
        linear_cross_entropy(E, C, targets, impl=impl, **options)


# ---- memory and order ----


class Allocations(TorchDispatchMode):
    """Storages that operations have given results in, by address; operators' results and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.calls: dict[str, tuple[Tensor, ...]] = {}
        self.arguments: dict[str, tuple[Tensor | None, ...]] = {}
        self.kept: list[Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        name = str(function).removesuffix(".default")
        self.calls[name], self.arguments[name] = results, args
        for x in results:
            if isinstance(x, Tensor):
                self.kept.append(x)
                storage = x.untyped_storage()
                self.storages[storage.data_ptr()] = storage.nbytes()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_the_inputs_size_but_their_gradients(dtype, monkeypatch):
    """The portable kernels, whose own are in sight, hold less than [N, K, D] as well."""
    monkeypatch.setattr(classifier, "BLOCK_LOGITS", {"cpu": 1 << 12})
    x = soft(512, 64, 4096, 9, dtype=dtype).leaves()
    with Allocations() as seen:
        torch.autograd.grad(ours(x, impl="cce_exact"), (x.p.e, x.p.c))
    d_e, d_c, _ = (y.untyped_storage() for y in seen.calls["cce.lce_backward"])
    assert [y.data_ptr() for y in seen.arguments["cce.add_pair_gradients"][5:7]] == [d_e.data_ptr(), d_c.data_ptr()]
    own = {y.untyped_storage().data_ptr() for y in (x.p.e, x.p.c)} | {d_e.data_ptr(), d_c.data_ptr()}
    others = {address: size for address, size in seen.storages.items() if address not in own}
    assert max(others.values()) < d_e.nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_have_one_order(dtype, device):
    """A row of c that all tokens share, and rows that a few do; with other threads beside."""
    x = soft(3000, 24, 700, 5, dtype=dtype, bias=True, device=device)
    x.targets[:, 1] = 17
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        q = x.leaves()
        g, _, order, *_ = pairs_of(q)
        out = [torch.zeros_like(y) for y in q.p.inputs]
        with torch.no_grad():
            torch.ops.cce.add_pair_gradients(g, q.targets.int(), order, q.p.e, q.p.c, *out)
        results.append(out)
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- the operators ----


def pairs_of(x: Soft) -> tuple[Tensor, Tensor, Tensor]:
    """coefficients, labels and order, as cce::add_pair_gradients takes them."""
    labels = x.targets.where(x.targets != -100, -1).int()
    return x.weights.masked_fill(labels < 0, 0.0), labels, labels.flatten().sort(stable=True).indices


def test_opcheck(device):
    x = soft(20, 16, 300, 3, bias=True, device=device)
    q = x.leaves()
    torch.library.opcheck(torch.ops.cce.pair_logits.default, (q.p.e, q.p.c, q.p.bias, x.targets), {"softcap": 3.0})
    e, c, bias = x.p.inputs
    arguments = (*pairs_of(x), e, c, *map(torch.ones_like, (e, c, bias)))
    torch.library.opcheck(
        torch.ops.cce.add_pair_gradients.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_pair_logits_by_themselves(softcap, device):
    """Their own gradient, which nothing comes back to that it could be added to."""
    x = soft(40, 16, 300, 6, dtype=torch.float64, bias=True, device=device).leaves()
    z = torch.ops.cce.pair_logits(x.p.e, x.p.c, x.p.bias, x.targets, softcap=softcap)
    logits = F.linear(x.p.e, x.p.c, x.p.bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = logits.gather(1, x.targets.clamp(min=0)).masked_fill(x.targets == -100, 0.0)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(gradients(z, x, retain_graph=True), gradients(expected, x))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        torch.autograd.grad(z.sum(), x.p.e, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_once(dtype, device, monkeypatch):
    """A label that all tokens share, in several blocks, and a token of many labels: what is there already counts."""
    monkeypatch.setattr(classifier, "BLOCK_LOGITS", {"cpu": 200})
    x = soft(1500, 16, 60, 64, ignored=0.1, dtype=dtype, bias=True, device=device)
    x.targets[:, 1::2] = 17
    g, labels, order = pairs_of(x)
    e, c, bias = x.p.inputs
    g = g.abs() * 0.1
    out = [torch.full_like(y, 2.0) for y in (e, c, bias)]
    exact = Soft(x.p.to(torch.float64), x.targets, g.double())
    expected = [y.double() for y in out]
    onehot = torch.zeros(1500, 60, dtype=torch.float64, device=e.device)
    onehot.scatter_add_(1, labels.clamp(min=0).long(), exact.weights)
    expected[0] += onehot @ exact.p.c
    expected[1] += onehot.T @ exact.p.e
    expected[2] += onehot.sum(0)
    g[labels < 0] = float("nan")
    torch.ops.cce.add_pair_gradients(g, labels, order, e, c, *out)
    for a, b in zip(out, expected, strict=True):
        assert ((a.double() - b).abs() <= 0.51 * torch.finfo(dtype).eps * b.abs() + 1e-4).all()


def test_mistakes_of_the_operator():
    x = soft(20, 16, 300, 3)
    e, c = x.p.inputs
    with pytest.raises(ValueError, match=r"targets: expected \[20, K\] .* got \[20\]"):
        torch.ops.cce.pair_logits(e, c, None, x.targets[:, 0])
    with pytest.raises(IndexError, match="targets: 300 at flat position 4"):
        torch.ops.cce.pair_logits(
            e, c, None, x.targets.index_fill(1, torch.tensor([1]), -100).where(torch.arange(60).view(20, 3) != 4, 300)
        )
    g, labels, _ = pairs_of(x)
    with pytest.raises(ValueError, match="order: expected the pairs sorted by label"):
        torch.ops.cce.add_pair_gradients(g, labels, None, e, c, None, torch.zeros_like(c), None)


# ---- around the loss: compilers, autocast, checkpoints, transforms ----


@pytest.mark.parametrize(
    "impl, dynamic", [("cce", False), ("cce_exact", True), ("cce_exact", False), ("reference", False)]
)
@pytest.mark.parametrize("k", [1, 5])
def test_compile(impl, dynamic, k):
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = soft(60, 16, 700, k, bias=True).leaves()
    x.weights.requires_grad_(impl == "cce_exact")
    more = (x.weights,) if x.weights.requires_grad else ()
    loss = compiled(x.p.e, x.p.c, x.targets, x.p.bias, impl=impl, softcap=3.0, target_weights=x.weights)
    expected = ours(x, impl="reference", softcap=3.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(loss, x, *more), gradients(expected, x, *more), strict=True):
        assert error(a, b) < (0.1 if impl == "cce" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["cce", "cce_exact"])
def test_compile_by_inductor(impl):
    torch._dynamo.reset()
    module = torch.compile(LinearCrossEntropy(impl=impl), fullgraph=True)
    x = soft(60, 16, 700, 5, bias=True).leaves()
    expected = theirs(x)
    loss = module(x.p.e, x.p.c, x.targets, x.p.bias, target_weights=x.weights)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(loss, x), gradients(expected, x), strict=True):
        assert error(a, b) < (0.1 if impl == "cce" else 1e-5)


@pytest.mark.parametrize("impl", ["cce_exact", "reference"])
def test_autocast(impl, device):
    """What is cast is cast once: the sums are those of the same rounded inputs without it, in the backward as well."""
    x = soft(60, 16, 700, 5, bias=True, device=device)
    rounded, q = x.to(torch.bfloat16).leaves(), x.leaves()
    expected = ours(rounded, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        loss = ours(q, impl=impl)
        got = gradients(loss, q)
        z = torch.ops.cce.pair_logits(q.p.e, q.p.c, q.p.bias, q.targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(z, torch.ops.cce.pair_logits(*rounded.p.inputs, q.targets))
    for a, b in zip(got, gradients(expected, rounded), strict=True):
        assert a.dtype == torch.float32 and error(a, b) < 1e-3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoints_draw_anew_each_step_and_the_same_twice(reentrant, frozen):
    x = soft(200, 16, 4000, 4)

    def gradient(run):
        e, c = x.p.e.detach().requires_grad_(), x.p.c.detach().requires_grad_(not frozen)
        options = {"filter_eps": 2.0**-4, "target_weights": x.weights}
        run(lambda e, c: linear_cross_entropy(2 * e, c, x.targets, **options), e, c).backward()
        return e.grad

    torch.manual_seed(3)
    plain = [gradient(lambda loss, *y: loss(*y)) for _ in range(2)]
    torch.manual_seed(3)
    saved = [gradient(lambda loss, *y: checkpoint(loss, *y, use_reentrant=reentrant)) for _ in range(2)]
    assert not torch.equal(*plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_a_backward_through_a_retained_graph_gives_the_same_twice():
    """What comes back is added to in place: nothing that is kept."""
    x = soft(60, 16, 700, 5, bias=True).leaves()
    loss = ours(x, impl="cce_exact")
    first = gradients(loss, x, retain_graph=True)
    kept = [y.clone() for y in first]
    for a, b, c in zip(first, gradients(loss, x), kept, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)


def test_two_losses_of_one_classifier():
    """Multi-token prediction by shift: the gradients of e and c are sums of both losses'."""
    x = soft(36, 16, 300, 3, dtype=torch.float64, bias=True).leaves()
    e, targets, weights = (y.view(4, 9, -1) for y in (x.p.e, x.targets, x.weights))

    def total(**options):
        return sum(
            linear_cross_entropy(
                e, x.p.c, targets, x.p.bias, shift=s, target_weights=weights, reduction="sum", **options
            )
            for s in (1, 2)
        )

    torch.testing.assert_close(
        *(torch.autograd.grad(total(impl=impl), x.p.inputs) for impl in ("cce_exact", "reference"))
    )


def test_a_second_derivative():
    x = soft(30, 16, 300, 5, dtype=torch.float64).leaves()

    def twice(loss):
        d_e, d_c = torch.autograd.grad(loss, (x.p.e, x.p.c), create_graph=True)
        return torch.autograd.grad(d_e.square().sum() + d_c.square().sum(), (x.p.e, x.p.c))

    torch.testing.assert_close(twice(ours(x, impl="reference")), twice(theirs(x)))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        twice(ours(x, impl="cce_exact"))


def test_transforms():
    x = soft(30, 16, 300, 5, dtype=torch.float64).leaves()

    def loss(e, impl="cce_exact"):
        return ours(replace(x, p=replace(x.p, e=e)), impl=impl)

    two = torch.stack([x.p.e, 2 * x.p.e])
    together, alone = torch.func.vmap(loss)(two), torch.stack([loss(y) for y in two])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.sum(), (x.p.e, x.p.c), retain_graph=True) for y in (together, alone))
    )
    torch.testing.assert_close(
        torch.func.grad(lambda e: loss(e, "reference"))(x.p.e), torch.autograd.grad(loss(x.p.e), x.p.e)[0]
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.p.e.detach(), torch.ones_like(x.p.e))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            loss(dual)
        tangent = forward_ad.unpack_dual(loss(dual, "reference")).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(loss(x.p.e), x.p.e)[0].sum())
