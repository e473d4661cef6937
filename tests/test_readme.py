"""The README's recipes, executed as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.problems import peaked
from torch.nn import functional as F

from cce_ext import linear_cross_entropy

README = Path(__file__).parents[1] / "README.md"


def recipe(with_: str) -> str:
    """The one Python example that has this in it."""
    (found,) = [
        x for x in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL) if with_ in x
    ]
    return found


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_label_smoothing_and_class_weights(ignored):
    """Loss and gradients are those of F.cross_entropy, which leaves ignored tokens out of either mean."""
    p = peaked(50, 16, 300, dtype=torch.float64, ignored=ignored).leaves()
    names: dict[str, Any] = {
        "torch": torch,
        "linear_cross_entropy": lambda *args, **options: linear_cross_entropy(*args, impl="cce_exact", **options),
        "hidden": p.e,
        "classifier": SimpleNamespace(weight=p.c),
        "targets": p.targets,
        "s": 0.1,
        "class_weights": torch.rand(300, dtype=torch.float64) + 0.5,
    }
    assert bool((p.targets == -100).any()) == bool(ignored)
    exec(recipe("class_weights["), names)
    logits = p.e @ p.c.T
    for loss, options in (
        (names["smoothed"], {"label_smoothing": 0.1}),
        (names["weighted"], {"weight": names["class_weights"]}),
    ):
        expected = F.cross_entropy(logits, p.targets, **options)
        torch.testing.assert_close(loss, expected)
        got, wanted = (torch.autograd.grad(x, (p.e, p.c), retain_graph=True) for x in (loss, expected))
        torch.testing.assert_close(got, wanted)
