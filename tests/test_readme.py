"""The recipes of the README and of docs/start.md, executed as they stand there."""

from __future__ import annotations

import json
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
START = README.parent / "docs" / "start.md"


def recipe(file: Path, with_: str) -> str:
    """The one Python example that has this in it."""
    (found,) = [
        x for x in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL) if with_ in x
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
    exec(recipe(START, "weight=class_weights"), names)
    expected = F.cross_entropy(p.e @ p.c.T, p.targets, names["class_weights"], label_smoothing=0.1)
    torch.testing.assert_close(names["loss"], expected)
    got, wanted = (torch.autograd.grad(x, (p.e, p.c)) for x in (names["loss"], expected))
    torch.testing.assert_close(got, wanted)


def test_ten_lines():
    names: dict[str, Any] = {}
    exec(recipe(README, "import torch"), names)
    assert 9 < names["loss"].item() < 13  # log 32000 is 10.4
    assert names["hidden"].grad.norm() > 0 and names["classifier"].weight.grad.norm() > 0


def test_the_diff():
    """Both of its sides: loss and gradients are the same."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(diff.splitlines()) == 4
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    lm_head = torch.nn.Linear(16, 300, bias=False, dtype=torch.float64)
    targets = torch.randint(-1, 300, (2, 9))
    targets[0, :3] = -1
    losses = []
    for side in "-+":
        code = "\n".join(line[1:] for line in diff.splitlines() if line[0] == side)
        names: dict[str, Any] = {
            "torch": torch,
            "F": F,
            "self": SimpleNamespace(lm_head=lm_head),
            "x": x,
            "targets": targets,
            "linear_cross_entropy": partial(linear_cross_entropy, impl="cce_exact"),
        }
        exec(code, names)
        losses.append(names["loss"])
    torch.testing.assert_close(losses[1].float(), losses[0])  # the one that has logits casts them to fp32
    got, wanted = (torch.autograd.grad(loss, (x, lm_head.weight)) for loss in losses)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


FILE = "bench_h200.json"


def results(file: str, shape: str) -> list[dict[str, Any]]:
    """The rows of forward + backward in a results file."""
    rows = json.loads((README.parent / "bench" / "results" / file).read_text())["rows"]
    return [r for r in rows if (r["shape"], r["kind"]) == (shape, "loss-fw-bw")]


def figures(file: str, shape: str, method: str) -> list[str]:
    """As README writes them: time, memory, errors."""
    (row,) = [r for r in results(file, shape) if r["method"] == method]
    time = f"{row['runtime_ms']:.2f} ms ({row['x_mm']:.2f} ×)"
    return [time, f"{row['op_mem_mb']:.0f} MB", f"{row['de_err']:.3f}, {row['dc_err']:.3f}"]


NAMES = {"Gemma 2": "gemma2", "Llama 3": "llama3", "GPT-2": "gpt2", "real": "8192,1024,131072"}


def rows_of_tables(name: str) -> list[list[str]]:
    """The cells after the first of each row that begins with a name."""
    lines = README.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith(f"| {name}")]
    return [[cell.strip(" *") for cell in row[1:]] for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_the_results_tables(name):
    """They say what the file says."""
    ours_and_dense, others = rows_of_tables(name)
    assert ours_and_dense == figures(FILE, NAMES[name], "cce") + figures(FILE, NAMES[name], "baseline")
    methods = ("cce", "cce_fp8", "cce_exact", "compiled_baseline", "apple_cce", "liger")
    rows = {r["method"]: r for r in results(FILE, NAMES[name])}
    times = [f"{rows[m]['runtime_ms']:#.3g}".rstrip(".") for m in methods]
    assert others == [f"{time} ms, {rows[m]['de_err']:.3f}" for time, m in zip(times, methods, strict=True)]
