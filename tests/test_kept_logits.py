"""Who keeps logits: what a GPU does with them is in test_kept_logits_gpu.py."""

from __future__ import annotations

import pytest
import torch
from support.problems import peaked
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from cce_ext import calls, linear_cross_entropy
from cce_ext.few_tokens import LEAST_WIDTH_OF_A_TOKEN, MOST_TOKENS, is_few, keeps_logits
from cce_ext.options import Options, resolve_method


class OnCuda:
    """What the rule asks of e."""

    is_cuda = True

    def __init__(self, n: int = 64, d: int = 4096, dtype: torch.dtype = torch.bfloat16):
        self.shape, self.dtype = torch.Size((n, d)), dtype


def keeps(e, others=False, **options) -> bool:
    given = Options(**options)
    return keeps_logits(e, resolve_method(given, e.dtype), given, others)


@pytest.mark.parametrize("n", [0, 1, MOST_TOKENS, MOST_TOKENS + 1])
def test_thresholds_from_both_sides(n):
    wide = MOST_TOKENS * LEAST_WIDTH_OF_A_TOKEN
    assert is_few(n, 2 * wide) is (n <= MOST_TOKENS)
    assert is_few(n, n * LEAST_WIDTH_OF_A_TOKEN) is (n <= MOST_TOKENS)
    assert n == 0 or not is_few(n, n * LEAST_WIDTH_OF_A_TOKEN - 1)


def test_who_keeps():
    assert keeps(OnCuda()) and keeps(OnCuda(), impl="cce_exact") and keeps(OnCuda(), filter_eps=None)
    assert keeps(OnCuda(), filter_e_grad=False)
    assert not keeps(OnCuda(), filter_eps=2**-8), "a number is asked for: it samples"
    assert not keeps(OnCuda(), impl="cce_threshold") and not keeps(OnCuda(), scan="fp8")
    assert not keeps(OnCuda(), others=True) and not keeps(OnCuda(dtype=torch.float16))
    assert not keeps(torch.zeros(64, 4096, dtype=torch.bfloat16))


def test_a_graph_of_any_number_of_tokens_keeps_none():
    """And needs no other graph where a number passes the threshold."""
    graphs = CompileCounter()

    def f(x):
        return x + 1 if is_few(*x.shape) else x

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=graphs)
    assert [compiled(torch.zeros(n, 4096)).any().item() for n in (64, 256, 300)] == [False] * 3
    assert graphs.frame_count == 1
    torch._dynamo.reset()
    assert torch.compile(f, fullgraph=True, dynamic=False, backend="eager")(torch.zeros(64, 4096)).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_reentrant_checkpoint_draws_alike(frozen, monkeypatch):
    """Its first pass does not show that the call will be differentiated: nothing requires a gradient there."""
    kept, forward = [], calls.lce_forward

    def portable(*arguments, keep_logits=False, **keywords):
        kept.append(keep_logits)
        return forward(*arguments, **keywords)

    monkeypatch.setattr(calls, "keeps_logits", lambda *_: True)
    monkeypatch.setattr(calls, "lce_forward", portable)
    p, masks = peaked(20, 16, 3000).leaves(), []
    c = p.c.detach() if frozen else p.c

    def segment(e):
        loss = linear_cross_entropy(2 * e, c, p.targets, reduction="none")
        masks.append(torch.rand(20))
        return (loss * masks[-1]).sum()

    checkpoint(segment, p.e, use_reentrant=True).backward()
    assert torch.equal(*masks), "something was drawn in one of the passes only"
    assert kept == [False, True]


def test_the_portable_operator_refuses():
    e, c = torch.zeros(2, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"keep_logits: expected fp16 or bf16 on CUDA, got torch.float32 on cpu"):
        torch.ops.cce.lce_forward(e, c, None, torch.tensor([0, 1]), None, keep_logits=True)
