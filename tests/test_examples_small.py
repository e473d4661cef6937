"""The small examples as programs, as their readers start them, and the notebook as CI executes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import EXAMPLES, ROOT

SMALL = ("minimal.py", "hf_trainer.py", "fsdp2_tp.py", "idea.ipynb")
NOTEBOOK = EXAMPLES / "idea.ipynb"
IMPOLITE = "tests/support/impolite.py"
# On busy cores PyTorch's threads wait for each other for minutes.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# The package of this clone, as in the tests themselves.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def output_of(*command: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def first_line(example: Path) -> str:
    if example.suffix == ".ipynb":
        nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
        return nbformat.read(example, as_version=4).cells[0].source.splitlines()[0]
    return example.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("name", SMALL)
def test_the_first_line_says_how_long_it_takes(name):
    assert re.search(r"\b(second|minute)s?\b", first_line(EXAMPLES / name))


def test_the_page_has_every_example():
    """docs/examples.md: each program and notebook, with a command; what they share is no example."""
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    shared = {"arguments.py", "model.py", "report.py", "text.py", "tiny_llama.py", "training.py"}
    examples = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - shared
    assert set(SMALL) <= examples
    assert set(re.findall(r"\]\(\.\./examples/([\w.]+)\)", page)) == examples
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    assert all(f"examples/{name}" in commands for name in examples)


def test_minimal():
    losses = [float(x) for x in re.findall(r"step +\d+: loss ([\d.]+)", output_of("examples/minimal.py"))]
    assert len(losses) == 5
    assert 10 < losses[0] < 11  # log 32768 is 10.4
    assert losses[-1] < 2


@pytest.mark.slow
def test_hf_trainer():
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    watched = (
        "import runpy, cce_ext.transformers as t; patch = t.cce_patch; "
        "t.cce_patch = lambda model, **options: (print('patched'), patch(model, **options)); "
        "runpy.run_path('examples/hf_trainer.py', run_name='__main__')"
    )
    printed = output_of("-c", watched)
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", printed)]
    ours, own = re.search(r"held-out loss ([\d.]+), by the model's own logits ([\d.]+)", printed).groups()
    assert "patched" in printed
    assert float(ours) == pytest.approx(float(own), abs=2e-4)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "impl"), [(2, "cce"), (4, "cce_exact")])
def test_fsdp2_times_tensor_parallel(processes, impl):
    """It compares its losses with one process's itself, and exits with 1 if they differ."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), IMPOLITE)
    printed = output_of(*launcher, "examples/fsdp2_tp.py", "--impl", impl)
    assert f"{processes // 2} x 2 processes, cpu; of the classifier [32768, 128] each has " in printed
    assert f"each has [{32768 // processes}, 128]" in printed
    losses = re.findall(r"loss ([\d.]+), of one process ([\d.]+)", printed)
    assert float(losses[0][0]) > 10 and float(losses[-1][0]) < 4
    if impl == "cce_exact":
        assert all(float(a) == pytest.approx(float(b), abs=2e-4) for a, b in losses)


def test_fsdp2_without_torchrun():
    assert "torchrun --nproc-per-node" in output_of("examples/fsdp2_tp.py", status=1)


@pytest.mark.slow
def test_the_notebook_runs():
    """From top to bottom, and shows what it says that it shows."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kernel = {"cwd": str(EXAMPLES), "env": ENVIRONMENT}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(**kernel)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == (4 if sys.platform == "linux" else 3)

    visits = re.search(r"([\d.]+) of 64 tiles visited a token; they hold ([\d.]+)%", printed)
    assert 1 < float(visits[1]) < 32 and float(visits[2]) > 50
    without_over_with = re.search(r"dE ([\d.]+) ×, dC ([\d.]+) ×", printed)
    assert float(without_over_with[1]) > 2 and float(without_over_with[2]) > 1
    powers = re.search(r"power of −([\d.]+) \(dE\) and −([\d.]+) \(dC\)", printed)
    assert all(float(x) == pytest.approx(0.5, abs=0.08) for x in powers.groups())
    if sys.platform == "linux":
        ours, dense = re.search(r"(\d+) MB, and dense (\d+) MB", printed).groups()
        assert float(ours) < float(dense) / 10


def test_the_committed_notebook():
    """Executed in order, without an error or a warning, small, and nothing of the machine that executed it in it."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r'"(/|~|[^"\n]*(/home|/root|/tmp|/Users))', re.sub(r'"image/png": "[^"]*"', "", text))
