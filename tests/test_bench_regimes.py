"""The benchmark of other training than pretraining: ignored tokens, a frozen side, few tokens, the host's time."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.results import META, made_up

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from support.jobs import measure, rows_of, small_job

from bench import __main__ as cli
from bench.measure import errors, host, memory, supervisor, timing, worker
from bench.peers.method import LossStep, ProductStep
from bench.peers.methods import METHODS
from bench.problems import inputs, regimes
from bench.report import eps, files, plot, tables

TOKENS = regimes.SEQUENCE


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """One thread for tiny calls and, but for a test that wants its processes, a made-up memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if "processes" not in request.fixturenames:
        monkeypatch.setattr(memory, "peaks", lambda *a: dict.fromkeys(timing.KINDS, 1.0))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def processes():
    """For a test that measures memory in processes of their own."""


# ---- what is ignored ----


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("n", [64, TOKENS, TOKENS + 1, 4 * TOKENS, 5 * TOKENS - 300])
def test_the_share_is_exact_and_a_seed_says_all(n, share, spans):
    first, again, other = (regimes.mask(n, share, spans=spans, seed=seed) for seed in (3, 3, 4))
    assert first.dtype == torch.bool and first.shape == (n,)
    assert first.sum() == regimes.ignored_count(n, share) == round(share * n)
    assert torch.equal(first, again)
    # One sequence has one length of prompt; of two whose second is one token, so has the first.
    only_one_way = first.sum() in (0, 1, n - 1, n) or (spans and n <= TOKENS + 1)
    assert only_one_way or not torch.equal(first, other)


def test_at_random_is_at_random():
    where = regimes.mask(1 << 14, 0.9, spans=False, seed=0)
    by_block = where.view(-1, 128).float().mean(1)
    # Of 128 draws with p = 0.9 the mean has a deviation of 0.027.
    assert 0.015 < by_block.std() < 0.04 and by_block.max() < 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.97])
def test_spans_are_prompts_of_several_lengths(share):
    """Each sequence is a prompt and then what counts; prompts are about the share of it, and differ."""
    sequences = 32
    n = sequences * TOKENS - 1000
    where = regimes.mask(n, share, spans=True, seed=0)
    lengths = []
    for part in where.split(TOKENS):
        length = int(part.sum())
        assert part[:length].all() and not part[length:].any() and 0 < length < len(part)
        lengths.append(length / len(part))
    spread = torch.tensor(lengths)
    room = min(share, 1 - share)
    # Even between -room/2 and room/2, about a mean that is taken off.
    assert (spread - share).abs().max() < 0.75 * room
    assert 0.5 * room / math.sqrt(12) < spread.std() < 1.5 * room / math.sqrt(12)


def test_prompts_of_tiny_shares_stay_in_their_sequences():
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        for n in (1, 2, TOKENS + 1, 3 * TOKENS + 5):
            for share in (1e-4, 0.3, 0.9999):
                lengths = regimes.prompt_lengths(n, share, generator)
                most = [min(TOKENS, n - start) for start in range(0, n, TOKENS)]
                assert sum(lengths) == round(share * n)
                assert all(0 <= length <= limit for length, limit in zip(lengths, most, strict=True))


def test_a_regime_of_a_problem_and_its_live_rows():
    p = inputs.randn(40, 8, 50, dtype=torch.float32)
    p.targets[7] = -100
    regime = regimes.Regime(0.5, frozen="c")
    q = regime.of(p, seed=1)
    where = regimes.mask(40, 0.5, spans=False, seed=1)
    assert (q.targets[where] == -100).all() and torch.equal(q.targets[~where], p.targets[~where])
    assert q.e is p.e and q.c is p.c and q.frozen == "c" and p.frozen is None
    cut = regimes.live_alone(q)
    live = q.targets != -100
    assert torch.equal(cut.e, p.e[live]) and torch.equal(cut.targets, p.targets[live])
    assert cut.c is p.c and cut.frozen == "c" and (cut.targets >= 0).all()
    same = regimes.Regime().of(p, seed=1)
    assert same.targets is p.targets and same.frozen is None


def test_names():
    assert regimes.Regime().name() == regimes.Regime().name(alone=True) == ""
    assert regimes.Regime(0.75, spans=True).name() == "0.75 ignored in spans"
    assert regimes.Regime(0.9, frozen="c").name(alone=True) == "live rows of 0.9 ignored at random, c frozen"
    assert regimes.Regime(frozen="e").name() == "e frozen"


# ---- a side that is frozen ----


