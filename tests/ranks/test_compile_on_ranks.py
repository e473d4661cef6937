"""The vocabulary-parallel loss under torch.compile."""

from __future__ import annotations

import pytest
import torch
from support.sharded import VOCAB, assert_matches, problem, two_ranks

from cce_ext import calls, linear_cross_entropy, reference
from cce_ext.distributed import VocabParallelOptions

pytestmark = two_ranks


def test_compile(compiles):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_matches(problem(), VocabParallelOptions.from_vocab(VOCAB), function=compiled, impl="reference")


def test_the_compiled_impl(compiles, monkeypatch):
    # By inductor it takes a minute, and to the collectives it is the same.
    monkeypatch.setattr(
        calls, "_compiled_reference", lambda: torch.compile(reference.with_statistics, backend="aot_eager")
    )
    assert_matches(problem(), VocabParallelOptions.from_vocab(VOCAB), impl="torch_compile")


@pytest.mark.slow
def test_compile_by_inductor(compiles):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    assert_matches(problem(), VocabParallelOptions.from_vocab(VOCAB), function=compiled, impl="cce_exact")
