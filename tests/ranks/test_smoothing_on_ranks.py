"""label_smoothing and class weights where the vocabulary, or the tokens, are cut over ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.sharded import (
    BATCH,
    DEVICE,
    EXACT,
    LENGTH,
    VOCAB,
    R,
    S,
    peaked,
    problem,
    rows_of,
    sequences,
    shard_of,
    two_ranks,
)
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from cce_ext import LinearCrossEntropy, linear_cross_entropy, vocab_parallel
from cce_ext.distributed import VocabParallelOptions

OPTIONS = [(0.1, False), (0.0, True), (0.3, True)]
either = pytest.mark.parametrize("s, weighted", OPTIONS, ids=["smoothed", "weighted", "both"])


def class_weights() -> torch.Tensor:
    weight = torch.rand(VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    weight[::7] = 0.0
    return weight.to(DEVICE)


def expected_of(p, s, weighted, **options):
    logits = F.linear(p.e, p.c, p.bias).flatten(0, -2)
    weight = class_weights() if weighted else None
    return F.cross_entropy(logits, p.targets.flatten(), label_smoothing=s, weight=weight, **options)


def check_shards(p, options, s, weighted, function=linear_cross_entropy, **more):
    """The loss, and gradients of e, and of this rank's rows of c and bias."""
    weight = rows_of(class_weights(), options) if weighted else None
    q, whole = shard_of(p, options), p.leaves()
    more = {"label_smoothing": s, "weight": weight, "vocab_parallel_options": options, **more}
    for reduction in ("mean", "sum", "none"):
        loss = function(q.e, q.c, q.targets, q.bias, reduction=reduction, **more)
        expected = expected_of(whole, s, weighted, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        others = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
        dist.all_gather(others, loss.detach())
        assert all(torch.equal(x, loss) for x in others)
        got, wanted = (torch.autograd.grad(x.square().sum(), y.inputs) for x, y in ((loss, q), (expected, whole)))
        for x, y in zip(got, [wanted[0], *(rows_of(y, options) for y in wanted[1:])], strict=True):
            torch.testing.assert_close(x, y)


@either
@pytest.mark.parametrize("impl", EXACT)
def test_shards(s, weighted, impl):
    check_shards(problem(), VocabParallelOptions.from_vocab(VOCAB), s, weighted, impl=impl)


@either
def test_uneven_shards(s, weighted, ranks):
    """And in another order than the ranks."""
    edges = [0, 5, VOCAB] if ranks == 2 else [0, 5, 6, 300, VOCAB]
    at = ranks - 1 - dist.get_rank()
    check_shards(problem(), VocabParallelOptions(edges[at], edges[at + 1]), s, weighted, impl="cce_exact")


@either
@two_ranks
def test_compiled_shards(s, weighted, compiles):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    check_shards(problem(), VocabParallelOptions.from_vocab(VOCAB), s, weighted, compiled, impl="cce_exact")


@either
def test_part_of_the_gradient_of_e(s, weighted):
    p = problem()
    options = replace(VocabParallelOptions.from_vocab(VOCAB), reduce_e_grad=False)
    q, whole = shard_of(p, options), p.leaves()
    more = {"label_smoothing": s, "weight": rows_of(class_weights(), options) if weighted else None}
    loss = linear_cross_entropy(q.e, q.c, q.targets, q.bias, impl="cce_exact", vocab_parallel_options=options, **more)
    (d_e,) = torch.autograd.grad(loss, q.e)
    dist.all_reduce(d_e)
    torch.testing.assert_close(d_e, torch.autograd.grad(expected_of(whole, s, weighted), whole.e)[0])


@either
def test_the_sampled_gradient_of_shards(s, weighted):
    p = problem(bias=False)
    options = VocabParallelOptions.from_vocab(VOCAB)
    q, whole = shard_of(p, options), p.leaves()
    weight = rows_of(class_weights(), options) if weighted else None
    module = LinearCrossEntropy(label_smoothing=s, weight=weight, vocab_parallel_options=options)
    loss, expected = module(q.e, q.c, q.targets), expected_of(whole, s, weighted)
    torch.testing.assert_close(loss, expected)
    got, wanted = torch.autograd.grad(loss, q.inputs), torch.autograd.grad(expected, whole.inputs)
    for x, y in zip(got, (wanted[0], rows_of(wanted[1], options)), strict=True):
        assert (x - y).norm() < 0.1 * y.norm()


@either
def test_a_rank_with_other_rows_keeps_nobody_waiting(s, weighted, ranks, monkeypatch):
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    last = dist.get_rank() == ranks - 1
    rows = [rows_of(x, options)[: -1 if last else None] for x in (p.c, class_weights())]
    for looks in (True, False):
        monkeypatch.setattr(vocab_parallel, "may_look_at", lambda targets, looks=looks: looks)
        more = {"label_smoothing": s, "weight": rows[1] if weighted else None, "vocab_parallel_options": options}
        if last or looks:
            with pytest.raises(ValueError, match="c: "):
                linear_cross_entropy(p.e, rows[0], p.targets, **more)
        else:
            assert linear_cross_entropy(p.e, rows[0], p.targets, **more).isnan()


def test_weights_of_all_rows_for_some(ranks):
    options = VocabParallelOptions.from_vocab(VOCAB)
    p = problem()
    with pytest.raises(ValueError, match=rf"weight: expected \[{options.stop - options.start}\] for c of .* \[701\]"):
        linear_cross_entropy(
            p.e, rows_of(p.c, options), p.targets, weight=class_weights(), vocab_parallel_options=options
        )


@either
def test_a_mean_over_ranks_of_other_tokens(s, weighted, ranks):
    """By the weights of all their labels. A rank without tokens has 0."""
    p = problem()
    targets = p.targets.view(ranks, -1).clone()
    targets[0] = -100
    whole = replace(p, targets=targets.flatten()).leaves()
    rank = dist.get_rank()
    e = p.e.view(ranks, -1, p.e.shape[1])[rank].clone().requires_grad_()
    weight = class_weights() if weighted else None
    part = linear_cross_entropy(
        e, p.c, targets[rank], p.bias, label_smoothing=s, weight=weight, mean_group=dist.group.WORLD, impl="cce_exact"
    )
    assert rank != 0 or part == 0
    (d_e,) = torch.autograd.grad(part, e)
    mean = part.detach() / ranks
    dist.all_reduce(mean)
    expected = expected_of(whole, s, weighted)
    torch.testing.assert_close(mean, expected.detach())
    (wanted,) = torch.autograd.grad(expected, whole.e)
    torch.testing.assert_close(d_e / ranks, wanted.view(ranks, -1, p.e.shape[1])[rank])


PLACEMENTS = [([R], [S(0)], [R]), ([S(1)], [S(0)], [S(1)]), ([S(0)], [R], [S(0)]), ([R], [R], None)]


def check_dtensors(mesh, placements, s, weighted, of_weight):
    whole = sequences(problem())
    on_e, on_c, on_targets = placements
    e, c, bias = (
        distribute_tensor(x, mesh, y).requires_grad_()
        for x, y in ((whole.e, on_e), (whole.c, on_c), (whole.bias, on_c))
    )
    targets = whole.targets if on_targets is None else distribute_tensor(whole.targets, mesh, on_targets)
    weight = of_weight(class_weights()) if weighted else None
    plain = whole.leaves()
    for reduction, shift in (("mean", 0), ("sum", 0), ("none", 0), ("mean", 1)):
        more = {"reduction": reduction, "shift": shift, "label_smoothing": s, "weight": weight}
        loss = linear_cross_entropy(e, c, targets, bias, impl="cce_exact", **more)
        assert isinstance(loss, DTensor)
        cut = replace(plain, e=plain.e[:, : LENGTH - shift], targets=plain.targets[:, shift:])
        expected = expected_of(cut, s, weighted, reduction=reduction)
        torch.testing.assert_close(loss.full_tensor().flatten(), expected.flatten())
        got = torch.autograd.grad(loss.sum(), (e, c, bias))
        for x, y in zip(got, torch.autograd.grad(expected.sum(), plain.inputs), strict=True):
            torch.testing.assert_close(x.full_tensor(), y)


@either
@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_dtensors(s, weighted, placements, mesh):
    """Weights that are plain are the whole; others come from wherever they are."""
    check_dtensors(mesh, placements, s, weighted, lambda x: x)
    if weighted:
        for placement in (R, S(0)):
            check_dtensors(mesh, placements, s, weighted, lambda x, to=placement: distribute_tensor(x, mesh, [to]))


@either
def test_dtensors_of_two_dimensions(s, weighted, mesh_2d):
    check_dtensors(mesh_2d, ([S(0), R], [R, S(0)], [S(0), R]), s, weighted, lambda x: x)


def test_mistakes_of_a_weight_beside_dtensors(mesh, mesh_2d):
    p = peaked(BATCH, 16, VOCAB)
    e, c, targets = (distribute_tensor(x, mesh, [y]) for x, y in ((p.e, R), (p.c, S(0)), (p.targets, R)))
    with pytest.raises(ValueError, match=r"weight: expected \[701\] for c of shape \[701, 16\], got \[700\]"):
        linear_cross_entropy(e, c, targets, weight=torch.ones(VOCAB - 1, device=DEVICE))
    with pytest.raises(ValueError, match="weight: expected a DTensor on c's mesh .*, got one on"):
        linear_cross_entropy(e, c, targets, weight=distribute_tensor(torch.ones(VOCAB, device=DEVICE), mesh_2d, [R, R]))
    whole = distribute_tensor(p.c, mesh, [R])
    with pytest.raises(ValueError, match="weight: expected a plain tensor like c, got a DTensor"):
        linear_cross_entropy(p.e, p.c, p.targets, weight=distribute_tensor(torch.ones(VOCAB, device=DEVICE), mesh, [R]))
    assert linear_cross_entropy(e, whole, targets, weight=torch.ones(VOCAB, device=DEVICE)).full_tensor().isfinite()
