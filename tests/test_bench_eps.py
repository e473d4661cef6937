"""The benchmark on several kinds of data in one run, and its table of time against gradient error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.results import META, made_up

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from bench import __main__ as cli
from bench.measure import memory, timing, worker
from bench.measure.rows import empty_rows
from bench.peers.methods import METHODS
from bench.problems import inputs, shapes
from bench.report import eps, files, plot, tables


@pytest.fixture
def one_thread():
    """Hundreds of tiny calls: on busy cores PyTorch's threads would wait for each other in every one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_several_kinds_of_data(one_thread, tmp_path, monkeypatch, capsys):
    """lm inputs and a saved problem of the same shape in one file; what the eps costs and buys, dense torch first."""
    p = inputs.lm(16, 64, 2048, dtype=torch.bfloat16)
    folder = tmp_path / "private"
    folder.mkdir()
    origin = {"of": "a model"}
    torch.save({"e": 3 * p.e, "c": p.c, "targets": p.targets, "origin": origin}, folder / "model.pt")

    def in_this_process(job, left):
        state = worker.State(Path("unused"))
        state.save = lambda: None
        worker.Shapework(job, state).run()
        return state.rows, state.statistics

    monkeypatch.setattr(cli, "measure", in_this_process)
    monkeypatch.setattr(memory, "peaks", lambda *a: dict.fromkeys(timing.KINDS, 1.0))
    out = tmp_path / "results.json"
    options = ["--data", "lm", f"saved:{folder}/model.pt", "--shape", "16,64,2048", "--dtype", "bfloat16"]
    options += ["--device", "cpu", "--methods", "baseline", "cce_exact", "cce_eps6", "cce_eps7", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    assert cli.main([*options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out

    assert "private" not in out.read_text()
    result = json.loads(out.read_text())
    assert files.check(result) == "bench" and "--data lm saved:model.pt --shape" in result["meta"]["command"]
    assert {r["data"] for r in result["rows"]} == {"lm", "saved:model.pt"}
    assert result["meta"]["data_origin"] == {"saved:model.pt": origin}
    given = result["meta"]["data_statistics"]
    assert given["16,64,2048 lm"]["entropy"] > 1.5 * given["16,64,2048 saved:model.pt"]["entropy"] > 0

    assert cli.main(["eps", str(out), "--out", str(tmp_path / "eps.md")]) == 0
    text = (tmp_path / "eps.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and text.strip() in printed
    blocks = [[line for line in b.splitlines() if line.startswith("| ")] for b in text.split("N=16 D=64 V=2048, ")[1:]]
    titles = [b.splitlines()[0].split(", bfloat16")[0] for b in text.split("N=16 D=64 V=2048, ")[1:]]
    assert titles == ["lm", "saved:model.pt"]
    rows = {(r["data"], r["method"]): r for r in result["rows"] if r["kind"] == "loss-fw-bw"}
    for data, lines in zip(titles, blocks, strict=True):
        names = ["dense torch (`baseline`)", "`cce`, eps 2^-6", "`cce`, eps 2^-7", "`cce_exact`"]
        cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines[1:]]
        assert [c[0] for c in cells] == names
        for method, c in zip(("baseline", "cce_eps6", "cce_eps7", "cce_exact"), cells, strict=True):
            row = rows[data, method]
            one = [row["de_err"], row["dc_err"]]
            eight = [row["de_err_mean8"], row["dc_err_mean8"]] if method.startswith("cce_eps") else one
            assert (c[5:7] == c[7:]) == (not method.startswith("cce_eps"))
            assert c[5:] == [f"{x:.2e}" for x in (*one, *eight)]
            assert c[3] == f"{row['runtime_ms']:.2f}"
    short = tables.short_table(result["rows"])
    assert sum("saved:model.pt" in line for line in short.splitlines()) == 5
    (dense,) = (line.split() for line in short.splitlines() if " lm " in line and " baseline " in line)
    row = rows["lm", "baseline"]
    assert dense[-2:] == [f"{row['de_err']:.1e}", f"{row['dc_err']:.1e}"] and "dE error dC error" in short
    assert plot.main([str(out)]) == 0


def test_an_eps_table_of_what_failed(tmp_path, capsys):
    rows = made_up([(64, 32, 100)], ("mm", "cce_eps6", "liger"))
    rows += empty_rows(shapes.of(64, 32, 100), "lm", "baseline", "failed: out of memory")
    for row in rows:
        if row["method"] == "liger":
            row["note"] = f"gradient error on the first 32 tokens; {METHODS['liger'].note}"
    text = eps.tables(META, rows)
    assert "| dense torch (`baseline`) | – | – | – | – | – | – | – | – |" in text
    assert "\ndense torch (`baseline`): failed: out of memory" in text
    assert text.endswith("\n`liger`: gradient error on the first 32 tokens")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["eps", str(tmp_path / "none.json")])
    assert "expected meta and rows" in capsys.readouterr().err
