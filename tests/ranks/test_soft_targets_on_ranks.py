"""Several labels a token where the vocabulary, or the tokens, are cut over ranks."""

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
    WIDTH,
    R,
    S,
    assert_same_everywhere,
    rows_of,
    shard_of,
    two_ranks,
)
from support.soft import Soft, ours, soft, theirs
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from cce_ext import linear_cross_entropy, vocab_parallel
from cce_ext.distributed import VocabParallelOptions

several = pytest.mark.parametrize("k", [1, 5])


def problem(k: int = 5, **options) -> Soft:
    options = {"dtype": torch.float64, "device": DEVICE, "bias": True, **options}
    return soft(BATCH * LENGTH, WIDTH, VOCAB, k, **options)


def check_shards(x, options, function=linear_cross_entropy, softcap=None, **more):
    """The loss, and gradients of e, and of this rank's rows of c and bias."""
    q, whole = shard_of(x.p, options), x.leaves()
    more = {"softcap": softcap, "target_weights": x.weights, "vocab_parallel_options": options, **more}
    for reduction in ("mean", "sum", "none"):
        loss = function(q.e, q.c, x.targets, q.bias, reduction=reduction, **more)
        expected = theirs(whole, reduction=reduction, softcap=softcap)
        torch.testing.assert_close(loss, expected)
        assert_same_everywhere(loss.detach())
        got, wanted = (torch.autograd.grad(y.square().sum(), z.inputs) for y, z in ((loss, q), (expected, whole.p)))
        for a, b in zip(got, [wanted[0], *(rows_of(y, options) for y in wanted[1:])], strict=True):
            torch.testing.assert_close(a, b)


@several
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("impl", EXACT)
def test_shards(k, impl, softcap):
    check_shards(problem(k), VocabParallelOptions.from_vocab(VOCAB), impl=impl, softcap=softcap)


@several
def test_uneven_shards(k, ranks):
    """And in another order than the ranks."""
    edges = [0, 5, VOCAB] if ranks == 2 else [0, 5, 6, 300, VOCAB]
    at = ranks - 1 - dist.get_rank()
    check_shards(problem(k), VocabParallelOptions(edges[at], edges[at + 1]), impl="cce_exact")


@several
def test_no_tokens(k):
    options = VocabParallelOptions.from_vocab(VOCAB)
    c = torch.randn(options.stop - options.start, WIDTH, device=DEVICE, requires_grad=True)
    targets = torch.zeros(0, k, dtype=torch.int64, device=DEVICE)
    more = {"target_weights": torch.ones(0, k, device=DEVICE), "vocab_parallel_options": options}
    loss = linear_cross_entropy(torch.zeros(0, WIDTH, device=DEVICE), c, targets, reduction="sum", **more)
    loss.backward()
    assert loss == 0 and c.grad.count_nonzero() == 0


@two_ranks
def test_compiled_shards(compiles):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    check_shards(problem(), VocabParallelOptions.from_vocab(VOCAB), compiled, impl="cce_exact")


def test_part_of_the_gradient_of_e():
    x = problem()
    options = replace(VocabParallelOptions.from_vocab(VOCAB), reduce_e_grad=False)
    q, whole = shard_of(x.p, options), x.leaves()
    more = {"impl": "cce_exact", "vocab_parallel_options": options, "target_weights": x.weights}
    (d_e,) = torch.autograd.grad(linear_cross_entropy(q.e, q.c, x.targets, q.bias, **more), q.e)
    dist.all_reduce(d_e)
    torch.testing.assert_close(d_e, torch.autograd.grad(theirs(whole), whole.p.e)[0])


