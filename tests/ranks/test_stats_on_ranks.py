"""return_stats, and ignore_index=None, where the vocabulary or the tokens are cut over ranks."""

from __future__ import annotations

import pytest
import torch
from support.sharded import BATCH, EXACT, LENGTH, VOCAB, R, S, mine, problem, sequences, shard_of
from torch.distributed.tensor import DTensor, distribute_tensor

from cce_ext import linear_cross_entropy
from cce_ext.distributed import VocabParallelOptions

STATS = {"return_stats": ("correct", "entropy"), "reduction": "none"}


@pytest.mark.parametrize("ignored", [0.2, 0.0])
@pytest.mark.parametrize("impl", EXACT)
def test_shards(impl, ignored):
    """Of 0.0 all tokens count, and nothing is looked for."""
    p = problem(ignored=ignored)
    options = VocabParallelOptions.from_vocab(VOCAB)
    q, whole = shard_of(p, options), p.leaves()
    given = {**STATS, "impl": impl, "ignore_index": -100 if ignored else None}
    out = linear_cross_entropy(q.e, q.c, q.targets, q.bias, vocab_parallel_options=options, **given)
    expected = linear_cross_entropy(whole.e, whole.c, whole.targets, whole.bias, **given)
    assert torch.equal(out.correct, expected.correct) and out.correct.any()
    for x, y in ((out.loss, expected.loss), (out.entropy, expected.entropy)):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(out.loss.sum(), q.inputs)
    wanted = torch.autograd.grad(expected.loss.sum(), whole.inputs)
    for x, y in zip(got, mine(list(wanted), options), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("on_e, on_c", [([R], [S(0)]), ([S(0)], [R])], ids=["vocabulary", "tokens"])
def test_dtensors(on_e, on_c, mesh):
    p = sequences(problem(ignored=0.0))
    e, c, bias, targets = (
        distribute_tensor(x, mesh, y) for x, y in ((p.e, on_e), (p.c, on_c), (p.bias, on_c), (p.targets, on_e))
    )
    for shift in (0, 1):
        given = {"return_stats": ("correct", "entropy"), "shift": shift, "ignore_index": None, "impl": "cce_exact"}
        out = linear_cross_entropy(e, c, targets, bias, **given)
        expected = linear_cross_entropy(p.e, p.c, p.targets, p.bias, **given)
        for x, y in ((out.loss, expected.loss), *zip(out[2:], expected[2:], strict=True)):
            assert isinstance(x, DTensor)
            torch.testing.assert_close(x.full_tensor(), y, rtol=1e-9, atol=1e-9)
        assert out.correct.shape == (BATCH, LENGTH - shift)
