"""linear_logprobs where the vocabulary, or the tokens, are cut over ranks: results and gradients of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.logprobs import ALL, FIELDS, dense, gradients, ours, temperatures, upstream
from support.problems import peaked
from support.sharded import (
    BATCH,
    DEVICE,
    EXACT,
    LENGTH,
    VOCAB,
    R,
    S,
    assert_same_everywhere,
    mine,
    problem,
    rows_of,
    sequences,
    shard_of,
    two_ranks,
)
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from cce_ext import linear_logprobs, vocab_parallel
from cce_ext.distributed import VocabParallelOptions

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3},
}
options_of = pytest.mark.parametrize("more", OPTIONS.values(), ids=OPTIONS)


def check_shards(p, options, function=linear_logprobs, **more):
    """Results, the same on all ranks, and gradients of e, and of this rank's rows of c and bias."""
    p = replace(p, softcap=more.pop("softcap", None))
    given = {name: more[name] for name in ("temperature", "logit_scale") if name in more}
    q, whole = shard_of(p, options), p.leaves()
    out = function(
        *(q.e, q.c, q.targets, q.bias), softcap=p.softcap, outputs=ALL, vocab_parallel_options=options, **more
    )
    expected = dense(whole, **given)
    for name, x, y in zip(FIELDS, out, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert_same_everywhere(x.detach())
    for which in ((0, 1, 2), (0,), (2,)):
        ups = [g if i in which else None for i, g in enumerate(upstream(p))]
        leaf = shard_of(p, options)
        again = function(
            *(leaf.e, leaf.c, leaf.targets, leaf.bias),
            **{"softcap": p.softcap, "outputs": ALL, "vocab_parallel_options": options, **more},
        )
        got, wanted = gradients(again, leaf, ups), gradients(dense(whole, **given), whole, ups)
        for x, y in zip(got, mine(wanted, options), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@options_of
@pytest.mark.parametrize("impl", EXACT)
def test_shards(more, impl):
    check_shards(problem(), VocabParallelOptions.from_vocab(VOCAB), impl=impl, **more)


@pytest.mark.parametrize("impl", EXACT)
def test_uneven_shards_and_temperatures_of_tokens(impl, ranks):
    """And in another order than the ranks."""
    p = problem()
    edges = [0, 5, VOCAB] if ranks == 2 else [0, 5, 6, 300, VOCAB]
    at = ranks - 1 - dist.get_rank()
    options = VocabParallelOptions(edges[at], edges[at + 1])
    check_shards(p, options, impl=impl, temperature=temperatures(p).double())


@two_ranks
@pytest.mark.parametrize("impl", EXACT)
def test_compiled_shards(impl, compiles):
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    check_shards(problem(), VocabParallelOptions.from_vocab(VOCAB), compiled, impl=impl, temperature=0.7)


def test_the_first_maximum_of_all_ranks(ranks):
    """Equal logits on each rank, whose rows are in another order than the ranks: the smallest number is the first."""
    p = peaked(ranks, 8, 10 * ranks)
    c = -p.c.abs()
    c[3::10] = 1.0
    at = ranks - 1 - dist.get_rank()
    options = VocabParallelOptions(10 * at, 10 * at + 10)
    q = replace(p, e=torch.ones_like(p.e), c=rows_of(c, options), targets=3 + 10 * torch.arange(ranks))
    out = ours(q, outputs=("is_top1", "max_logprob"), vocab_parallel_options=options)
    assert out.is_top1.tolist() == [True] + [False] * (ranks - 1)
    torch.testing.assert_close(out.max_logprob, out.logprobs)


def test_a_column_past_what_fp32_counts(monkeypatch):
    """Its number goes over the ranks in two."""
    monkeypatch.setattr(vocab_parallel, "_COLUMNS", 4)
    check_shards(problem(), VocabParallelOptions.from_vocab(VOCAB), impl="cce_exact")


@pytest.mark.parametrize("impl", EXACT)
def test_a_shard_that_is_masked(impl, ranks):
    """A rank whose logits are all -inf has no part in anything."""
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    bias = p.bias.clone()
    bias[-(-VOCAB // ranks) :] = -float("inf")  # all but the first rank's
    p = replace(p, bias=bias, targets=p.targets.where(p.targets < 0, p.targets % 100))
    out = ours(shard_of(p, options), impl=impl, vocab_parallel_options=options)
    expected = dense(p)
    for name in ("logprobs", "lse", "entropy", "log_sum_sq_probs", "max_logprob"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    if impl == "reference":
        return  # a dense softmax of nothing has a gradient of NaN
    q = shard_of(p, options)
    out = ours(q, impl=impl, vocab_parallel_options=options)
    assert all(x.isfinite().all() for x in gradients(out, q, upstream(p)))


def test_the_sampled_gradient_of_shards():
    p = problem(bias=False)
    options = VocabParallelOptions.from_vocab(VOCAB)
    q, whole = shard_of(p, options), p.leaves()
    out = ours(q, vocab_parallel_options=options, temperature=0.8)
    got = gradients(out, q, upstream(p))
    wanted = gradients(dense(whole, temperature=0.8), whole, upstream(p))
    for x, y in zip(got, mine(wanted, options), strict=True):
        assert (x - y).norm() < 0.1 * y.norm()


def test_part_of_the_gradient_of_hidden():
    p = problem()
    options = replace(VocabParallelOptions.from_vocab(VOCAB), reduce_e_grad=False)
    q, whole = shard_of(p, options), p.leaves()
    d_e = gradients(ours(q, impl="cce_exact", vocab_parallel_options=options), q, upstream(p))[0]
    dist.all_reduce(d_e)
    torch.testing.assert_close(d_e, gradients(dense(whole), whole, upstream(p))[0])


@pytest.mark.parametrize("outputs", [(), ("entropy",), ALL], ids=str)
def test_a_rank_with_other_rows_keeps_nobody_waiting(outputs, ranks, monkeypatch):
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    last = dist.get_rank() == ranks - 1
    c = rows_of(p.c, options)[: -1 if last else None]
    for looks in (True, False):
        monkeypatch.setattr(vocab_parallel, "may_look_at", lambda targets, looks=looks: looks)
        if last or looks:
            with pytest.raises(ValueError, match="weight: expected" if last else "c: on ranks"):
                linear_logprobs(p.e, c, p.targets, outputs=outputs, vocab_parallel_options=options)
        else:
            out = linear_logprobs(p.e, c, p.targets, outputs=outputs, vocab_parallel_options=options)
            counts = p.targets != -100
            assert all(x[counts].isnan().all() for x in out if x is not None and x.is_floating_point())


def test_a_shard_is_batch_invariant():
    p = problem(torch.float32)
    options = VocabParallelOptions.from_vocab(VOCAB)
    c = rows_of(p.c, options)
    of_tokens = temperatures(p)
    more = {"outputs": ALL, "vocab_parallel_options": options, "batch_invariant": True}
    whole = linear_logprobs(p.e, c, p.targets, temperature=of_tokens, **more)
    for i in (torch.arange(1, 2), torch.arange(5, 18), torch.arange(47, -1, -1)):
        part = linear_logprobs(p.e[i], c, p.targets[i], temperature=of_tokens[i], **more)
        assert all(torch.equal(x, y[i]) for x, y in zip(part, whole, strict=True))


PLACEMENTS = [([R], [S(0)], [R]), ([S(1)], [S(0)], [S(1)]), ([S(0)], [R], [S(0)]), ([R], [R], None)]


def check_dtensors(mesh, placements, of_temperature):
    p = problem()
    whole = sequences(p)
    on_e, on_c, on_targets = placements
    e, c, bias = (
        distribute_tensor(x, mesh, y).requires_grad_()
        for x, y in ((whole.e, on_e), (whole.c, on_c), (whole.bias, on_c))
    )
    targets = whole.targets if on_targets is None else distribute_tensor(whole.targets, mesh, on_targets)
    of_tokens = temperatures(p).double().view(BATCH, LENGTH)
    plain = p.leaves()
    for shift in (0, 1):
        options = {"outputs": ALL, "impl": "cce_exact", "shift": shift, "temperature": of_temperature(of_tokens)}
        out = linear_logprobs(e, c, targets, bias, **options)
        flat = replace(
            plain,
            e=plain.e.view(BATCH, LENGTH, -1)[:, : LENGTH - shift].flatten(0, 1),
            targets=whole.targets[:, shift:].flatten(),
        )
        expected = dense(flat, temperature=of_tokens[:, shift:].flatten())
        for x, y in zip(out, expected, strict=True):
            assert isinstance(x, DTensor) and x.shape == (BATCH, LENGTH - shift)
            torch.testing.assert_close(x.full_tensor().flatten(), y, rtol=1e-9, atol=1e-9)
        got = torch.autograd.grad(sum(x.sum() for x in out[:3]), (e, c, bias))
        for x, y in zip(got, torch.autograd.grad(sum(x.sum() for x in expected[:3]), plain.inputs), strict=True):
            torch.testing.assert_close(x.full_tensor().view_as(y), y)


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
def test_dtensors(placements, mesh):
    """Temperatures that are plain are the whole; others come from wherever they are."""
    check_dtensors(mesh, placements, lambda x: x)
    for placement in (R, S(0), S(1)):
        check_dtensors(mesh, placements, lambda x, to=placement: distribute_tensor(x, mesh, [to]))


def test_dtensors_of_two_dimensions(mesh_2d):
    check_dtensors(mesh_2d, ([S(0), R], [R, S(0)], [S(0), R]), lambda x: x)


def test_one_temperature_beside_dtensors(mesh):
    p = problem()
    e, c, targets = (distribute_tensor(x, mesh, [y]) for x, y in ((p.e, R), (p.c, S(0)), (p.targets, R)))
    expected = dense(replace(p, bias=None), temperature=0.7).logprobs
    one = torch.tensor([0.7], dtype=torch.float64, device=DEVICE)
    for temperature in (0.7, one, distribute_tensor(one, mesh, [R])):
        out = linear_logprobs(e, c, targets, temperature=temperature)
        torch.testing.assert_close(out.logprobs.full_tensor(), expected)


def test_mistakes_name_the_arguments(mesh, mesh_2d):
    p = problem()
    e, c, targets = (distribute_tensor(x, mesh, [y]) for x, y in ((p.e, R), (p.c, S(0)), (p.targets, R)))
    with pytest.raises(ValueError, match="weight: expected a DTensor on hidden's mesh"):
        linear_logprobs(e, p.c, targets)
    with pytest.raises(ValueError, match="hidden: expected a DTensor on weight's mesh"):
        linear_logprobs(p.e, c, targets)
    with pytest.raises(ValueError, match=r"temperature: expected one number or the targets' shape \[48\], got \[7\]"):
        linear_logprobs(e, c, targets, temperature=torch.ones(7))
    with pytest.raises(ValueError, match="temperature: expected a DTensor on weight's mesh"):
        linear_logprobs(e, c, targets, temperature=distribute_tensor(torch.ones(48), mesh_2d, [R, R]))
    options = VocabParallelOptions.from_vocab(VOCAB)
    with pytest.raises(ValueError, match="vocab_parallel_options: expected None where hidden, weight or targets are"):
        linear_logprobs(e, c, targets, vocab_parallel_options=options)
