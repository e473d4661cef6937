"""The benchmark of other regimes from the command to its file, tables and plot; the host's time of a call."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from support.results import META, made_up

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from support.jobs import measure, processes, quick, small_job  # noqa: F401

from bench import __main__ as cli
from bench.measure import host, timing, worker
from bench.peers.method import LossStep
from bench.peers.methods import METHODS
from bench.problems import inputs
from bench.report import eps, files, plot, tables

# ---- the host's time ----


class Fake:
    def __init__(self) -> None:
        self.forwards = self.released = 0

    def forward(self) -> None:
        assert self.forwards == self.released
        self.forwards += 1

    def backward(self) -> None:
        pass

    def release(self) -> None:
        self.released += 1


def test_the_host_is_timed_over_many_calls(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(host.time, "perf_counter", lambda: 1e-6 * next(clock))
    steps = {"quick": Fake(), "slow": Fake()}
    times = host.microseconds(steps, "cpu", few=frozenset({"slow"}))
    assert len(times["quick"].forward) == host.ROUNDS * host.CALLS and len(times["slow"].forward) == host.ROUNDS
    assert steps["quick"].forwards == (host.ROUNDS + host.WARMUP) * host.CALLS
    assert times["quick"].of("loss-fw-bw") == pytest.approx([2.0] * host.ROUNDS * host.CALLS)
    assert host.microseconds({"a": Fake()}, "cpu", deadline=0)["a"].forward == []


def test_host_is_a_column_where_it_is_asked_for():
    without, asked = (measure(small_job(methods=["mm", "cce"], host=x)) for x in (False, True))
    assert all(r["host_us"] is None for r in without.values())
    for method in ("mm", "cce"):
        forward, backward, both = (asked[method, kind]["host_us"] for kind in timing.KINDS)
        assert min(forward, backward) > 0 and max(forward, backward) < both
    table = tables.table(list(asked.values()))
    assert "host us" in table and "x live" not in table
    assert "host us" not in tables.table(list(without.values()))
    assert f"{asked['cce', 'loss-fw-bw']['host_us']:.0f}" in tables.short_table(list(asked.values()))


@pytest.mark.parametrize("name", ["cce_compiled", "cce_exact_compiled"])
def test_compiled_methods_are_the_function_compiled(name, monkeypatch):
    told = []

    def compile_(function, **options):
        told.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    p = inputs.lm(16, 64, 300, dtype=torch.float32)
    given = []
    for method in (name, name.removesuffix("_compiled")):
        step = LossStep(METHODS[method].load(5.0), p)
        torch.manual_seed(0)
        step.forward()
        step.backward()
        given.append((step.loss, *step.gradients))
    assert told == [{"fullgraph": True}] and METHODS[name].compiled and METHODS[name].on_request
    assert all(torch.equal(x, y) for x, y in zip(*given, strict=True))


# ---- the command ----


def in_this_process(job, left):
    state = worker.State(Path("unused"))
    state.save = lambda: None
    worker.Shapework(job, state).run()
    return state.rows, state.statistics


def test_the_command(tmp_path, monkeypatch, capsys):
    """Several shares in one file, none among them: tables, the eps table, the short one and the plot."""
    monkeypatch.setattr(cli, "measure", in_this_process)
    out = tmp_path / "results.json"
    options = ["--shape", "32,64,256", "--ignored", "0", "0.5", "0.75", "0.5", "--spans", "--frozen", "c"]
    options += ["--device", "cpu", "--methods", "baseline", "cce_exact", "cce_eps6", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    assert cli.main([*options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    meta, rows = files.read_bench(out)
    regimes_ = [
        "c frozen",
        "0.5 ignored in spans, c frozen",
        "live rows of 0.5 ignored in spans, c frozen",
        "0.75 ignored in spans, c frozen",
        "live rows of 0.75 ignored in spans, c frozen",
    ]
    assert list(dict.fromkeys(r["regime"] for r in rows)) == regimes_
    assert len(rows) == 5 * 4 * 3 and {r["data"] for r in rows} == {"lm"}
    assert list(meta["data_statistics"]) == ["32,64,256 lm"]
    blocks = printed.split("\n\n")
    for name, n in zip(regimes_, (32, 32, 16, 32, 8), strict=True):
        assert f"{name}: N={n}\n" in printed
    assert [("x live" in b, b.count("loss-fw-bw")) for b in blocks if "ignored" in b and "runtime_ms" in b] == [
        (True, 8),
        (True, 8),
    ]
    text = eps.tables(meta, rows)
    for name, n in zip(regimes_, (32, 32, 16, 32, 8), strict=True):
        assert f"N={n} D=64 V=256, lm, {name}, float32" in text
    short = tables.short_table(rows)
    assert "x live" in short and len(short.splitlines()) == 1 + 5 * 4
    assert f"lm, {regimes_[2]}" in short
    assert plot.main([str(out)]) == 0


@pytest.mark.usefixtures("processes")
def test_in_processes_of_their_own(tmp_path, monkeypatch):
    """The regime reaches the worker and what measures memory."""
    out = tmp_path / "results.json"
    options = ["--device", "cpu", "--shape", "256,64,8192", "--ignored", "0.75", "--frozen", "c", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    assert cli.main([*options, "--methods", "baseline", "--host", "--out", str(out)]) == 0
    _, rows = files.read_bench(out)
    assert len(rows) == 12 and all(r["host_us"] > 0 for r in rows)
    both = {(r["method"], r["n"]): r for r in rows if r["kind"] == "loss-fw-bw"}
    assert both["baseline", 256]["x_live"] > 0
    assert both["baseline", 256]["de_err"] < 1e-5 and both["baseline", 256]["dc_err"] is None
    if both["baseline", 256]["op_mem_mb"] is not None:
        # fp32 logits of 8 MB, and of 2.
        assert both["baseline", 256]["op_mem_mb"] > both["baseline", 64]["op_mem_mb"] + 4


def test_arguments():
    def parse(*options):
        return cli.parse_arguments(["--device", "cpu", *options])

    args, todo = parse()
    assert (args.ignored, args.spans, args.frozen, args.host) == ([0.0], False, None, False)
    args, todo = parse("--shape", "8,64,70", "--tokens", "64..1024", "30", "128", "--ignored", ".9", "0.5", "--spans")
    assert [s.n for _, s, _ in todo] == [64, 128, 256, 512, 1024, 30] and args.ignored == [0.9, 0.5] and args.spans
    assert [s.n for _, s, _ in parse("--shape", "8,64,70", "--tokens", "5..39")[1]] == [5, 10, 20]
    assert [s.n for _, s, _ in parse("--shape", "8,64,70", "--tokens", "5..40")[1]] == [5, 10, 20, 40]
    assert [s.n for _, s, _ in parse("--shape", "8,64,70", "--tokens", "7..7")[1]] == [7]
    assert parse("--frozen", "e", "--host")[0].frozen == "e"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ignored", "1"], "argument --ignored: expected a share of at least 0 and below 1, got '1'"),
        (["--ignored", "-0.1"], "argument --ignored: expected a share of at least 0 and below 1, got '-0.1'"),
        (["--ignored", "nan"], "argument --ignored: expected a share of at least 0 and below 1, got 'nan'"),
        (["--ignored", "most"], "argument --ignored: expected a share of at least 0 and below 1, got 'most'"),
        (["--ignored", "0.01", "--shape", "8,64,70"], "--ignored 0.01: of N=8 tokens that is none or all"),
        (["--ignored", "0.99", "--shape", "8,64,70"], "--ignored 0.99: of N=8 tokens that is none or all"),
        (["--ignored", "0.5", "--data", "lm", "saved:x"], "--ignored: saved inputs have their own"),
        (["--spans"], "--spans: there is no --ignored"),
        (["--spans", "--ignored", "0"], "--spans: there is no --ignored"),
        (["--frozen", "bias"], "argument --frozen: invalid choice: 'bias'"),
        (["--tokens", "64..8"], "argument --tokens: expected A..B with A <= B, got '64..8'"),
        (["--tokens", "..8"], "argument --tokens: expected a number of 1 or more, got ''"),
        (["--tokens", "8..x"], "argument --tokens: expected a number of 1 or more, got 'x'"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


# ---- files, tables, plots ----


def test_files_of_before_are_read():
    """Rows without the columns that came later, and no row with some of these only."""
    rows = made_up([(64, 32, 100)])
    old = copy.deepcopy(rows)
    for row in old:
        for key in ("regime", "x_live", "host_us"):
            del row[key]
    assert files.check({"meta": META, "rows": old}) == "bench"
    del rows[0]["host_us"]
    with pytest.raises(ValueError, match=r"a row has \['host_us'\] too many or too few"):
        files.check({"meta": META, "rows": rows})


def test_rows_of_two_regimes_are_two_measurements(tmp_path):
    rows = made_up([(64, 32, 100)])
    frozen = [row | {"regime": "c frozen", "runtime_ms": 9.0, "runtime_p80": 9.0} for row in rows]
    files.save(tmp_path / "a.json", META, rows + frozen)
    _, back = files.read_bench(tmp_path / "a.json")
    places = [plot.place(r) for r in plot.measured(back)]
    assert sorted(set(places)) == [(64, 32, 100, "lm"), (64, 32, 100, "lm, c frozen")] and len(places) == 4
    assert plot.find_sweeps(list(dict.fromkeys(places))) == ([], list(dict.fromkeys(places)))
    with pytest.raises(ValueError, match="same measurement"):
        files.check({"meta": META, "rows": rows + frozen + frozen[:1]})


def test_plot_of_a_sweep_over_tokens(tmp_path, monkeypatch):
    """Time against N on two log axes, a line a method and a dashed one where the host was timed."""
    from matplotlib.figure import Figure

    names = ("mm", "cce", "baseline", "compiled_baseline")
    counts = [64 << k for k in range(9)]
    rows = made_up([(n, 64, 1000) for n in counts], names)
    for row in rows:
        row["host_us"] = 100.0 if row["method"] == "cce" else None
    file = tmp_path / "tokens.json"
    files.save(file, META, rows)
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (figures.append(self), savefig(self, *a, **o)))
    assert cli.main(["plot", str(file)]) == 0 and file.with_suffix(".png").stat().st_size > 10_000
    (axes,) = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "tokens N")
    assert [x.get_text() for x in axes.get_xticklabels()] == [str(n) for n in counts]
    drawn = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "-"}
    assert list(drawn) == list(names)
    for name, line in drawn.items():
        expected = [r["runtime_ms"] for r in rows if r["method"] == name and r["kind"] == "loss-fw-bw"]
        assert list(line.get_xdata()) == counts and list(line.get_ydata()) == expected
    (dashed,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert set(dashed.get_ydata()) == {0.1} and dashed.get_color() == drawn["cce"].get_color()
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [*names, "dashed: the host's time"]

    for row in rows:
        row["host_us"] = None
    files.save(file, META, rows)
    assert cli.main(["plot", str(file)]) == 0
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == list(names)


def test_the_table_has_the_ratio():
    rows = made_up([(64, 32, 100)], ("cce",))
    for row in rows:
        row["x_live"], row["regime"] = 1.148, "0.75 ignored in spans"
    table = tables.table(rows).splitlines()
    assert table[0].split("x live")[0].endswith("x mm  ") and len(table) == 4
    at = table[0].index("x live") + len("x live")
    assert all(line[at - 4 : at] == "1.15" for line in table[1:])
    assert json.loads(json.dumps(rows)) == rows
