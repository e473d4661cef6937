"""vocab_parallel_options and mean_group: each rank has rows of c, or tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import assert_as_good_as_dense, dense, error, oracle, upstream
from support.sharded import (
    BATCH,
    DEVICE,
    EXACT,
    LENGTH,
    VOCAB,
    WIDTH,
    assert_matches,
    assert_same_everywhere,
    mine,
    problem,
    rows_of,
    run,
    shard_of,
)
from torch import distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from cce_ext import IMPLS, LinearCrossEntropy, compute_z_loss, linear_cross_entropy, vocab_parallel
from cce_ext.distributed import VocabParallelOptions


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "torch_compile"])
def test_loss_and_lse(impl):
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    nll_64, lse_64, grads_64 = oracle(p, *g)
    torch.testing.assert_close(nll, nll_64)
    torch.testing.assert_close(lse, lse_64)
    for x in (nll, lse, grads[0]):
        assert_same_everywhere(x)
    for x, y in zip(grads, mine(grads_64, options), strict=True):
        assert error(x, y) < (0.05 if "cce" in impl else 1e-9)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"bias": False, "ignored": 0.0},
        {"seed": 3, "ignored": 1.0},  # nothing counts
    ],
    ids=str,
)
def test_gradients(impl, options):
    assert_matches(problem(**options), VocabParallelOptions.from_vocab(VOCAB), impl=impl)


@pytest.mark.parametrize("impl", ["cce_exact", "cce_threshold", "reference"])
def test_half_of_the_ranks_rows_hold_no_target(impl, ranks):
    """And shards are uneven, smaller than a vocab tile, and in another order than the ranks."""
    p = problem()
    p = replace(p, targets=torch.where(p.targets >= 0, p.targets % 3, p.targets))
    edges = [0, 5, VOCAB] if ranks == 2 else [0, 5, 6, 300, VOCAB]
    at = ranks - 1 - dist.get_rank()
    more = {"filter_eps": 1e-12} if impl == "cce_threshold" else {}
    assert_matches(p, VocabParallelOptions(edges[at], edges[at + 1]), impl=impl, **more)


@pytest.mark.parametrize("impl", EXACT)
def test_ignore_index_among_the_rows(impl):
    p = problem()
    for index in (0, 7, VOCAB - 1):
        assert_matches(
            replace(p, ignore_index=index, targets=torch.where(p.targets < 0, index, p.targets)),
            VocabParallelOptions.from_vocab(VOCAB),
            impl=impl,
        )


@pytest.mark.parametrize("offset", [-900.0, 900.0])
@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_logits_far_from_zero(impl, offset):
    """In fp32, with another offset on each side of the middle. A step of the lse is 6e-5 there."""
    p = problem(torch.float32)
    bias = p.bias + offset
    bias[: VOCAB // 2] -= offset / 2
    p = replace(p, bias=bias)
    options = VocabParallelOptions.from_vocab(VOCAB)
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    exact, same = oracle(p, *g), dense(p, *g)
    ours, theirs, best = [nll, lse], [*same[:2]], [*exact[:2]]
    if impl in EXACT:
        ours, theirs, best = ours + grads, theirs + mine(same[2], options), best + mine(exact[2], options)
    for x, y, z in zip(ours, theirs, best, strict=True):
        assert_as_good_as_dense(x, y, z, tiny=1e-4)


@pytest.mark.parametrize("impl", EXACT)
def test_masked_rows(impl, ranks):
    """A bias of -inf, as vocabularies are padded: all of the last shard but one row."""
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    bias = p.bias.clone()
    bias[-(-VOCAB // ranks) * (ranks - 1) + 1 :] = -float("inf")
    p = replace(p, bias=bias, targets=torch.where(p.targets >= 0, p.targets % 50, p.targets))
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    exact = oracle(p, *g)
    for x, y in zip([nll, lse, *grads], [*exact[:2], *mine(exact[2], options)], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("frozen", ["e", "c"])
def test_frozen_inputs_under_autocast(frozen):
    p = problem(torch.float32)
    options = VocabParallelOptions.from_vocab(VOCAB)
    q = shard_of(p, options)
    getattr(q, frozen).requires_grad_(False)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = linear_cross_entropy(q.e, q.c, q.targets, q.bias, vocab_parallel_options=options, impl="cce_exact")
    loss.backward()
    whole = p.leaves()
    expected = linear_cross_entropy(whole.e, whole.c, whole.targets, whole.bias, impl="reference")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert getattr(q, frozen).grad is None
    got, grad = (q.c.grad, rows_of(whole.c.grad, options)) if frozen == "e" else (q.e.grad, whole.e.grad)
    assert got.dtype == torch.float32 and error(got, grad) < 2e-2


def test_part_of_the_gradient_of_e():
    p = problem()
    options = replace(VocabParallelOptions.from_vocab(VOCAB), reduce_e_grad=False)
    g = upstream(p)
    *_, (d_e, *_) = run(p, options, g, impl="cce_exact")
    expected = oracle(p, *g)[2][0]
    assert error(d_e, expected) > 0.01
    dist.all_reduce(d_e)
    torch.testing.assert_close(d_e, expected)


@pytest.mark.parametrize("impl", ["cce", "reference"])
def test_reductions_shift_and_module(impl):
    p = problem(bias=False)
    e, targets = p.e.view(BATCH, LENGTH, WIDTH), p.targets.view(BATCH, LENGTH)
    options = VocabParallelOptions.from_vocab(VOCAB)
    for reduction in ("mean", "sum", "none"):
        more = {"reduction": reduction, "shift": 1, "return_lse": True}
        got = LinearCrossEntropy(**more, impl=impl, vocab_parallel_options=options)(e, rows_of(p.c, options), targets)
        expected = linear_cross_entropy(e, p.c, targets, impl="reference", **more)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", ["cce", "reference"])
def test_a_target_that_no_rank_has(impl):
    if DEVICE == "cuda":
        pytest.skip("on a GPU nobody looks at the targets")
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    for bad in (VOCAB, -5):
        p.targets[5] = bad
        with pytest.raises(IndexError, match=f"targets: {bad} at flat position 5: in no rank's rows, nor ignore_index"):
            run(p, options, upstream(p), impl=impl)


def test_a_target_that_no_rank_has_is_nan_where_nobody_looks(monkeypatch):
    """As on CUDA: in the loss, and in the gradient."""
    monkeypatch.setattr(vocab_parallel, "may_look_at", lambda targets: False)
    p = problem()
    p.targets[5] = VOCAB
    nll, lse, grads = run(p, VocabParallelOptions.from_vocab(VOCAB), upstream(p), impl="cce_exact")
    assert nll.isnan().nonzero().tolist() == [[5]] and lse.isfinite().all()
    assert grads[0].isnan().any(1).nonzero().tolist() == [[5]] and grads[1].isnan().all()


def test_rows_are_those_of_a_dtensors_shards(ranks, mesh):
    for v in (ranks, 701, 1000):
        x = torch.arange(v, device=DEVICE)
        rows = rows_of(x, VocabParallelOptions.from_vocab(v))
        assert torch.equal(rows, x.chunk(ranks)[dist.get_rank()])
        assert torch.equal(rows, distribute_tensor(x, mesh, [Shard(0)]).to_local())


def test_a_rank_with_other_rows_keeps_nobody_waiting(ranks, monkeypatch):
    """All raise where targets are looked at; elsewhere the loss is NaN on those that have what they say."""
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    last = dist.get_rank() == ranks - 1
    c = rows_of(p.c, options)[: -1 if last else None]
    for looks in (True, False):
        monkeypatch.setattr(vocab_parallel, "may_look_at", lambda targets, looks=looks: looks)
        for impl in ("cce", "reference"):
            arguments = {"impl": impl, "vocab_parallel_options": options, "return_lse": True, "reduction": "none"}
            if last or looks:
                says = "expected .* rows, this rank's" if last else rf"on ranks \[{ranks - 1}\] of the group"
                with pytest.raises(ValueError, match=f"c: {says}"):
                    linear_cross_entropy(p.e, c, p.targets, **arguments)
            else:
                for x in linear_cross_entropy(p.e, c, p.targets, **arguments):
                    assert x[p.targets != -100].isnan().all()


def test_mistakes_of_options(ranks):
    p = problem()
    with pytest.raises(ValueError, match=f"vocab_size: 1 rows in chunks of 1 leave the last of {ranks} ranks none"):
        VocabParallelOptions.from_vocab(1)
    with pytest.raises(ValueError, match="start, stop: .* got 3, 3"):
        VocabParallelOptions(3, 3)
    with pytest.raises(ValueError, match=r"c: expected 5 rows, this rank's \[0, 5\) .* got \[701, 16\]"):
        linear_cross_entropy(p.e, p.c, p.targets, vocab_parallel_options=VocabParallelOptions(0, 5))


def test_a_mean_group_draws_for_each_of_its_ranks(ranks):
    """Trainers seed the data-parallel ranks alike: with the same tokens they still visit different tiles."""
    p = problem()
    gradients = []
    for options in ({}, {"mean_group": dist.group.WORLD}):
        torch.manual_seed(5)
        q = p.leaves()
        linear_cross_entropy(q.e, q.c, q.targets, filter_eps=0.5, **options).backward()
        mine, everyones = q.c.grad, [torch.empty_like(q.c) for _ in range(ranks)]
        dist.all_gather(everyones, mine)
        gradients.append(everyones)
    assert all(torch.equal(x, gradients[0][0]) for x in gradients[0])
    assert not any(torch.equal(x, y) for i, x in enumerate(gradients[1]) for y in gradients[1][:i])


def test_a_mean_group_is_for_a_mean():
    p = problem()
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"mean_group: expected None with reduction='{reduction}'"):
            linear_cross_entropy(p.e, p.c, p.targets, reduction=reduction, mean_group=dist.group.WORLD)
        with pytest.raises(ValueError, match=f"mean_group: expected None with reduction='{reduction}'"):
            LinearCrossEntropy(reduction=reduction, mean_group=dist.group.WORLD)


def test_z_loss_over_all_ranks_tokens(ranks):
    """A rank without tokens has 0, as its loss has."""
    p = problem()
    targets = p.targets.view(ranks, -1).clone()
    targets[0] = -100
    targets[1, ::2] = -100
    lse = torch.arange(float(targets.numel()), dtype=torch.float64, device=DEVICE).view_as(targets)
    whole = compute_z_loss(lse, targets)
    rank = dist.get_rank()
    part = compute_z_loss(lse[rank], targets[rank], mean_group=dist.group.WORLD)
    assert rank != 0 or part == 0
    mean = part / ranks
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, whole)


def test_mean_over_all_ranks_tokens(ranks):
    """Ranks with different numbers of tokens that count, one of them with none: the mean of ranks is the whole's."""
    p = problem()
    targets = p.targets.view(ranks, -1).clone()
    targets[0] = -100
    targets[1, ::2] = -100
    e = p.e.view(ranks, -1, WIDTH)
    whole = linear_cross_entropy(e, p.c, targets, impl="reference")
    part = e[dist.get_rank()].clone().requires_grad_()
    loss = linear_cross_entropy(part, p.c, targets[dist.get_rank()], impl="cce_exact", mean_group=dist.group.WORLD)
    loss.backward()
    mean = loss.detach() / ranks
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, whole)
    assert dist.get_rank() != 0 or loss == 0
