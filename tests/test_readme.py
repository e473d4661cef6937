"""The README's recipes, executed as they stand there."""

from __future__ import annotations

import re
from functools import partial
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
        "linear_cross_entropy": partial(linear_cross_entropy, impl="cce_exact"),
        "hidden": p.e,
        "classifier": SimpleNamespace(weight=p.c),
        "targets": p.targets,
        "s": 0.1,
        "class_weights": torch.rand(300, dtype=torch.float64) + 0.5,
    }
    assert bool((p.targets == -100).any()) == bool(ignored)
    exec(recipe("weight=class_weights"), names)
    expected = F.cross_entropy(p.e @ p.c.T, p.targets, names["class_weights"], label_smoothing=0.1)
    torch.testing.assert_close(names["loss"], expected)
    got, wanted = (torch.autograd.grad(x, (p.e, p.c)) for x in (names["loss"], expected))
    torch.testing.assert_close(got, wanted)
