"""examples/train.py through its command line, at tiny settings."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import EXAMPLES, exit_of

TRAIN = EXAMPLES / "train.py"
TINY = (
    *("--vocab", "512", "--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "4"),
    *("--eval-every", "4", "--eval-tokens", "64", "--device", "cpu"),
    *("--text", argparse.__file__),
)


def run(args: tuple[str, ...], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(TRAIN), *args, "--out", str(folder / "out"), "--cache", str(folder / "cache")]
    # A shell has what it runs in the background ignore SIGINT, and its children with it: not so the one of this test.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)


def error_of(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, folder: Path) -> str | int | None:
    return exit_of("train.py", (*args, "--cache", str(folder / "cache")), monkeypatch)


def test_help() -> None:
    """As a program, from the root of a clone."""
    command = [sys.executable, "examples/train.py", "--help"]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--impl" in done.stdout


@pytest.mark.slow
def test_comparison(tmp_path: Path) -> None:
    process = run(("--impl", "cce_exact", "baseline", "--steps", "6", "--softcap", "30", *TINY), tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "cce_exact" in output and "tokens/s" in output
    out = tmp_path / "out"
    result = json.loads((out / "comparison.json").read_text())
    exact, baseline = result["runs"]["cce_exact"], result["runs"]["baseline"]
    assert exact["train_loss"] == pytest.approx(baseline["train_loss"], abs=1e-3)  # same weights, same batches
    assert exact["held_out_loss"] == pytest.approx(baseline["held_out_loss"], abs=1e-3)
    assert len(exact["train_loss"]) == 6
    assert exact["held_out_step"] == [4, 6]
    assert exact["tokens_per_second"] > 0 and exact["peak_memory_bytes"] > 0
    assert json.loads((out / "baseline.json").read_text())["runs"]["baseline"] == baseline
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_saves(tmp_path: Path) -> None:
    process = run(("--steps", "1000000", "--z-loss", "1e-4", *TINY), tmp_path)
    assert process.stderr is not None
    seen = ""
    while "held-out=" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, seen + errors
    run_ = json.loads((tmp_path / "out" / "cce.json").read_text())["runs"]["cce"]
    assert run_["interrupted"] and run_["train_loss"]


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (("--impl", "magic"), "magic"),
        (("--vocab", "256"), "257"),
        (("--steps", "0"), "must be 1 or more"),
        (("--steps", "abc"), "expected a whole number, got 'abc'"),
        (("--lr", "fast"), "expected a number, got 'fast'"),
        (("--width", "20", "--heads", "4"), "--heads 4"),
        (("--scan", "fp4"), "fp4"),
        (("--scan", "fp8", "--device", "cpu"), "--scan fp8: takes a Hopper GPU, not --device cpu"),
        (
            ("--scan", "fp8", "--impl", "cce", "baseline"),
            "for --impl cce, whose gradient is sampled, not cce, baseline",
        ),
        (("--scan", "fp8", "--impl", "all"), "for --impl cce, whose gradient is sampled, not cce, cce_exact"),
    ):
        assert error_of(args, monkeypatch, tmp_path) == 2
        assert message in capsys.readouterr().err

    missing = tmp_path / "missing.txt"
    assert str(missing) in str(error_of(("--text", str(missing)), monkeypatch, tmp_path))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in str(error_of(("--text", str(binary)), monkeypatch, tmp_path))
    short = tmp_path / "short.txt"
    short.write_text("one two three four five six seven\n" * 4)
    assert "--context 256" in str(error_of(("--text", str(short)), monkeypatch, tmp_path))
    assert "too small to fill" in capsys.readouterr().out

    monkeypatch.setitem(sys.modules, "tqdm", None)
    message = str(error_of((), monkeypatch, tmp_path))
    assert "tqdm" in message and 'pip install ".[train]"' in message
