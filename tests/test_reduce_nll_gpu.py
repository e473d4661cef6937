"""cce::reduce_nll on a GPU, against fp64, and the reduction of the loss that it is."""

from __future__ import annotations

import pytest
import torch
from support.graphs import captured
from support.problems import full_of_nan, peaked
from torch import Tensor

import cce_ext.autograd
from cce_ext import linear_cross_entropy

pytestmark = pytest.mark.gpu

reduce_nll = torch.ops.cce.reduce_nll
SIZES = [1, 2, 31, 33, 1023, 1024, 1025, 5000, 1 << 20]


def inputs(n: int, ignored: float, index: torch.dtype = torch.int64, device: str = "cuda") -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, 50, (n,), device=device).to(index)
    targets[torch.rand(n, device=device) < ignored] = -100
    return torch.rand(n, device=device).exp() * (targets != -100), targets


def check(nll: Tensor, targets: Tensor, ignore_index: int = -100) -> None:
    counts = targets != ignore_index
    total = nll.double()[counts].sum()
    for mean in (False, True):
        with full_of_nan():
            loss, count = reduce_nll(nll, targets, ignore_index=ignore_index, mean=mean)
        assert loss.shape == count.shape == () and loss.dtype == count.dtype == torch.float32
        assert loss.device == count.device == nll.device and count == counts.sum()
        # One rounding of a sum in double precision.
        expected = total / counts.sum() if mean else total
        torch.testing.assert_close(loss.double(), expected, rtol=2.0**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_sizes(n, ignored, index):
    check(*inputs(n, ignored, index))


def test_nothing_counts():
    for n in (0, 3, 3000):
        nll, targets = torch.zeros(n, device="cuda"), torch.full((n,), 7, device="cuda")
        assert reduce_nll(nll, targets, ignore_index=7)[0].isnan()
        assert [x.item() for x in reduce_nll(nll, targets, ignore_index=7, mean=False)] == [0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    nll, targets = inputs(3000, 0.2)
    targets[2047], nll[2047] = 3, value
    assert all(
        reduce_nll(nll, targets, mean=mean)[0].allclose(nll.new_tensor(value), equal_nan=True) for mean in (0, 1)
    )


def test_strides():
    nll, targets = inputs(4000, 0.3)
    check(nll[::2], targets[::2])
    check(nll[:1].expand(500), targets[:1].expand(500))


def test_the_same_each_time():
    nll, targets = inputs(70000, 0.3)
    first, _ = reduce_nll(nll, targets)
    assert all(torch.equal(first, reduce_nll(nll, targets)[0]) for _ in range(5))


def test_on_the_current_stream():
    nll, targets = inputs(5000, 0.3)
    late = torch.zeros_like(nll)
    expected, _ = reduce_nll(nll, targets)  # a kernel's first launch loads it, which waits for the whole device
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(nll)
        loss, _ = reduce_nll(late, targets)
        busy = not stream.query()
    stream.synchronize()
    assert busy, "the host waited for the device"
    assert torch.equal(loss, expected)


def test_in_a_cuda_graph():
    nll, targets = inputs(5000, 0.3)
    graph, held = captured(lambda: reduce_nll(nll, targets))
    for _ in range(2):
        for old, new in zip((nll, targets), inputs(5000, 0.3), strict=True):
            old.copy_(new)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(held, reduce_nll(nll, targets), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        check(*inputs(3000, 0.3, device=device))
        assert torch.cuda.current_device() == 0


def test_errors_name_the_argument():
    nll, targets = inputs(10, 0.0)
    for message, args in (
        ("nll must be float32", (nll.double(), targets)),
        ("nll must be float32", (nll[None], targets)),
        ("targets must be .* N = 10", (nll, targets[1:])),
        ("targets must be int32 or int64", (nll, targets.float())),
        ("targets must be on nll's device", (nll, targets.cpu())),
    ):
        with pytest.raises(RuntimeError, match=message):
            reduce_nll(*args)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("short", [False, True])
def test_the_loss_and_its_gradient(short, reduction, monkeypatch):
    """As of the losses of the tokens, reduced by torch: both ways to the kernels."""
    p = peaked(300, 64, 2000, device="cuda", dtype=torch.bfloat16, ignored=0.3).leaves()
    monkeypatch.setattr(cce_ext.autograd, "_has_short_way", lambda *inputs: short)
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        if own:
            loss = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction=reduction)
        else:
            nll = linear_cross_entropy(p.e, p.c, p.targets, p.bias, reduction="none")
            loss = nll.sum() / (p.targets != -100).sum() if reduction == "mean" else nll.sum()
        results.append((loss, *torch.autograd.grad(3.0 * loss, (p.e, p.c))))
    (loss, of_e, of_c), (other, other_of_e, other_of_c) = results
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    # The gradient that flows into nll is bitwise the same, and with it the visits; dE is summed in no order.
    assert torch.equal(of_c, other_of_c)
    assert (of_e.double() - other_of_e.double()).norm() < 2e-3 * other_of_e.double().norm()
