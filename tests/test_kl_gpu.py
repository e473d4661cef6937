"""linear_kl of 16 bits on a GPU: cuBLAS's products with fp32 results, and the kernels' log-sum-exps for JSD."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.graphs import captured
from support.heads import KINDS, gradients, heads
from support.problems import assert_as_good_as_dense, error

from cce_ext import linear_kl
from cce_ext.measure import peak_memory

pytestmark = pytest.mark.gpu

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

SHAPES = [(1, 8, 1, 3), (5, 67, 300, 33), (2500, 136, 20011, 72), (600, 520, 50257, 264)]


@each_kind
@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 3), (5, 67, 300, 33), (2500, 136, 20011, 72), (600, 520, 50257, 264)], ids=str
)
def test_as_dense(kind, dtype, shape):
    """Blocks with tails on both sides. Widths that are no multiple of 8 as well."""
    h = heads(*shape, dtype=dtype, kind=kind, device="cuda", bias=True, masked=shape[0] > 1, student_softcap=20.0)
    exact, same, h = h.to(torch.float64).leaves(), h.leaves(), h.leaves()
    ours, theirs, expected = h.ours(reduction="none"), same.dense(reduction="none"), exact.dense(reduction="none")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=2e-5)
    for x, y, z in zip(gradients(ours, h), gradients(theirs, same), gradients(expected, exact), strict=True):
        assert_as_good_as_dense(x, y, z, tiny=5e-5)
        assert error(x, z) < 2 * torch.finfo(dtype).eps


@each_kind
def test_a_mean_of_many_tokens_in_fp16(kind):
    """Entries of dz over 60000 tokens are below what fp16 has. Here the tokens are all the same, and dC is one's."""
    one = heads(1, 64, 5003, 32, dtype=torch.float16, kind=kind, device="cuda")
    e, teacher_e = (x.repeat(60000, 1) for x in (one.e, one.teacher[0]))
    h, exact = replace(one, e=e, teacher=(teacher_e, *one.teacher[1:])).leaves(), one.to(torch.float64).leaves()
    (_, d_c), (_, expected) = gradients(h.ours(), h), gradients(exact.dense(), exact)
    assert error(d_c, expected) < 4 * torch.finfo(torch.float16).eps


@each_kind
def test_memory(kind):
    """Of one block each of logits, not of [N, V], which is 2 GB here in 16 bits."""
    n, d, v = 8192, 64, 131072
    g = torch.Generator("cuda").manual_seed(0)
    e, c, t, w = (torch.randn(rows, d, generator=g, device="cuda", dtype=torch.bfloat16) for rows in (n, v, n, v))
    mask = torch.arange(n, device="cuda") % 3 > 0
    e.requires_grad_()
    c.requires_grad_()
    forward = peak_memory(lambda: linear_kl(e, c, t, w, mask, kind=kind), "cuda")
    both = peak_memory(lambda: torch.autograd.grad(linear_kl(e, c, t, w, mask, kind=kind), (e, c)), "cuda")
    assert forward < 300
    assert both < 400


@each_kind
def test_cuda_graph(kind):
    """Nothing waits for the device."""
    h = heads(300, 64, 5003, 32, dtype=torch.bfloat16, kind=kind, device="cuda", masked=True).leaves()

    def step():
        loss = h.ours()
        # Detached: a loss that lives on has the leaves' gradient nodes live on, and these are of the stream that they
        # were made on, which a capture must not wait for.
        return [loss.detach(), *gradients(loss, h)]

    expected = step()
    graph, results = captured(step)
    for x in results:
        x.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(results, expected)


@each_kind
def test_in_place_of_tokens_that_do_not_count(kind):
    h = heads(300, 64, 5003, 32, dtype=torch.bfloat16, kind=kind, device="cuda", masked=True).leaves()
    loss = h.ours(reduction="none")
    d_e, d_c = torch.autograd.grad(loss, h.inputs, torch.ones_like(loss).masked_fill(~h.mask, float("nan")))
    assert d_e[~h.mask].count_nonzero() == loss[~h.mask].count_nonzero() == 0
    keep = replace(h, e=h.e[h.mask], teacher=(h.teacher[0][h.mask], *h.teacher[1:]), mask=None).leaves()
    fewer = keep.ours(reduction="none")
    wanted = torch.autograd.grad(fewer.sum(), keep.inputs)
    torch.testing.assert_close(loss[h.mask], fewer, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([d_e[h.mask], d_c], list(wanted), rtol=1e-2, atol=1e-3)