@pytest.mark.parametrize("frozen", ["e", "c"])
@pytest.mark.parametrize("method", ["cce", "cce_exact", "baseline", "torch_chunked"])
def test_a_frozen_side_requires_no_gradient(method, frozen):
    if method == "torch_chunked" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no F.linear_cross_entropy")
    p = inputs.lm(16, 64, 300, dtype=torch.float32)
    seen = []

    def loss(e, c, t):
        seen.append((e.requires_grad, c.requires_grad))
        return METHODS[method].load(None)(e, c, t)

    def gradients(of):
        step = LossStep(loss, of)
        torch.manual_seed(0)
        step.forward()
        step.backward()
        return step.gradients

    both, one = gradients(p), gradients(replace(p, frozen=frozen))
    assert seen == [(True, True), (frozen != "e", frozen != "c")]
    left = 1 if frozen == "e" else 0
    assert one[1 - left] is None
    torch.testing.assert_close(one[left], both[left])


@pytest.mark.parametrize("frozen", [None, "e", "c"])
def test_the_products_of_a_frozen_side_are_left_out(frozen, monkeypatch):
    p = replace(inputs.randn(16, 8, 30, dtype=torch.float32), frozen=frozen)
    step, calls = ProductStep(p), []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **o: calls.append(mm(*a, **o)))
    for _ in range(2):
        step.forward()
        step.backward()
    shapes = {None: [(16, 30), (16, 8), (30, 8)], "e": [(16, 30), (30, 8)], "c": [(16, 30), (16, 8)]}[frozen]
    assert [tuple(x.shape) for x in calls] == 2 * shapes
    assert len({x.data_ptr() for x in calls}) == len(shapes), "outputs are allocated by the first call"


@pytest.mark.parametrize("frozen", ["e", "c"])
def test_rows_of_a_frozen_side(frozen):
    rows = measure(small_job(methods=["mm", "cce", "baseline"], frozen=frozen))
    for (method, kind), row in rows.items():
        assert row["regime"] == f"{frozen} frozen"
        products = {"loss-fw": 1, "loss-bw": 1, "loss-fw-bw": 2}[kind]
        assert row["tflops"] * row["runtime_ms"] == pytest.approx(products * 2 * 64 * 64 * 512 * 1e-9)
        has_gradient = kind != "loss-fw" and method != "mm"
        for side in "ec":
            measured = has_gradient and side != frozen
            assert (row[f"d{side}_err"] is not None) == measured
            assert (row[f"d{side}_err_mean8"] is not None) == (measured and method == "cce")


def test_memory_is_of_the_frozen_side(processes, monkeypatch, capsys):
    """The process that measures it is told, and leaves the gradient out."""
    seen = []
    make_step = memory.make_step

    def step_of(method, p, softcap):
        seen.append((len(p.e), p.frozen))
        return make_step(method, p, softcap)

    def run(module, *arguments, **options):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        memory.main()
        return subprocess.CompletedProcess([], 0, stdout=capsys.readouterr().out, stderr="")

    monkeypatch.setattr(memory, "make_step", step_of)
    monkeypatch.setattr(memory.child, "run", run)
    p = replace(inputs.lm(16, 64, 300, dtype=torch.float32), frozen="c")
    assert set(memory.peaks(METHODS["baseline"], p, None)) == set(timing.KINDS)
    assert seen == [(8, "c"), (16, "c")]


def test_a_frozen_side_of_a_saved_problem(tmp_path):
    p = inputs.lm(16, 64, 300, dtype=torch.float32)
    torch.save({"e": p.e, "c": p.c, "targets": p.targets}, tmp_path / "p.pt")
    job = small_job(data=f"saved:{tmp_path}/p.pt", shape=("16,64,300", 16, 64, 300), frozen="c", methods=["baseline"])
    row = measure(job)["baseline", "loss-bw"]
    assert row["dc_err"] is None and row["de_err"] < 1e-5


# ---- ignored tokens, and the live rows alone ----


def job_of(**options) -> worker.Job:
    return small_job(shape=("64,64,512", 64, 64, 512), ignored=0.75, **options)


@pytest.mark.parametrize("spans", [False, True])
def test_rows_of_ignored_tokens_and_of_the_live_ones_alone(spans, tmp_path):
    names = ["mm", "cce", "cce_exact", "baseline"]
    rows = rows_of(job_of(methods=names, spans=spans, repeats=3))
    how = "in spans" if spans else "at random"
    whole, alone = f"0.75 ignored {how}", f"live rows of 0.75 ignored {how}"
    assert [(r["method"], r["regime"]) for r in rows[::3]] == [(m, x) for m in names for x in (whole, alone)]
    by = {(r["regime"], r["method"], r["kind"]): r for r in rows}
    for (regime, method, kind), row in by.items():
        assert (row["shape"], row["n"]) == (("64,64,512", 64) if regime == whole else ("16,64,512", 16))
        mm = by[regime, "mm", "loss-fw"]["runtime_ms"]
        assert row["x_mm"] == pytest.approx(row["runtime_ms"] / mm)
        if regime == alone:
            assert row["x_live"] is None
        else:
            assert row["x_live"] == pytest.approx(row["runtime_ms"] / by[alone, method, kind]["runtime_ms"])
        if method in ("cce_exact", "baseline") and kind != "loss-fw":
            assert row["de_err"] < 1e-5 and row["dc_err"] < 1e-5
        assert "WRONG" not in row["note"]
    files.save(tmp_path / "rows.json", META, rows)


