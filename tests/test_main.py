"""`python -m cce_ext`."""

from __future__ import annotations

import sys

import pytest
import torch

import cce_ext
from cce_ext import __main__ as tool


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(tool.SHAPES, "cpu", (64, 16, 1000))
    monkeypatch.setattr(sys, "argv", ["cce_ext", "--device", "cpu"])


def test_report(capsys):
    assert tool.main() == 0
    out = capsys.readouterr().out
    assert f"cce_ext {cce_ext.__version__}, torch {torch.__version__}" in out
    assert "WRONG" not in out
    for impl in cce_ext.IMPLS:
        assert impl in out or impl == "torch_compile"
    assert "dense torch" in out and "MB over the inputs" in out
    assert "One draw of a sampled gradient scatters" in out
    assert out.splitlines()[-1] == "All is well."


def test_a_wrong_gradient_fails_the_check(monkeypatch, capsys):
    def wrong(e, c, t, impl):
        return cce_ext.linear_cross_entropy(e, c.detach(), t, impl=impl) + 0 * c.sum()

    monkeypatch.setattr(tool, "linear_cross_entropy", wrong)
    assert tool.main() == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and out.splitlines()[-1].startswith("NOT WELL")


def test_each_side_has_its_own_limit(monkeypatch, capsys):
    """An error of a hundredth is one draw's in a sampled side, and wrong in the other one."""

    def nearly(e, c, t, impl):
        loss = cce_ext.linear_cross_entropy(e, c, t, impl=impl)
        if impl in ("cce_kahan_full_c", "cce_kahan_full_e"):
            loss = loss + 0.01 * (loss - loss.detach())
        return loss

    monkeypatch.setattr(tool, "linear_cross_entropy", nearly)
    assert tool.main() == 1
    wrong = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("WRONG")]
    assert set(wrong) == {"cce_kahan_full_c", "cce_kahan_full_e"}


def test_cuda_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(tool, "HAS_CUDA", False)
    monkeypatch.setattr(sys, "argv", ["cce_ext", "--device", "cuda"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "this build has no CUDA kernels" in capsys.readouterr().err
