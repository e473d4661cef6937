"""examples/train_hf.py through its command line, at tiny settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import EXAMPLES, exit_of

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.usefixtures("accelerate")

ARGPARSE = __import__("argparse").__file__
TINY = (
    *("--vocab", "300", "--context", "16", "--batch", "2", "--steps", "4", "--device", "cpu"),
    *("--log-every", "1", "--eval-every", "4", "--eval-tokens", "64", "--save-every", "2"),
)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Runs the script and gives its exit status (or message) and what it printed."""

    def run(*args: str, out: str = "out") -> tuple[str | int | None, str]:
        folders = ("--out", str(tmp_path / out), "--cache", str(tmp_path / "cache"))
        code = exit_of("train_hf.py", (*TINY, *folders, *args), monkeypatch)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def held_out_loss(printed: str) -> float:
    return float(re.search(r"held-out loss ([\d.]+) after 4 steps", printed)[1])


def logged(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def accuracies(folder: Path) -> list[float]:
    """Of each log of training, and of evaluation."""
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    names = ("token_accuracy", "eval_token_accuracy")
    return [entry[name] for name in names for entry in state["log_history"] if name in entry]


def test_text_checkpoints_and_resume(train, tmp_path, monkeypatch):
    """An interrupted run goes on as the uninterrupted one, and as the unpatched model's."""
    from cce_ext import transformers as patching

    impls, patch = [], patching.cce_patch
    monkeypatch.setattr(
        patching, "cce_patch", lambda model, impl, **options: [impls.append(impl), patch(model, impl, **options)]
    )
    code, printed = train("--text", ARGPARSE, "--impl", "cce_exact")
    assert code == 0, printed
    loss, losses = held_out_loss(printed), logged(tmp_path / "out")
    assert len(losses) == 4
    assert len(accuracies(tmp_path / "out")) == 5 and all(0 <= x < 0.5 for x in accuracies(tmp_path / "out"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }

    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    code, printed = train("--text", ARGPARSE, "--impl", "cce_exact", "--resume")
    assert code == 0 and held_out_loss(printed) == pytest.approx(loss, abs=1e-4)
    assert logged(tmp_path / "out") == pytest.approx(losses, rel=1e-4)

    code, printed = train("--text", ARGPARSE, "--impl", "baseline", out="baseline")
    assert code == 0 and held_out_loss(printed) == pytest.approx(loss, abs=1e-3)
    assert logged(tmp_path / "baseline") == pytest.approx(losses, rel=1e-3)

    code, printed = train("--model", str(tmp_path / "out"), "--text", ARGPARSE, out="pretrained")
    assert code == 0 and logged(tmp_path / "pretrained")[0] < losses[0]
    assert impls == ["cce_exact", "cce_exact", "cce"]  # none for the baseline


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_two_processes_train_as_one(train, tmp_path):
    """By train_hf.sh: two processes with two sequences each, and one with four."""
    code, printed = train("--text", ARGPARSE, "--impl", "cce_exact", "--batch", "4")
    assert code == 0, printed
    options = (*TINY, "--text", ARGPARSE, "--impl", "cce_exact", "--batch", "2", "--cache", str(tmp_path / "cache"))
    environment = {"PROCESSES": "2", "OUT": str(tmp_path / "two")}
    two = output_of("bash", str(EXAMPLES / "train_hf.sh"), *options, **environment)
    assert logged(tmp_path / "two" / "llama") == pytest.approx(logged(tmp_path / "out"), rel=1e-3)
    assert accuracies(tmp_path / "two" / "llama") == pytest.approx(accuracies(tmp_path / "out"), abs=0.02)
    assert held_out_loss(two) == pytest.approx(held_out_loss(printed), abs=1e-3)


# Whoever still holds the group when it is destroyed waits for its threads with the interpreter's lock, which they want.
WATCHED = """
import os, runpy, sys
from pathlib import Path
from torch import distributed

def destroy(destroy=distributed.destroy_process_group):
    destroy()
    threads = [x.read_text().strip() for x in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in x for x in threads):
        print("threads of a destroyed group:", threads, file=sys.stderr, flush=True)
        os._exit(1)

distributed.destroy_process_group = destroy
sys.setswitchinterval(1000.0)  # as support/impolite.py, which says why
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_held_out_loss_of_two_processes(train, tmp_path):
    """Seven held-out rows in batches of two: the Trainer fills the last one with rows that have been there already."""
    pairs = [("ab"[i % 2] * 3, "z" * (i // 10)) for i in range(140)]
    file = write_instructions(tmp_path / "pairs.jsonl", pairs)
    options = ("--instructions", file, "--context", "64", "--lr", "1e-12")
    code, printed = train(*options)
    assert code == 0, printed
    folders = ("--out", str(tmp_path / "two"), "--cache", str(tmp_path / "cache"))
    watched = tmp_path / "watched.py"
    watched.write_text(WATCHED)
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(watched))
    two = output_of(*launch, str(EXAMPLES / "train_hf.py"), *TINY, *folders, *options)
    assert held_out_loss(two) == pytest.approx(held_out_loss(printed), abs=2e-4)


def output_of(*command: str, **environment: str) -> str:
    """What it prints; python is this one."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_instructions(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return str(path)


def test_instructions(train, tmp_path):
    """The prompt has no loss: with prompts of noise and one response, the loss falls below what the prompts allow."""
    pairs = [(chr(97 + i % 26) * 3, "yes") for i in range(40)]
    file = write_instructions(tmp_path / "pairs.jsonl", [*pairs, ("long " * 40, "never seen")])
    code, printed = train("--instructions", file, "--scratch", "gemma2", "--accumulate", "2", "--checkpointing")
    assert code == 0, printed
    assert "1 instructions have no response within --context 16" in printed
    assert held_out_loss(printed) < 5.0


@pytest.mark.parametrize("impl", ["cce", "baseline"])
def test_the_held_out_loss_is_that_of_the_tokens(train, tmp_path, impl):
    """Whatever the batch: responses of very different lengths, and a model that is as it was."""
    pairs = [("ab"[i % 2] * 3, "z" if i % 40 else "other words " * 3) for i in range(120)]
    file = write_instructions(tmp_path / "pairs.jsonl", pairs)
    losses = []
    for batch in ("1", "3", "6"):
        more = ("--impl", impl, "--lr", "1e-12", "--batch", batch, "--context", "64")
        code, printed = train("--instructions", file, *more, out=f"out{batch}")
        assert code == 0, printed
        losses.append(held_out_loss(printed))
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-4)


def test_labels_of_instructions(monkeypatch):
    """Prompt -100, then the response and the end; cut at the context."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    from train_hf import instruction_rows

    class Characters:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [*([1] if add_special_tokens else []), *map(ord, text)]}

    rows = instruction_rows([("ab", "cd"), ("abcd", "e"), ("abcde", "f")], Characters(), 6)
    assert rows == [
        {"input_ids": [1, 97, 98, 99, 100, 0], "labels": [-100, -100, -100, 99, 100, 0]},
        {"input_ids": [1, 97, 98, 99, 100, 101], "labels": [-100, -100, -100, -100, -100, 101]},
    ]


def test_mistakes(train, tmp_path):
    for args, message in (
        (("--impl", "magic"), "magic"),
        (("--resume",), "there is no checkpoint"),
        (("--scan", "fp8"), "--scan fp8: takes a Hopper GPU, not --device cpu"),
        (("--scan", "fp8", "--impl", "cce_exact"), "for --impl cce, whose gradient is sampled, not cce_exact"),
        (("--model", "x", "--scratch", "llama"), "not allowed with"),
    ):
        code, printed = train(*args)
        assert code == 2 and message in printed

    (tmp_path / "empty").mkdir()
    code, _ = train("--model", str(tmp_path / "empty"))
    assert "error: --model" in str(code)
    folder = {name: tmp_path / name for name in ("config.json", "pairs.jsonl", "short.txt")}
    folder["short.txt"].write_text("one two three\n")
    for args, content, message in (
        (("--scratch", "config.json"), None, "neither llama nor gemma2, nor a file"),
        (("--scratch", "config.json"), "{", "is not JSON"),
        (("--scratch", "config.json"), "[]", "has no model_type"),
        (("--scratch", "config.json"), '{"model_type": "lama"}', "lama"),
        (("--instructions", "pairs.jsonl"), None, "cannot read"),
        (("--instructions", "pairs.jsonl"), "{}\n", 'line 1: expected {"prompt"'),
        (("--instructions", "pairs.jsonl"), "\nx\n", "line 2, is not JSON"),
        (("--instructions", "pairs.jsonl"), '{"prompt": "a", "response": "b"}', "has 1 instructions"),
        (("--text", "short.txt"), None, "fewer than --context 16"),
    ):
        if content is not None:
            folder[args[1]].write_text(content)
        text = ("--text", ARGPARSE) if args[0] == "--scratch" else ()
        code, _ = train(args[0], str(folder[args[1]]), *text)
        assert message in str(code)
