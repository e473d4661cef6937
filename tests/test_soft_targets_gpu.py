"""cce::pair_logits, cce::add_pair_gradients and the loss of soft targets on a GPU, against fp64.

What the CPU and a GPU share is in test_soft_targets.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.graphs import captured
from support.problems import assert_as_good_as_dense, error, full_of_nan, peaked
from support.soft import Soft, ours, soft, theirs
from torch import Tensor

from cce_ext import linear_cross_entropy

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [
    (1, 1, 1, 1),
    (3, 7, 5, 3),
    (1, 8, 1, 256),
    (257, 64, 100, 3),
    (129, 65, 1000, 64),
    (33, 1000, 333, 256),
    (300, 2304, 4099, 5),
    (64, 4096, 700, 130),
    (2049, 40, 77, 1),
]


def pairs(n, d, v, k, dtype, *, shared=None, ignored=0.2):
    """e, c, bias, targets and coefficients, drawn anew; a part of the targets is -100, and all of some token's."""
    e, c, bias = (torch.randn(*size, device="cuda", dtype=torch.float64).to(dtype) for size in ((n, d), (v, d), (v,)))
    targets = torch.randint(0, v, (n, k), device="cuda")
    if shared is not None:
        targets[:, :: max(1, k // 2)] = shared % v
    targets[torch.rand(n, k, device="cuda") < ignored] = -100
    if n > 2:
        targets[n // 2] = -100
    acc = torch.promote_types(dtype, torch.float32)
    return e, c, bias, targets, torch.randn(n, k, device="cuda", dtype=acc)


def sorted_pairs(targets: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """coefficients, which are NaN where there is no label, labels and order."""
    labels = targets.where(targets >= 0, -1).int()
    return g.masked_fill(labels < 0, float("nan")), labels, labels.flatten().sort(stable=True).indices


def dense_gradients(targets: Tensor, g: Tensor, e: Tensor, c: Tensor, out: list[Tensor]) -> list[Tensor]:
    onehot = torch.zeros(len(e), len(c) + 1, dtype=torch.float64, device="cuda")
    onehot.scatter_add_(1, targets.where(targets >= 0, len(c)).long(), g.double())
    w = onehot[:, :-1]
    parts = (w @ c.double(), w.T @ e.double(), w.sum(0))
    return [x.double() + y for x, y in zip(out, parts, strict=True)]


def check_gradients(e: Tensor, c: Tensor, bias: Tensor, targets: Tensor, g: Tensor) -> list[Tensor]:
    """Within a rounding, and what fp32 sums of as many terms have."""
    start = [torch.randn(x.shape, device="cuda", dtype=torch.float64).to(x.dtype) for x in (e, c, bias)]
    out = [x.clone() for x in start]
    torch.ops.cce.add_pair_gradients(*sorted_pairs(targets, g), e, c, *out)
    for x, y in zip(out, dense_gradients(targets, g, e, c, start), strict=True):
        size = y.abs().max().item()
        rounding = 0.51 * torch.finfo(x.dtype).eps * y.abs()
        assert ((x.double() - y).abs() <= rounding + 200 * torch.finfo(g.dtype).eps * (size + 1)).all()
    # A token without labels keeps its row, to the bit, and so does a row of c without tokens.
    of_tokens, of_rows = (targets >= 0).any(1), torch.isin(torch.arange(len(c), device="cuda"), targets)
    for x, y, used in zip(out, start, (of_tokens, of_rows, of_rows), strict=True):
        assert torch.equal(x[~used], y[~used])
    return out


@pytest.mark.parametrize("n, d, v, k", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits(n, d, v, k, dtype, softcap):
    e, c, bias, targets, _ = pairs(n, d, v, k, dtype)
    c = c * d**-0.5
    targets[-1, 0] = v  # out of range
    got = torch.ops.cce.pair_logits(e, c, bias, targets, softcap=softcap)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    z = e.double() @ c.double().T + bias.double()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = z.gather(1, targets.clamp(0, v - 1)).masked_fill(targets == -100, 0.0)
    expected[-1, 0] = float("nan")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    again = torch.ops.cce.pair_logits(e, c, bias, targets.int(), softcap=softcap)
    assert torch.equal(got.nan_to_num(nan=7.0), again.nan_to_num(nan=7.0))


@pytest.mark.parametrize("n, d, v, k", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(n, d, v, k, dtype):
    check_gradients(*pairs(n, d, v, k, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n, d, v, k", [(5000, 128, 300, 3), (9000, 72, 50, 1), (40, 2050, 3, 256)])
def test_a_label_that_many_tokens_share(n, d, v, k, dtype):
    """It goes over many segments of the sorted pairs; others end and begin inside of them."""
    for shared in (0, v // 2, v - 1):
        check_gradients(*pairs(n, d, v, k, dtype, shared=shared))
    everything = pairs(n, d, v, k, dtype, ignored=0.0)
    everything[3].fill_(v - 1)
    check_gradients(*everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_labels_at_all(dtype):
    e, c, bias, targets, g = pairs(40, 64, 30, 5, dtype)
    check_gradients(e, c, bias, torch.full_like(targets, -100), g)
    assert (torch.ops.cce.pair_logits(e.fill_(float("nan")), c, bias, targets.fill_(-100)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides(dtype):
    """Rows of wider tensors at aligned and unaligned places, repeated rows, and columns."""
    n, d, v, k = 70, 200, 90, 6
    wide_e, wide_c, bias, targets, g = pairs(n, 256, v, k, dtype)
    bias = bias.repeat_interleave(2)[::2]
    for e in (wide_e[:, :d], wide_e[:, 1 : d + 1], wide_e[:, 3 : d + 2], wide_e[:1, :d].expand(n, d), wide_e[:, ::2]):
        for c in (wide_c[:, : e.shape[1]], wide_c[:, 5 : e.shape[1] + 5], wide_c[:, : e.shape[1]].t().contiguous().t()):
            check_gradients(e, c, bias.contiguous(), targets, g)
            got = torch.ops.cce.pair_logits(e, c, bias, targets)
            again = torch.ops.cce.pair_logits(e.contiguous(), c.contiguous(), bias.contiguous(), targets)
            torch.testing.assert_close(got, again, rtol=1e-4, atol=1e-4)
            strided = targets.t().contiguous().t()
            assert torch.equal(got, torch.ops.cce.pair_logits(e, c, bias, strided))


def test_each_gradient_alone():
    e, c, bias, targets, g = pairs(300, 64, 50, 7, torch.bfloat16, shared=3)
    arguments = sorted_pairs(targets, g)
    together = [torch.zeros_like(x) for x in (e, c, bias)]
    torch.ops.cce.add_pair_gradients(*arguments, e, c, *together)
    for i, x in enumerate((e, c, bias)):
        alone: list[Tensor | None] = [None, None, None]
        alone[i] = torch.zeros_like(x)
        order = None if i == 0 else arguments[2]
        torch.ops.cce.add_pair_gradients(*arguments[:2], order, e, c, *alone)
        assert torch.equal(alone[i], together[i])


def test_the_same_bits_each_time():
    e, c, bias, targets, g = pairs(20000, 264, 500, 8, torch.bfloat16, shared=17)
    results = []
    for _ in range(5):
        out = [torch.zeros_like(x) for x in (e, c, bias)]
        torch.ops.cce.add_pair_gradients(*sorted_pairs(targets, g), e, c, *out)
        results.append([*out, torch.ops.cce.pair_logits(e, c, bias, targets)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, 256])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_loss(dtype, k, softcap):
    """Scratch memory and outputs begin as NaN."""
    x = soft(700, 136, 3001, k, dtype=dtype, bias=True, device="cuda")
    exact, same, q = x.to(torch.float64).leaves(), x.leaves(), x.leaves()
    with full_of_nan():
        loss = ours(q, impl="cce_exact", softcap=softcap)
        got = torch.autograd.grad(loss, q.p.inputs)
    results = [theirs(y, softcap=softcap) for y in (same, exact)]
    assert_as_good_as_dense(loss.detach(), *(y.detach() for y in results), tiny=1e-5)
    wanted = (torch.autograd.grad(y, z.p.inputs) for y, z in zip(results, (same, exact), strict=True))
    for a, b, c in zip(got, *wanted, strict=True):
        # What is rounded before the labels' part is added can be a few times the whole.
        assert_as_good_as_dense(a, b, c, tiny=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("k", [3, 64])
def test_the_sampled_gradient(k):
    x = soft(1000, 128, 20000, k, dtype=torch.bfloat16, device="cuda")
    exact = x.to(torch.float64).leaves()
    wanted = torch.autograd.grad(theirs(exact), exact.p.inputs)
    draws = []
    for seed in range(8):
        torch.manual_seed(seed)
        q = x.leaves()
        draws.append(torch.autograd.grad(ours(q), q.p.inputs))
    for i, y in enumerate(wanted):
        one = error(draws[0][i], y)
        mean = error(torch.stack([d[i].double() for d in draws]).mean(0), y)
        assert one < 0.2 and mean < max(0.6 * one, 0.01)


def test_ignored_rows_may_hold_anything():
    x = soft(500, 64, 3000, 5, dtype=torch.bfloat16, device="cuda")
    x.targets[::3] = -100
    results = []
    for content in (0.0, float("nan"), float("inf")):
        e = x.p.e.clone()
        e[::3] = content
        q = replace(x, p=replace(x.p, e=e)).leaves()
        torch.manual_seed(0)
        loss = ours(q, impl="cce_exact", reduction="none")
        g = torch.ones_like(loss)
        g[::3] = content
        results.append([loss, *torch.autograd.grad(loss, (q.p.e, q.p.c), g)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_targets_out_of_range_show():
    """In the loss and in the token's gradient, as for one label."""
    x = soft(50, 64, 300, 4, ignored=0.0, dtype=torch.bfloat16, device="cuda")
    x.targets[3, 2], x.targets[5, 0] = 300, -7
    q = x.leaves()
    loss = ours(q, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3, 5]
    (d_e,) = torch.autograd.grad(loss.sum(), q.p.e)
    assert d_e[[3, 5]].isnan().all() and not d_e[[0, 1, 2, 4, 6]].isnan().any()


def test_another_stream():
    x = soft(2000, 256, 3000, 8, dtype=torch.bfloat16, device="cuda").leaves()
    expected = torch.autograd.grad(ours(x, impl="cce_exact"), x.p.inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        e, c = (y.detach().clone().requires_grad_() for y in x.p.inputs)
        q = replace(x, p=replace(x.p, e=e, c=c))
        got = torch.autograd.grad(ours(q, impl="cce_exact"), (e, c))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_cuda_graph():
    """Nothing waits for the device, and other labels in the same memory have other gradients."""
    x = soft(300, 64, 1000, 5, dtype=torch.bfloat16, bias=True, device="cuda").leaves()

    def step():
        loss = ours(x, impl="cce_exact")
        return [loss.detach(), *torch.autograd.grad(loss, x.p.inputs)]

    graph, results = captured(step)
    for seed in (3, 4):
        other = soft(300, 64, 1000, 5, dtype=torch.bfloat16, bias=True, device="cuda", seed=seed)
        with torch.no_grad():
            x.targets.copy_(other.targets)
            x.weights.copy_(other.weights)
        graph.replay()
        for a, b in zip(results, step(), strict=True):
            assert torch.equal(a, b)


def test_no_memory_of_the_gradients_size():
    """Beside the gradients and what one label needs: [N, K] numbers, and the sums at the edges of segments."""
    n, d, v, k = 4096, 1024, 32768, 64
    p = peaked(n, d, v, dtype=torch.bfloat16, device="cuda")
    x = Soft(p, torch.randint(0, v, (n, k), device="cuda"), torch.rand(n, k, device="cuda"))

    def peak(step) -> int:
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def one():
        q = p.leaves()
        torch.autograd.grad(linear_cross_entropy(q.e, q.c, q.targets, impl="cce_exact"), (q.e, q.c))

    def several():
        q = x.leaves()
        torch.autograd.grad(ours(q, impl="cce_exact"), (q.p.e, q.p.c))

    edges = 512 * 2 * d * 4
    assert peak(several) < peak(one) + edges + 80 * n * k


def test_mistakes_name_the_argument():
    e, c, bias, targets, g = pairs(20, 16, 30, 3, torch.bfloat16)
    g, labels, order = sorted_pairs(targets, g)
    out = [torch.zeros_like(x) for x in (e, c, bias)]
    for message, arguments in (
        ("labels must be int32 and contiguous", (g, labels.long(), order, e, c, *out)),
        (r"labels must be \[N, K\]", (g, labels[:-1], order, e, c, *out)),
        ("coefficients must be contiguous float32", (g.double(), labels, order, e, c, *out)),
        ("order must be contiguous int64", (g, labels, order[:-1], e, c, *out)),
        ("order must be .* but is None", (g, labels, None, e, c, *out)),
        ("grad_c must be contiguous", (g, labels, order, e, c, out[0], out[1].float(), out[2])),
        ("grad_e must be contiguous", (g, labels, order, e, c, out[0].t().contiguous().t(), *out[1:])),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.cce.add_pair_gradients(*arguments)
    with pytest.raises(RuntimeError, match=r"targets must be \[N, K\]"):
        torch.ops.cce.pair_logits(e, c, bias, targets[:, 0])
