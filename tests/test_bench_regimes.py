"""The benchmark of other training than pretraining: ignored tokens, their live rows alone, a frozen side."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from support.results import META

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from support.jobs import measure, processes, quick, rows_of, small_job  # noqa: F401

from bench.measure import errors, memory, supervisor, timing, worker
from bench.peers.method import LossStep, ProductStep
from bench.peers.methods import METHODS
from bench.problems import inputs, regimes
from bench.report import files

TOKENS = regimes.SEQUENCE


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


@pytest.mark.usefixtures("processes")
def test_memory_is_of_the_frozen_side(monkeypatch, capsys):
    """The process that measures it is told, and leaves the gradient out."""
    seen = []
    make_step = memory.make_step

    def step_of(method, p, *options):
        seen.append((len(p.e), p.frozen))
        return make_step(method, p, *options)

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