def test_the_sampled_gradient_of_shards():
    x = problem(bias=False)
    options = VocabParallelOptions.from_vocab(VOCAB)
    q, whole = shard_of(x.p, options), x.leaves()
    loss = linear_cross_entropy(q.e, q.c, x.targets, target_weights=x.weights, vocab_parallel_options=options)
    torch.testing.assert_close(loss, theirs(whole))
    got, wanted = torch.autograd.grad(loss, q.inputs), torch.autograd.grad(theirs(whole), whole.p.inputs)
    for a, b in zip(got, (wanted[0], rows_of(wanted[1], options)), strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


def test_a_rank_with_other_rows_keeps_nobody_waiting(ranks, monkeypatch):
    x = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    last = dist.get_rank() == ranks - 1
    rows = rows_of(x.p.c, options)[: -1 if last else None]
    more = {"target_weights": x.weights, "vocab_parallel_options": options}
    for looks in (True, False):
        for module in ("vocab_parallel", "soft_targets"):
            monkeypatch.setattr(f"cce_ext.{module}.may_look_at", lambda targets, looks=looks: looks)
        if last or looks:
            with pytest.raises(ValueError, match="c: "):
                linear_cross_entropy(x.p.e, rows, x.targets, **more)
        else:
            assert linear_cross_entropy(x.p.e, rows, x.targets, **more).isnan()


def test_labels_in_no_rank(monkeypatch):
    x = problem()
    x.targets[3, 2], x.weights[3, 2] = VOCAB, 0.0
    options = VocabParallelOptions.from_vocab(VOCAB)
    q = shard_of(x.p, options)
    more = {"target_weights": x.weights, "vocab_parallel_options": options, "reduction": "none", "impl": "cce_exact"}
    with pytest.raises(
        IndexError, match=rf"targets: one of .*{VOCAB}.* of the token at flat position 3, is in no rank"
    ):
        linear_cross_entropy(q.e, q.c, x.targets, q.bias, **more)
    for module in ("vocab_parallel", "soft_targets"):
        monkeypatch.setattr(f"cce_ext.{module}.may_look_at", lambda targets: False)
    loss = linear_cross_entropy(q.e, q.c, x.targets, q.bias, **more)
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    (d_e,) = torch.autograd.grad(loss.sum(), q.e)
    assert d_e.isnan().all(1).nonzero().flatten().tolist() == [3]


def test_weights_that_require_a_gradient():
    """Of one label it is nll, which all ranks know."""
    options = VocabParallelOptions.from_vocab(VOCAB)
    for k in (1, 3):
        x = problem(k)
        x = replace(x, weights=x.weights.double().requires_grad_())
        more = {"vocab_parallel_options": options, "target_weights": x.weights, "reduction": "sum"}
        q = shard_of(x.p, options)
        if k == 1:
            got, wanted = (
                torch.autograd.grad(y, x.weights)[0]
                for y in (
                    linear_cross_entropy(q.e, q.c, x.targets, q.bias, **more),
                    ours(x, impl="reference", reduction="sum"),
                )
            )
            torch.testing.assert_close(got, wanted)
            continue
        with pytest.raises(ValueError, match="target_weights: expected a tensor that requires no gradient where the v"):
            linear_cross_entropy(q.e, q.c, x.targets, q.bias, **more)


def test_a_mean_over_ranks_of_other_tokens(ranks):
    """By all tokens that count. A rank without them has 0."""
    x = problem()
    targets = x.targets.view(ranks, -1, 5).clone()
    targets[0] = -100
    whole = replace(x, targets=targets.flatten(0, 1)).leaves()
    rank = dist.get_rank()
    e = x.p.e.view(ranks, -1, WIDTH)[rank].clone().requires_grad_()
    more = {"target_weights": x.weights.view(ranks, -1, 5)[rank], "mean_group": dist.group.WORLD}
    part = linear_cross_entropy(e, x.p.c, targets[rank], x.p.bias, impl="cce_exact", **more)
    assert rank != 0 or part == 0
    (d_e,) = torch.autograd.grad(part, e)
    mean = part.detach() / ranks
    dist.all_reduce(mean)
    expected = theirs(whole)
    torch.testing.assert_close(mean, expected.detach())
    (wanted,) = torch.autograd.grad(expected, whole.p.e)
    torch.testing.assert_close(d_e / ranks, wanted.view(ranks, -1, WIDTH)[rank])


PLACEMENTS = [
    ([R], [S(0)], [R]),
    ([S(1)], [S(0)], [S(1)]),
    ([S(0)], [R], [S(0)]),
    ([R], [R], None),
    ([R], [S(0)], [S(2)]),
]


def check_dtensors(mesh, placements):
    x = problem().leaves()
    e, targets, weights = (y.view(BATCH, LENGTH, -1) for y in (x.p.e, x.targets, x.weights.double()))
    on_e, on_c, on_targets = placements
    d_e, d_c, d_bias = (
        distribute_tensor(y.detach(), mesh, z).requires_grad_() for y, z in ((e, on_e), (x.p.c, on_c), (x.p.bias, on_c))
    )
    d_targets, d_weights = (
        y if on_targets is None else distribute_tensor(y, mesh, on_targets) for y in (targets, weights)
    )
    for reduction, shift in (("mean", 0), ("sum", 0), ("none", 0), ("mean", 1)):
        more = {"reduction": reduction, "shift": shift, "target_weights": d_weights}
        loss = linear_cross_entropy(d_e, d_c, d_targets, d_bias, impl="cce_exact", **more)
        assert isinstance(loss, DTensor)
        cut = Soft(
            replace(x.p, e=e[:, : LENGTH - shift].flatten(0, 1)),
            targets[:, shift:].flatten(0, 1),
            weights[:, shift:].flatten(0, 1),
        )
        expected = theirs(cut, reduction=reduction)
        torch.testing.assert_close(loss.full_tensor().flatten(), expected.flatten())
        wanted = torch.autograd.grad(expected.sum(), x.p.inputs)
        for a, b in zip(torch.autograd.grad(loss.sum(), (d_e, d_c, d_bias)), wanted, strict=True):
            torch.testing.assert_close(a.full_tensor(), b.view_as(a))


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_dtensors(placements, mesh):
    check_dtensors(mesh, placements)


def test_dtensors_of_two_dimensions(mesh_2d):
    check_dtensors(mesh_2d, ([S(0), R], [R, S(0)], [S(0), R]))


def test_dtensor_weights_that_require_a_gradient(mesh):
    """Where they have weight: of what adds nothing dense torch leaves the gradient out here."""
    x = problem()
    e, targets = x.p.e.view(BATCH, LENGTH, -1), x.targets.view(BATCH, LENGTH, -1)
    weights = torch.ones(BATCH, LENGTH, 5, dtype=torch.float64, device=DEVICE)
    d_e, d_targets, d_weights = (distribute_tensor(y, mesh, [S(0)]) for y in (e, targets, weights))
    d_weights.requires_grad_()
    d_c, d_bias = (distribute_tensor(y, mesh, [R]) for y in (x.p.c, x.p.bias))
    loss = linear_cross_entropy(d_e, d_c, d_targets, d_bias, impl="cce_exact", target_weights=d_weights)
    y = replace(x, weights=weights.view(-1, 5).clone().requires_grad_())
    (got,), (wanted,) = torch.autograd.grad(loss, d_weights), torch.autograd.grad(theirs(y), y.weights)
    torch.testing.assert_close(got.full_tensor().view(-1, 5), wanted)


def test_mistakes_beside_dtensors(mesh):
    x = problem()
    e, targets, weights = (y.view(BATCH, LENGTH, -1) for y in (x.p.e, x.targets, x.weights))
    d_e, d_targets, d_weights = (distribute_tensor(y, mesh, [S(0)]) for y in (e, targets, weights))
    d_c = distribute_tensor(x.p.c, mesh, [R])
    with pytest.raises(ValueError, match="target_weights: expected a DTensor where e is sharded over tokens"):
        linear_cross_entropy(d_e, d_c, d_targets, target_weights=weights)
    with pytest.raises(ValueError, match="target_weights: expected a plain tensor like e, got a DTensor"):
        linear_cross_entropy(e, x.p.c, targets, target_weights=d_weights)


def test_the_collective_has_what_check_rows_says(monkeypatch):
    """Two numbers a token, of any K."""
    sizes = []
    original = vocab_parallel.all_gather

    def counted(y, ranks, group):
        sizes.append(y.numel())
        return original(y, ranks, group)

    monkeypatch.setattr(vocab_parallel, "all_gather", counted)
    x = problem(bias=False)
    options = VocabParallelOptions.from_vocab(VOCAB)
    linear_cross_entropy(
        x.p.e, rows_of(x.p.c, options), x.targets, target_weights=x.weights, vocab_parallel_options=options
    )
    assert sizes == [2 * BATCH * LENGTH, 2 * BATCH * LENGTH]
