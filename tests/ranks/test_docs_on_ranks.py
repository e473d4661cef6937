"""The programs of docs/distributed.md, executed as they stand there, in the group that is here already."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.sharded import DEVICE
from torch import distributed as dist

from cce_ext import linear_cross_entropy

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="they are for a CPU")


@pytest.fixture
def loss_and_shape(monkeypatch, capsys):
    """What the program that has these words prints."""
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)

    def run(words: str) -> tuple[float, list[int]]:
        (program,) = [x for x in PROGRAMS if words in x]
        exec(compile(program, PAGE.name, "exec"), {"__name__": "program"})
        loss, _, shape = capsys.readouterr().out.partition(" ")
        return float(loss), [int(x) for x in re.findall(r"\d+", shape)]

    return run


def test_by_hand(loss_and_shape):
    """One process's loss, with this rank's rows."""
    loss, shape = loss_and_shape("VocabParallelOptions.from_vocab")
    torch.manual_seed(0)
    classifier, hidden, tokens = torch.randn(32000, 64), torch.randn(2, 128, 64), torch.randint(32000, (2, 128))
    assert loss == pytest.approx(linear_cross_entropy(hidden, classifier, tokens, shift=1).item(), rel=1e-5)
    assert shape == [32000 // dist.get_world_size(), 64]


def test_a_plan(loss_and_shape):
    """The ranks of a vocabulary have one loss, that of an untrained model: log 32000 is 10.4."""
    loss, shape = loss_and_shape("LossParallel()")
    losses = [torch.empty(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(losses, torch.tensor([loss], dtype=torch.float64))
    assert torch.equal(torch.cat(losses[::2]), torch.cat(losses[1::2]))
    assert len({x.item() for x in losses}) == len(losses) // 2  # other tokens
    assert 10 < loss < 11 and shape == [32000, 64]


def test_there_are_no_others():
    assert len(PROGRAMS) == 2