def test_every_method_takes_turns_with_its_live_rows(monkeypatch):
    """In the same rounds, on the problems that are meant; the live rows have no others beside them."""
    seen = []

    def interleave(steps, *args, **options):
        seen.extend((name, len(step.targets), int((step.targets == -100).sum())) for name, step in steps.items())
        return {name: timing.Times([2.0 if "alone" in name else 3.0], [1.0]) for name in steps}

    monkeypatch.setattr(worker, "interleave", interleave)
    rows = rows_of(job_of(methods=["cce", "baseline"]))
    alone = " on the live rows alone"
    expected = [(m + x, *n) for m in ("cce", "baseline") for x, n in (("", (64, 48)), (alone, (16, 0)))]
    assert seen == expected
    assert [r["x_live"] for r in rows if not r["regime"].startswith("live")] == 2 * [1.5, 1.0, 4 / 3]


def test_errors_of_what_fits(monkeypatch):
    """fp64 for the first live tokens alone, where not all fit; the first tokens of all have no live one here."""
    p = inputs.randn(512, 8, 50, dtype=torch.float32)
    p.targets[:384] = -100
    cut = regimes.live_alone(p)
    full = errors.exact(p, None)
    among = errors.exact(cut, None).among(p)
    assert among.loss == pytest.approx(full.loss)
    assert among.problem.e.shape == p.e.shape
    for x, y in zip(among.gradients, full.gradients, strict=True):
        torch.testing.assert_close(x, y)

    monkeypatch.setattr(errors, "FEWEST_TOKENS", 32)
    monkeypatch.setattr(errors, "free_bytes", lambda x: errors.bytes_needed(cut, 70))
    some = errors.exact(cut, None)
    assert len(some.problem.e) == 64
    first = some.among(p)
    assert len(first.problem.e) == 384 + 64 and torch.equal(first.problem.targets, p.targets[: 384 + 64])
    monkeypatch.setattr(worker, "load_problem", lambda job: p)
    job = small_job(shape=("512,8,50", 512, 8, 50), ignored=0.75, spans=True, methods=["baseline"])
    rows = rows_of(job)
    notes = {r["regime"]: r["note"] for r in rows}
    assert notes["0.75 ignored in spans"] == "gradient error on the first 448 tokens"
    assert notes["live rows of 0.75 ignored in spans"] == "gradient error on the first 64 tokens"
    assert all(r["de_err"] < 1e-5 and r["dc_err"] < 1e-5 for r in rows if r["kind"] == "loss-bw")


def test_a_method_that_fails_on_the_live_rows_alone(monkeypatch):
    def loss(e, c, t):
        if len(e) == 16:
            raise ValueError("N must be 64")
        return METHODS["baseline"].load(None)(e, c, t)

    monkeypatch.setitem(METHODS, "peer", replace(METHODS["liger"], name="peer", load=lambda s: loss, note=""))
    rows = rows_of(job_of(methods=["mm", "peer"]))
    notes = {(r["method"], r["regime"]): r["note"] for r in rows}
    assert notes["peer", "live rows of 0.75 ignored at random"] == "failed: N must be 64"
    assert notes["peer", "0.75 ignored at random"] == ""
    measured = [r for r in rows if r["method"] == "peer" and r["runtime_ms"] is not None]
    assert len(measured) == 3 and all(r["x_live"] is None and r["x_mm"] > 0 for r in measured)


@pytest.mark.parametrize(("ignored", "method"), [(0.75, "torch_compile"), (0.0, "torch_compile"), (0.75, "cce")])
def test_each_length_is_compiled_for_itself(ignored, method, tmp_path, monkeypatch):
    """Else the second one would make a function of any length of it, which the first one would meet as well."""
    monkeypatch.setattr(worker.Shapework, "run", lambda self: None)
    job = small_job(methods=["mm", method], ignored=ignored)
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "job.json"), str(tmp_path / "state.json")])
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        with pytest.raises(SystemExit) as exit_:
            worker.main()
        dynamic = torch._dynamo.config.automatic_dynamic_shapes
    assert exit_.value.code == 0 and dynamic == (not ignored or method == "cce")


def test_cases_that_are_excluded_or_out_of_time():
    job = job_of(methods=["mm", "cce"], seconds=0.0)
    assert {r["note"] for r in rows_of(job)} == {worker.TIME_LIMIT}
    lost = {"cce on the live rows alone": "failed: its process ended with code 7"}
    job = job_of(methods=["mm", "cce"], excluded=lost)
    for rows in (rows_of(job), supervisor.not_measured(job, "out of time")):
        assert len(rows) == 12
        found = {(r["method"], r["n"]): r["note"] for r in rows}
        assert found["cce", 16] == "failed: its process ended with code 7"
        assert found["cce", 64] in ("", "out of time") and found["mm", 16] in ("products only", "out of time")


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


def test_in_processes_of_their_own(processes, tmp_path, monkeypatch):
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
