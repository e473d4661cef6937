"""The benchmark: its inputs, its errors, what it does with peers, its files. No assertion on a time."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.results import META, made_up
from support.scanned import taken

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")

from support.jobs import measure, small_job

from bench import __main__ as cli
from bench.measure import errors, memory, timing, worker
from bench.measure.rows import empty_rows
from bench.peers.method import Method
from bench.peers.methods import EPS, METHODS
from bench.problems import inputs, shapes
from bench.problems.statistics import statistics
from bench.report import files, origin, plot, tables
from bench.studies import backward, energy, overhead, portable, ranks
from cce_ext import linear_cross_entropy, reference
from cce_ext import portable as portable_kernels
from cce_ext.measure import phase_peaks

RESULTS = sorted((Path(__file__).parents[1] / "bench" / "results").glob("*.json"))


# ---- inputs ----


def test_lm_inputs_are_as_the_recipe_says():
    """Of what docs/design.md states for large shapes, the figures that hardly depend on the shape."""
    figures = statistics(inputs.lm(512, 512, 32768, dtype=torch.float32))
    assert figures["above"] == pytest.approx(106, rel=0.25)
    assert figures["entropy"] == pytest.approx(2.5, rel=0.25)
    assert figures["mass_below"] == pytest.approx(0.10, rel=0.4)
    assert figures["tiles256"] * 32768 / 256 == pytest.approx(28, rel=0.35)
    assert figures["visits"] == pytest.approx(10.3, rel=0.3)


def test_statistics_count_what_they_say():
    p = inputs.randn(300, 60, 700, dtype=torch.float32)
    p = inputs.Problem(4 * p.e, p.c, p.targets)
    prob = (p.e.double() @ p.c.double().T).softmax(1)
    got = statistics(p, block=128)
    big = prob > 2**-12
    tiles = torch.stack([t.any(1) for t in big.split(256, 1)], 1)
    blocks = torch.stack([rows.any(0) for rows in tiles.split(128)]).double()
    rows = torch.tensor([128, 128, 44])
    assert got["above"] == pytest.approx(big.sum(1).double().mean().item())
    assert got["tiles256"] == pytest.approx(tiles.double().mean().item())
    assert got["blocks"] == pytest.approx(((blocks.mean(1) * rows).sum() / 300).item())
    assert got["entropy"] == pytest.approx(-(prob * prob.log()).sum(1).mean().item(), rel=1e-4)
    assert got["mass_below"] == pytest.approx((prob * ~big).sum(1).mean().item(), rel=1e-3)
    visits = sum((t.norm(dim=1) * 255).clamp(max=1) for t in prob.split(256, 1))
    assert got["visits"] == pytest.approx(visits.mean().item(), rel=1e-4)


def test_randn_and_uniform():
    logits = inputs.randn(256, 128, 2048, dtype=torch.float64)
    assert (logits.e @ logits.c.T).std().item() == pytest.approx(1, rel=0.05)
    p = inputs.make("uniform", 32, 16, 1000, dtype=torch.float32, device="cpu")
    assert not p.e.any() and p.c.any()
    assert linear_cross_entropy(p.e, p.c, p.targets).item() == pytest.approx(math.log(1000), rel=1e-5)


def test_saved_inputs(tmp_path, capsys):
    p = inputs.lm(48, 64, 300, dtype=torch.float32)
    file = tmp_path / "model.pt"
    targets = p.targets.clone()
    targets[5] = -100
    torch.save({"e": p.e.view(4, 12, 64), "c": p.c, "targets": targets.view(4, 12)}, file)
    back = inputs.saved(file)
    assert torch.equal(back.e, p.e) and torch.equal(back.c, p.c) and torch.equal(back.targets, targets)
    assert inputs.saved(file, dtype=torch.bfloat16).c.dtype == torch.bfloat16
    options = ["--device", "cpu", "--data", f"saved:{file}"]
    assert cli.parse_arguments(options)[1] == [(f"saved:{file}", (f"{48},{64},{300}", 48, 64, 300), None)]
    rows = measure(small_job(data=f"saved:{file}", methods=["baseline"], shape=("48,64,300", 48, 64, 300)))
    assert rows["baseline", "loss-fw-bw"]["de_err"] < 1e-5

    def message(content) -> str:
        torch.save(content, file)
        with pytest.raises(SystemExit):
            cli.parse_arguments(["--device", "cpu", "--data", f"saved:{file}"])
        return capsys.readouterr().err

    assert "a dict with the tensors e, c and targets" in message({"e": p.e, "c": p.c})
    assert "got e [48, 64], c [300, 32], targets [48]" in message({"e": p.e, "c": p.c[:, :32], "targets": targets})
    unknown = {"e": p.e, "c": p.c, "targets": p.targets, "origin": {"loss": math.nan}}
    assert "origin: Out of range float values are not JSON compliant" in message(unknown)
    assert "300 is neither in [0, 300) nor -100" in message({"e": p.e, "c": p.c, "targets": targets.fill_(300)})
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="torch.load cannot read it"):
        inputs.saved(file)


def test_shapes():
    assert shapes.parse("gemma2") == ("gemma2", 8192, 2304, 256000)
    assert shapes.parse("8192,768,50304").name == "gpt2"
    swept = shapes.sweep(shapes.parse("gpt2"), [8192, 64], [1000, 50304])
    assert [s[1:] for s in swept] == [(8192, 768, 1000), (64, 768, 1000), (8192, 768, 50304), (64, 768, 50304)]
    assert [s.name for s in swept] == ["8192,768,1000", "64,768,1000", "gpt2", "64,768,50304"]
    for bad in ("gpt5", "1,2", "1,2,3,4", "a,b,c", "0,1,1"):
        with pytest.raises(ValueError, match=r"expected N,D,V or one of gemma2|must be 1 or more"):
            shapes.parse(bad)


# ---- gradient errors ----


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_exact_gradient(softcap, monkeypatch):
    p = inputs.lm(70, 64, 301, dtype=torch.float32)
    p.targets[3:9] = -100
    e, c = (x.double().requires_grad_() for x in (p.e, p.c))
    nll, _ = reference.forward(e, c, None, p.targets, softcap=softcap)
    loss = nll.sum() / (p.targets != -100).sum()
    dense = torch.autograd.grad(loss, (e, c))
    monkeypatch.setattr(errors, "BLOCK_LOGITS", 16 * 301)
    exact = errors.exact(p, softcap)
    assert exact.loss == pytest.approx(loss.item(), rel=1e-12)
    for got, expected in zip(exact.gradients, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)
    assert exact.errors(dense) == pytest.approx([0, 0], abs=1e-12)
    assert exact.errors((1.5 * dense[0], 0 * dense[1])) == pytest.approx([0.5, 1])


def test_exact_gradient_of_what_fits(monkeypatch):
    p = inputs.randn(1024, 8, 50, dtype=torch.float32)
    monkeypatch.setattr(errors, "free_bytes", lambda x: errors.bytes_needed(p, 600))
    assert len(errors.exact(p, None).problem.e) == 512
    monkeypatch.setattr(errors, "free_bytes", lambda x: 0)
    assert errors.exact(p, None) is None


def test_error_of_a_gradient_that_is_zero_or_not_finite():
    x = torch.ones(5000, 2)
    assert errors.relative_error(x, torch.zeros(5000, 2, dtype=torch.float64)) is None
    x[4999, 1] = math.nan
    assert math.isnan(errors.relative_error(x, torch.ones(5000, 2, dtype=torch.float64)))


# ---- turns ----


class Fake:
    """Counts its calls and checks their order."""

    def __init__(self, log: list[str], name: str, fails: bool = False) -> None:
        self.log, self.name, self.fails, self.held = log, name, fails, False

    def forward(self) -> None:
        assert not self.held
        self.held = True
        self.log.append(self.name)
        if self.fails and len(self.log) > 4:
            raise RuntimeError("later")

    def backward(self) -> None:
        assert self.held

    def release(self) -> None:
        self.held = False


def test_methods_take_turns_in_every_order():
    log: list[str] = []
    times = timing.interleave({n: Fake(log, n) for n in "abc"}, "cpu", repeats=40, warmup=2)
    rounds = ["".join(log[i : i + 3]) for i in range(0, 126, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    # Everybody comes after everybody else.
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert all(len(t.forward) == len(t.backward) == 40 for t in times.values())
    assert times["a"].of("loss-fw-bw") == [f + b for f, b in zip(times["a"].forward, times["a"].backward, strict=True)]


def test_slow_methods_take_five_turns():
    for repeats, expected in ((10, 5), (13, 5), (3, 3)):
        log: list[str] = []
        steps = {n: Fake(log, n) for n in "ab"}
        times = timing.interleave(steps, "cpu", repeats, warmup=2, few=frozenset("b"))
        assert len(times["a"].forward) == repeats and len(times["b"].forward) == expected
        assert log.count("b") == expected + 1


def test_a_step_that_fails_is_left_out_and_the_deadline_holds():
    log: list[str] = []
    told = []
    steps = {"a": Fake(log, "a"), "b": Fake(log, "b", fails=True)}
    times = timing.interleave(steps, "cpu", 5, 1, failed=lambda name, error: told.append((name, str(error))))
    assert told == [("b", "later")] and list(times) == ["a"] and len(times["a"].forward) == 5
    assert timing.interleave({"a": Fake(log, "a")}, "cpu", 5, 1, deadline=0)["a"].forward == []


def test_spread():
    assert timing.spread([3.0]) == (3, 3, 3)
    assert timing.spread([float(x) for x in range(11)]) == (5, 2, 8)


# ---- the rows of one shape ----


@pytest.fixture
def processes():
    """For a test that measures memory in processes of their own."""


@pytest.fixture(autouse=True)
def no_process_for_memory(monkeypatch, request):
    """A process a method is what memory costs, so that most tests have a figure made up."""
    if "processes" not in request.fixturenames:
        monkeypatch.setattr(memory, "peaks", lambda *a: {"loss-fw": 1.0, "loss-bw": 2.0, "loss-fw-bw": 2.0})


def test_rows(tmp_path):
    rows = measure(small_job(methods=["mm", "cce", "cce_exact", "baseline"], repeats=6))
    assert list(rows) == [(m, k) for m in ("mm", "cce", "cce_exact", "baseline") for k in timing.KINDS]
    for (method, kind), row in rows.items():
        assert row["x_mm"] == pytest.approx(row["runtime_ms"] / rows["mm", "loss-fw"]["runtime_ms"])
        products = {"loss-fw": 1, "loss-bw": 2, "loss-fw-bw": 3}[kind]
        assert row["tflops"] * row["runtime_ms"] == pytest.approx(products * 2 * 64 * 64 * 512 * 1e-9)
        assert row["op_mem_mb"] == (1.0 if kind == "loss-fw" else 2.0)
        has_gradient = kind != "loss-fw" and method != "mm"
        assert (row["de_err"] is not None) == (row["dc_err"] is not None) == has_gradient
        assert (row["de_err_mean8"] is not None) == (has_gradient and method == "cce")
    assert rows["baseline", "loss-bw"]["de_err"] < 1e-5 and rows["cce_exact", "loss-bw"]["dc_err"] < 1e-5
    one, mean = rows["cce", "loss-bw"]["dc_err"], rows["cce", "loss-bw"]["dc_err_mean8"]
    assert 1e-4 < mean < 0.6 * one < 0.1  # it is sampled, and its mean is nearer
    files.save(tmp_path / "rows.json", META, list(rows.values()))


def test_softcap_reaches_everyone(monkeypatch):
    rows = measure(small_job(methods=["cce_exact", "baseline", "torch_chunked"], softcap=0.5))
    assert rows["baseline", "loss-bw"]["de_err"] < 1e-5 and rows["cce_exact", "loss-bw"]["de_err"] < 1e-5
    assert rows["torch_chunked", "loss-bw"]["note"] == "not run: it has no softcap"


def test_the_8_bit_scan_is_a_row_that_says_so_where_it_cannot_run(monkeypatch):
    rows = measure(small_job(methods=["mm", "cce_fp8"]))
    row = rows["cce_fp8", "loss-fw-bw"]
    assert row["note"].startswith("not run: ") and row["runtime_ms"] is None
    assert "scan: 'fp8' takes a Hopper GPU (compute capability 9.0) and bf16 or fp16, got float32 on cpu" in row["note"]
    calls = taken(monkeypatch)
    sampled, capped = (
        measure(small_job(methods=["mm", "cce_fp8"], softcap=softcap))["cce_fp8", "loss-fw-bw"]
        for softcap in (None, 0.5)
    )
    assert {call.scan for call in calls} == {"fp8"} and sampled["note"] == capped["note"] == ""
    assert 1e-4 < sampled["dc_err_mean8"] < 0.6 * sampled["dc_err"] < 0.1
    assert capped["dc_err"] < 1e-4  # it has reached the loss


def test_peers_that_fail_are_rows_that_say_so(monkeypatch):
    def baseline(e, c, t):
        return METHODS["baseline"].load(None)(e, c, t)

    def missing(softcap):
        import no_such_package  # noqa: F401

    def lacks_an_extra(softcap):
        try:
            missing(softcap)
        except ImportError as error:
            raise ImportError("install the extra") from error

    def broken(softcap):
        raise ImportError("undefined symbol: x\nmore")

    def refuses(e, c, t):
        raise ValueError("D must be 7\nand more of it")

    def loses_its_gradient(e, c, t):
        return baseline(e.detach(), c.detach(), t)

    def not_finite(e, c, t):
        return baseline(e, c, t) + (0 * c.sum()).sqrt()

    fakes = {
        "missing": (missing, "missing: No module named 'no_such_package'"),
        "lacks": (lacks_an_extra, "missing: install the extra"),
        "broken": (broken, "failed: undefined symbol: x"),
        "refuses": (lambda s: refuses, "failed: D must be 7"),
        "loses": (lambda s: loses_its_gradient, "failed: element 0 of tensors does not require grad"),
        "wrong": (lambda s: lambda e, c, t: 1.02 * baseline(e, c, t), "WRONG: loss "),
        "close": (lambda s: lambda e, c, t: 1.005 * baseline(e, c, t), ""),
        "infinite": (lambda s: not_finite, "WRONG: a gradient is not finite"),
    }
    for name, (load, _) in fakes.items():
        monkeypatch.setitem(METHODS, name, Method(name, load))
    rows = measure(small_job(methods=["mm", *fakes, "baseline"]))
    for name, (_, note) in fakes.items():
        row = rows[name, "loss-fw-bw"]
        assert row["note"].startswith(note) and bool(row["note"]) == bool(note), name
        assert (row["runtime_ms"] is None) == (name in ("missing", "lacks", "broken", "refuses", "loses"))
    assert rows["infinite", "loss-bw"]["dc_err"] is None
    assert rows["close", "loss-bw"]["de_err"] == pytest.approx(0.005, rel=0.01)
    assert rows["baseline", "loss-fw"]["runtime_ms"] is not None  # nobody stopped the run
    table = tables.table(list(rows.values()))
    assert "refuses  failed: D must be 7" in table and "WRONG: loss" in table


def test_time_limit():
    rows = measure(small_job(methods=["mm", "cce"], seconds=0.0))
    assert {row["note"] for row in rows.values()} == {worker.TIME_LIMIT}


def test_first_calls_that_hang_end_the_process(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(worker.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(worker.Shapework, "prepare", lambda self, case: ended.wait(20))
    state = worker.State(Path("unused"))
    state.save = lambda: None
    worker.Shapework(small_job(seconds=0.2), state).prepare_in_time(worker.Case("cce", alone=False))
    assert ended.is_set() and state.reason == "failed: its first calls took more than 0 s"


def test_memory(processes):
    """In processes of their own: dense torch holds the logits, cce does not."""
    p = inputs.lm(512, 64, 32768, dtype=torch.float32)
    logits_mb = 512 * 32768 * 4 / 2**20
    large, nothing = phase_peaks([lambda: torch.zeros(1 << 24), lambda: None], "cpu") or (64, 0)
    assert large > 60 and nothing < 30
    dense, cce = (memory.peaks(METHODS[m], p, None) for m in ("baseline", "cce"))
    if dense["loss-fw"] is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert dense["loss-fw"] > 0.9 * logits_mb
    assert dense["loss-fw-bw"] == max(dense["loss-fw"], dense["loss-bw"])
    assert cce["loss-fw"] < 0.5 * logits_mb
    assert cce["loss-bw"] > 0.9 * 32768 * 64 * 4 / 2**20  # dC


def test_the_command(processes, tmp_path, monkeypatch, capsys):
    """From the command line to the file, with peers of which one takes its process down."""
    for name, body in (
        ("cut_cross_entropy", "import os\ndef linear_cross_entropy(*args, **options):\n    os._exit(7)\n"),
        ("quack", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "argv", ["bench", "--out", "x y.json"])
    out = tmp_path / "results.json"
    options = ["--device", "cpu", "--shape", "32,64,256", "--methods", "apple_cce", "quack", "--repeats", "2"]
    assert cli.main([*options, "--time-limit", "300", "--out", str(out), "--commit", "abc"]) == 0
    result = json.loads(out.read_text())
    assert files.check(result) == "bench"
    notes = {r["method"]: r["note"] for r in result["rows"]}
    assert notes["apple_cce"] == "failed: its process ended with code 7"
    assert notes["quack"].startswith("missing: No module named 'quack.linear_cross_entropy'")
    times = [r for r in result["rows"] if r["runtime_ms"] is not None]
    assert {r["method"] for r in times} == {"mm"} and all(r["op_mem_mb"] is not None for r in times)
    assert result["meta"]["command"] == "python -m bench --out 'x y.json'" and result["meta"]["commit"] == "abc"
    assert set(result["meta"]["data_statistics"]["32,64,256 lm"]) >= {"above", "visits"}
    printed = capsys.readouterr().out
    assert "lm inputs: above" in printed and "runtime_ms op_mem_mb test_data" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt5"], "argument --shape: expected N,D,V or one of gemma2"),
        (["--shape", "64,32,512"], "--shape 64,32,512: lm inputs need a hidden width above 48"),
        (["--data", "real"], "--data: expected lm, randn, uniform or saved:FILE, got 'real'"),
        (["--data", "saved:/no/such/file"], "--data: "),
        (["--data", "randn", "real"], "--data: expected lm, randn, uniform or saved:FILE, got 'real'"),
        (["--data", "saved:x", "--vocab", "5"], "saved inputs have their own shape"),
        (["--data", "lm", "saved:a/x.pt", "saved:b/x.pt"], "--data: two saved files of one name"),
        (["--methods", "cce", "magic"], "--methods: there is no magic"),
        (["--tokens", "0"], "argument --tokens: expected a number of 1 or more, got '0'"),
        (["--repeats", "many"], "argument --repeats: expected a number of 1 or more, got 'many'"),
        (["--softcap", "-1"], "argument --softcap: expected a positive number, got '-1'"),
        (["--time-limit", "nan"], "argument --time-limit: expected a positive number, got 'nan'"),
        (["--out", "results.txt"], "--out: expected a .json file"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments():
    args, todo = cli.parse_arguments(["--device", "cpu", "--shape", "gpt2", "9,64,70", "--vocab", "80", "90"])
    assert [s[1:] for _, s, _ in todo] == [(8192, 768, 80), (8192, 768, 90), (9, 64, 80), (9, 64, 90)]
    assert args.methods == [m for m in METHODS if not METHODS[m].on_request] and args.dtype == "float32"
    args, todo = cli.parse_arguments(["--device", "cpu", "--methods", "cce", "--data", "randn", "--shape", "8,4,9"])
    assert args.methods == ["mm", "cce"] and todo == [("randn", ("8,4,9", 8, 4, 9), None)]
    args, todo = cli.parse_arguments(["--device", "cpu", "--methods", "eps", "liger", "--data", "lm", "randn", "lm"])
    assert args.methods == ["mm", "cce", *EPS, "cce_exact", "baseline", "liger"]
    assert [(data, s.d) for data, s, _ in todo] == [("lm", 256), ("randn", 256)]


@pytest.mark.parametrize(
    "command",
    [
        "bench",
        "bench plot",
        "bench result",
        "bench eps",
        "bench.studies.accuracy",
        "bench.studies.forward",
        "bench.studies.backward",
        "bench.studies.backward plot",
        "bench.studies.distributed",
        "bench.studies.distributed predict",
        "bench.studies.energy",
        "bench.studies.overhead",
        "bench.studies.portable",
        "bench.studies.ranks",
        "bench.checks.sanitize",
    ],
)
def test_help(command, monkeypatch, capsys):
    module, *sub = command.split()
    monkeypatch.setattr(sys, "argv", [module, *sub, "--help"])
    with pytest.raises(SystemExit) as exit_:
        if module == "bench":
            cli.main(sys.argv[1:])
        else:
            importlib.import_module(module).main()
    assert exit_.value.code == 0
    assert f"usage: python -m {command}" in " ".join(capsys.readouterr().out.split())


# ---- files ----


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.name)
def test_committed_results(file):
    text = file.read_text()
    kind = files.check(json.loads(text))
    assert kind == re.split("[_.]", file.name)[0]
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/a/b.json", "b.json"),
        ("--out=/a/b.json", "--out=b.json"),
        ("results/b.json", "results/b.json"),
        ("saved:a/b.pt", "saved:b.pt"),
        ("--data=saved:/a/b.pt", "--data=saved:b.pt"),
        ("--repeats=3", "--repeats=3"),
    ],
)
def test_a_command_names_no_folder_of_the_machine(argument, kept):
    assert origin.without_folder(argument) == kept


def test_energy_of_calls(monkeypatch):
    class Counter:
        def __init__(self):
            self.total = 0

        def millijoules(self):
            self.total += 500
            return self.total

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(energy, "lm", lambda *shape, dtype, device: inputs.lm(*shape, dtype=dtype, device="cpu"))
    names = [name for name in energy.NAMES if name != "cce_fp8"]  # of Hopper alone
    rows = energy.of_shape(shapes.Shape("small", 64, 64, 300), names, 0.001, Counter())
    assert [row["method"] for row in rows] == names and names[0] == "mm"
    assert rows[0]["x_mm_runtime_ms"] == rows[0]["x_mm_joules"] == 1
    for row in rows:
        assert row["watts"] == pytest.approx(1e3 * row["joules"] / row["runtime_ms"])
        assert row["x_mm_joules"] == row["joules"] / rows[0]["joules"]
    assert files.check({"meta": origin.machine("cpu", "bench.studies.energy", "abc"), "rows": rows}) == "energy"
    with pytest.raises(ValueError, match="nothing taken"):
        files.check({"meta": origin.machine("cpu", "x", "abc"), "rows": [rows[0] | {"joules": 0.0}]})


def test_plot_of_a_backward(tmp_path, monkeypatch):
    kernel = {"shape": "gemma2", "kernel": "visits", "start_us": 0.0, "length_us": 5.0, "gap_us": 0.0}
    groups = [(0, 0, 1.0), (4, 0, 8.0), (32, 4, 2.0), (36, 0, 10.0)]
    rows = [
        {"shape": "gemma2", "tiles": tiles, "first_rank": first, "visits": visits, "runtime_ms": 0.1 * visits}
        for tiles, first, visits in groups
    ]
    file = tmp_path / "backward.json"
    files.save(file, origin.machine("cpu", "bench.studies.backward", "abc"), [kernel, *rows])
    assert files.check(json.loads(file.read_text())) == "backward"
    monkeypatch.setattr("sys.argv", ["bench.studies.backward", "plot", str(file)])
    backward.main()
    assert file.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="a backward row has"):
        files.save(file, origin.machine("cpu", "bench.studies.backward", "abc"), [kernel | {"more": 1}])


def test_the_format_is_checked():
    rows = made_up([(8192, 768, 50304)])
    assert files.check({"meta": META, "rows": rows}) == "bench"

    def refused(change) -> str:
        result = copy.deepcopy({"meta": META, "rows": rows})
        change(result)
        with pytest.raises(ValueError) as error:
            files.check(result)
        return str(error.value)

    assert "x_mm" in refused(lambda r: r["rows"][0].pop("x_mm"))
    assert "kind" in refused(lambda r: r["rows"][0].update(kind="loss"))
    assert "runtime_ms is nan" in refused(lambda r: r["rows"][0].update(runtime_ms=math.nan))
    assert "x_mm is inf" in refused(lambda r: r["rows"][0].update(x_mm=math.inf))
    assert "op_mem_mb is -1" in refused(lambda r: r["rows"][0].update(op_mem_mb=-1))
    assert "percentiles" in refused(lambda r: r["rows"][0].update(runtime_p80=0.0))
    assert "no note" in refused(lambda r: r["rows"][0].update(runtime_ms=None))
    assert "same measurement" in refused(lambda r: r["rows"].append(r["rows"][0]))
    assert "rows is empty" in refused(lambda r: r["rows"].clear())
    for key in ("device", "driver", "clocks", "torch", "cuda", "commit", "command", "date", "packages"):
        assert key in refused(lambda r, key=key: r["meta"].pop(key))


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    one, sweep = tmp_path / "one.json", tmp_path / "sweep.json"
    files.save(one, META, made_up([(8192, 768, 50304)]))
    files.save(sweep, META, made_up([(64, 32, 100), (64, 32, 200), (128, 32, 100)]))
    assert cli.main(["plot", str(one)]) == 0
    assert cli.main(["plot", str(one), str(sweep), "--out", str(tmp_path / "both.png")]) == 0
    for picture in (tmp_path / "one.png", tmp_path / "both.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "both.png").stat().st_size > (tmp_path / "one.png").stat().st_size
    meta, rows = plot.load([one, sweep])
    assert meta == META
    places = list(dict.fromkeys(plot.place(r) for r in plot.measured(rows)))
    sweeps, single = plot.find_sweeps(places)
    assert single == [(8192, 768, 50304, "lm")]
    assert sweeps == [
        ("v", [(64, 32, 100, "lm"), (64, 32, 200, "lm")]),
        ("n", [(64, 32, 100, "lm"), (128, 32, 100, "lm")]),
    ]

    portable = next(f for f in RESULTS if f.name == "portable_cpu.json")
    nothing = tmp_path / "nothing.json"
    files.save(nothing, META, empty_rows(shapes.of(1, 2, 3), "lm", "mm", "missing"))
    for file, message in (
        (tmp_path / "none.json", "none.json"),
        (portable, "a results file of another benchmark (portable)"),
        (nothing, "there is nothing to draw"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["plot", str(file)])
        assert message in capsys.readouterr().err


def test_the_other_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "microseconds", lambda call: float(call() is not None))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    others = [(portable, ["--shape", "64,64,300", "--repeats", "2"]), (overhead, []), (overhead, ["--without-kernels"])]
    for module, options in others:
        name = module.__name__.split(".")[-1]
        file = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [name, *options, "--out", str(file)])
        module.main()
        result = json.loads(file.read_text())
        assert files.check(result) == name
        assert result["meta"]["command"].startswith(f"python -m bench.studies.{name} ")
        assert {r["method"] for r in result["rows"]} >= {"cce", "cce_exact"}
    assert "x dense" in capsys.readouterr().out


def test_overhead_without_kernels(monkeypatch):
    """The stand-ins give what the kernels do but for the values, and are gone with what holds them."""
    p = inputs.randn(8, 16, 300, dtype=torch.float32)
    e, c = p.e.requires_grad_(), p.c.requires_grad_()

    def results():
        torch.manual_seed(0)
        loss, lse = linear_cross_entropy(e, c, p.targets, reduction="none", return_lse=True)
        return [loss, lse, *torch.autograd.grad(loss.sum(), (e, c))]

    expected = results()
    with monkeypatch.context() as patch:
        for name in ("lce_forward", "lce_backward"):
            patch.setattr(portable_kernels, name, lambda *args, **options: pytest.fail("a kernel ran"))
        stand_ins = overhead.without_kernels("cpu")
        for got, x in zip(results(), expected, strict=True):
            assert got.shape == x.shape and got.dtype == x.dtype
        del stand_ins
    assert all(torch.equal(x, y) for x, y in zip(results(), expected, strict=True))


def test_what_it_costs_to_seed_ranks_alike(tmp_path, monkeypatch, capsys):
    for name, value in {"RANKS": (2, 4), "DATA": ("lm", "uniform with a mean"), "N": 16, "V": 2048}.items():
        monkeypatch.setattr(ranks, name, value)
    # That the same draws are seen as such: the same tokens on all ranks.
    monkeypatch.setattr(ranks, "problem", lambda data, count, device: same_tokens(data, count))
    file = tmp_path / "ranks.json"
    monkeypatch.setattr(sys, "argv", ["ranks", "--draws", "12", "--out", str(file)])
    ranks.main()
    result = json.loads(file.read_text())
    assert files.check(result) == "ranks" and len(result["rows"]) == 4
    for row in result["rows"]:
        assert 0.6 * row["ranks"] < row["c"] < 1.6 * row["ranks"]
    assert "shift_of_e" in capsys.readouterr().out


def same_tokens(data, count):
    p = inputs.lm(16, 64, 2048, dtype=torch.float32)
    return inputs.Problem(p.e.repeat(count, 1), p.c, p.targets.repeat(count))


# ---- on a GPU ----


@pytest.mark.gpu
def test_on_a_gpu():
    p = inputs.lm(512, 128, 4096, dtype=torch.bfloat16, device="cuda")
    peaks = memory.peaks_here(METHODS["baseline"], p, None, "cuda")
    assert 15 < peaks["loss-fw"] < 25  # fp32 logits of 8 MB and as much again for their softmax
    job = small_job(
        shape=("512,128,4096", 512, 128, 4096), dtype="bfloat16", device="cuda", methods=["mm", "cce", "baseline"]
    )
    rows = measure(job)
    assert all(r["runtime_ms"] > 0 and not r["note"].startswith("failed") for r in rows.values())
    assert rows["baseline", "loss-bw"]["dc_err"] < 0.02 and rows["cce", "loss-bw"]["dc_err_mean8"] < 0.05
    state = origin.gpu_state()
    assert state is None or state["driver_version"]
