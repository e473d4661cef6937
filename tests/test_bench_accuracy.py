"""How true log-probabilities are: the study of it. No assertion on a time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm", reason="the study needs tqdm")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from bench.peers.methods import LOGPROBS
from bench.problems import inputs, shapes
from bench.report import files
from bench.studies import accuracy


def run_accuracy(monkeypatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["accuracy", "--device", "cpu", *options])
    return accuracy.main()


def test_accuracy(tmp_path, monkeypatch, capsys):
    """bf16 logits cost thousands of times what ours lose; what is missing says so; ignored tokens count for nothing."""
    monkeypatch.setattr(accuracy, "BLOCK_LOGITS", 20 * 600)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    p = inputs.lm(50, 64, 600, dtype=torch.bfloat16)
    p.targets[10:20] = -100
    e = p.e.clone()
    e[10:20] = float("nan")
    (tmp_path / "private").mkdir()
    torch.save({"e": e, "c": p.c, "targets": p.targets}, tmp_path / "private" / "model.pt")
    out = tmp_path / "accuracy.json"
    options = ["--data", "lm", f"saved:{tmp_path}/private/model.pt", "--shape", "70,64,512"]
    names = ["cce", "fp32_head", "torch", "liger"]
    assert run_accuracy(monkeypatch, *options, "--methods", *names, "--out", str(out)) == 0
    result = json.loads(out.read_text())
    assert files.check(result) == "accuracy" and "private" not in out.read_text()
    rows = {(r["data"], r["method"]): r for r in result["rows"]}
    assert list(rows) == [(data, name) for data in ("lm", "saved:model.pt") for name in names]
    assert [rows[data, "cce"]["n"] for data in ("lm", "saved:model.pt")] == [70, 50]
    for (_, name), row in rows.items():
        for of in ("logprobs", "entropy"):
            rms, largest = row[f"{of}_rms"], row[f"{of}_max"]
            if name == "liger":
                assert rms is largest is None and row["note"].startswith(("missing", "failed"))
            elif name == "torch":
                assert 1e-3 < rms < largest < 0.5
            else:
                assert 0 < rms < largest < 1e-4
    printed = capsys.readouterr().out
    assert "| saved:model.pt | linear_logprobs | " in printed and "\nliger: " in printed
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_accuracy_is_against_fp64_of_the_same_inputs(monkeypatch):
    p = inputs.lm(50, 64, 600, dtype=torch.bfloat16)
    monkeypatch.setattr(accuracy, "BLOCK_LOGITS", 16 * 600)
    found = accuracy.exact(p, 3.0)
    z = 3.0 * torch.tanh(p.e.double() @ p.c.double().T / 3.0)
    prob = z.softmax(1)
    true = (prob.log().gather(1, p.targets[:, None])[:, 0], -(prob * prob.log()).sum(1))
    for x, y in zip(found, true, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    shifted = (true[0].float() + torch.tensor([0.25, -0.75]).repeat(25), None)
    lacking = replace(LOGPROBS["liger"], load=lambda softcap: lambda e, c, t: shifted, name="liger")
    infinite = replace(LOGPROBS["trl"], load=lambda softcap: lambda e, c, t: (true[0] / 0, true[1]))
    monkeypatch.setitem(LOGPROBS, "liger", lacking)
    monkeypatch.setitem(LOGPROBS, "trl", infinite)
    liger, trl = accuracy.measure("lm", shapes.of(50, 64, 600), p, ["liger", "trl"], 3.0)
    assert liger["logprobs_max"] == pytest.approx(0.75, abs=1e-5)
    assert liger["logprobs_rms"] == pytest.approx((0.5 * (0.25**2 + 0.75**2)) ** 0.5, abs=1e-5)
    assert liger["entropy_rms"] is None and liger["note"] == LOGPROBS["liger"].note
    assert trl["logprobs_rms"] is None and trl["note"] == "WRONG: logprobs is not finite"
    assert trl["entropy_max"] < 1e-12


def test_a_failure_of_ours_is_the_status(monkeypatch, capsys):
    def fails(softcap):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(LOGPROBS, "cce", replace(LOGPROBS["cce"], load=fails))
    assert run_accuracy(monkeypatch, "--shape", "16,64,100", "--methods", "cce", "torch") == 1
    assert "linear_logprobs: failed: no kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "real"], "--data: expected lm, randn, uniform or saved:FILE, got 'real'"),
        (["--data", "saved:/no/such/file"], "--data: "),
        (["--methods", "mm"], "argument --methods: invalid choice: 'mm'"),
        (["--shape", "gpt5"], "argument --shape: expected N,D,V or one of gemma2"),
        (["--out", "a.txt"], "--out: expected a .json file, got 'a.txt'"),
    ],
)
def test_mistakes(options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_accuracy(monkeypatch, *options)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
