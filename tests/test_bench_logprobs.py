"""The benchmark of log-probabilities and of soft targets. No assertion on a time."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.results import META, made_up

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")
pytest.importorskip("matplotlib", reason="plots need matplotlib")

from support.jobs import measure, processes, quick, rows_of, small_job  # noqa: F401

import cce_ext
from bench import __main__ as cli
from bench.measure import errors, memory, timing, worker
from bench.measure.rows import complete
from bench.peers import plain
from bench.peers.method import LogProbsStep, LossStep, Method, ScoreStep
from bench.peers.methods import DISTILL, LOGPROBS
from bench.problems import inputs, shapes, tasks
from bench.report import eps, files, plot, tables

KINDS = (timing.SCORE, *timing.KINDS)


def policy(n: int = 40, v: int = 301, *, ignored: slice = slice(0), dtype=torch.float64) -> inputs.Problem:
    p = inputs.lm(n, 64, v, dtype=dtype)
    p.targets[ignored] = -100
    return tasks.of_task("logprobs", p, seed=3)


def explicit(p: inputs.Problem, softcap: float | None = None, entropy: bool = True):
    """Log-probabilities, entropies and the gradients of the weighted mean, as a user would write them."""
    e, c = (x.double().detach().requires_grad_() for x in (p.e, p.c))
    z = e @ c.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    prob, live = z.softmax(1), p.targets != -100
    logprobs = z.gather(1, p.targets.clamp(min=0)[:, None])[:, 0] - z.logsumexp(1)
    entropies = -(prob * prob.log()).sum(1)
    advantages, coefficients = p.weights.double().unbind(1)
    of_token = advantages * logprobs + (coefficients * entropies if entropy else 0)
    gradients = torch.autograd.grad(of_token[live].sum() / live.sum(), (e, c))
    return logprobs.detach(), entropies.detach(), gradients


# ---- the problems ----


def test_weights_of_a_policy():
    p = policy(400, ignored=slice(5, 17))
    advantages, coefficients = p.weights.unbind(1)
    assert not p.weights[5:17].any() and (coefficients[17:] == tasks.ENTROPY_COEFFICIENT).all()
    assert abs(advantages.mean()) < 0.2 and advantages.std().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(p.weights, policy(400, ignored=slice(5, 17)).weights)
    assert not torch.equal(p.weights, tasks.policy_weights(p, 4))
    live = p.rows(p.live())
    assert torch.equal(live.weights, p.weights[p.targets != -100]) and len(live.e) == 388
    assert torch.equal(tasks.without_entropy(p).weights[:, 0], advantages)
    assert not tasks.without_entropy(p).weights[:, 1].any()


def test_soft_targets_are_the_teachers_most_probable():
    p = inputs.lm(600, 64, 500, dtype=torch.float32)
    p.targets[7:9] = -100
    soft = tasks.soft_targets(p, seed=0, block=128)
    assert soft.targets.shape == soft.weights.shape == (600, 64) and soft.weights.dtype == torch.float32
    assert (soft.targets[7:9] == -100).all() and torch.equal(soft.live(), p.live())
    live = soft.rows(soft.live())
    assert (live.targets >= 0).all() and all(len(set(row)) == 64 for row in live.targets.tolist())
    torch.testing.assert_close(live.weights.sum(1), torch.ones(598))
    assert (live.weights.diff(dim=1) <= 0).all()
    # A teacher that differs, and not too much: of the student's own 64 the teacher has most, but not all.
    own = (live.e @ live.c.T).topk(64).indices
    shared = (own[:, :, None] == live.targets[:, None]).any(2).float().mean()
    assert 0.5 < shared < 0.95
    assert tasks.soft_targets(inputs.randn(5, 8, 9, dtype=torch.float32), 0).targets.shape == (5, 9)


# ---- steps and references ----


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_exact_outputs_and_gradient(softcap, monkeypatch):
    p = policy(70, ignored=slice(3, 40))
    logprobs, entropies, gradients = explicit(p, softcap)
    monkeypatch.setattr(errors, "BLOCK_LOGITS", 16 * 301)
    exact = errors.exact(p, softcap, "logprobs")
    live = p.live()
    for got, true in zip(exact.outputs, (logprobs, entropies), strict=True):
        torch.testing.assert_close(got[live], true[live], rtol=1e-10, atol=1e-12)
    assert exact.errors(gradients) == pytest.approx([0, 0], abs=1e-10)
    alone = errors.exact(tasks.without_entropy(p), softcap, "logprobs")
    assert alone.errors(explicit(p, softcap, entropy=False)[2]) == pytest.approx([0, 0], abs=1e-10)
    assert alone.errors(gradients)[0] > 0.02  # the entropy's part is seen

    # From the live rows alone to all of them.
    again = errors.exact(p.rows(live), softcap, "logprobs").among(p)
    assert again.errors(gradients) == pytest.approx([0, 0], abs=1e-10)
    torch.testing.assert_close(again.outputs[1][live], entropies[live], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cce_exact", "torch", "fp32_head"])
def test_a_training_step(name):
    p = policy(ignored=slice(4, 9), dtype=torch.float32)
    step = LogProbsStep(LOGPROBS[name].load(2.0), p)
    step.forward()
    step.backward()
    logprobs, entropies, gradients = explicit(p, 2.0)
    live = p.live()
    torch.testing.assert_close(step.outputs[0][live].double(), logprobs[live], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.outputs[1][live].double(), entropies[live], rtol=1e-5, atol=1e-5)
    for got, true in zip(step.gradients, gradients, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-6)
    step.release()
    assert step.outputs is None and step.gradients is None
    frozen = LogProbsStep(LOGPROBS[name].load(2.0), replace(p, frozen="c"))
    frozen.forward()
    frozen.backward()
    assert frozen.gradients[1] is None
    torch.testing.assert_close(frozen.gradients[0].double(), gradients[0], rtol=1e-4, atol=1e-6)


def test_scoring_has_no_graph():
    seen = []

    def function(e, c, t):
        seen.append((torch.is_grad_enabled(), e.requires_grad, c.requires_grad))
        return plain.logprobs(None)(e, c, t)

    step = ScoreStep(function, policy())
    step.forward()
    step.backward()
    assert seen == [(False, False, True)] and not any(x.requires_grad for x in step.outputs)
    step.release()
    assert step.outputs is None


def test_soft_targets_in_plain_torch():
    """The loss of dense probabilities, where they are few; an entry that is ignored counts for nothing."""
    p = tasks.soft_targets(inputs.lm(30, 64, 200, dtype=torch.float64), seed=0)
    p = replace(p, weights=p.weights.double())
    p.targets[3, 1:] = -100
    p.targets[5] = -100
    live = p.live()
    dense = torch.zeros(30, 200, dtype=torch.float64)
    for n, k in (p.targets != -100).nonzero().tolist():
        dense[n, p.targets[n, k]] = p.weights[n, k]
    z = p.e @ p.c.T
    expected = torch.nn.functional.cross_entropy(z[live], dense[live])
    got = plain.soft(None)(p.e, p.c, p.targets, p.weights)
    torch.testing.assert_close(got, expected)
    assert errors.exact(p, None, "distill").loss == pytest.approx(expected.item(), rel=1e-12)
    step = LossStep(plain.soft(None), p)
    step.forward()
    step.backward()
    assert errors.exact(p, None, "distill").errors(step.gradients) == pytest.approx([0, 0], abs=1e-12)


# ---- peers ----


def test_the_peers_are_called_as_their_users_call_them(monkeypatch):
    p = policy()
    calls = {}

    class Kernel:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, columns, softcap, scale, outputs):
            calls["trl"] = (bias, temperature, columns, softcap, scale, outputs)
            return (*plain.logprobs_of(plain.logits_of(hidden, weight, softcap), targets), None, None, None)

    def linear_cross_entropy(e, c, targets, **options):
        calls["apple_cce"] = options
        return -plain.logprobs_of(plain.logits_of(e, c, options["softcap"]), targets)[0]

    class Liger:
        def __init__(self, **options):
            calls["liger"] = options

        def __call__(self, c, e, targets):
            return -plain.logprobs_of(plain.logits_of(e, c, calls["liger"]["softcap"]), targets)[0]

    modules = {
        "trl": {},
        "trl.kernels": {},
        "trl.kernels.chunked_logprob": {"ChunkedLogProbFunction": Kernel},
        "cut_cross_entropy": {"linear_cross_entropy": linear_cross_entropy},
        "liger_kernel": {},
        "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": Liger},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    true = plain.logprobs_of(plain.logits_of(p.e, p.c, 4.0), p.targets)
    for name in ("trl", "apple_cce", "liger"):
        logprobs, entropies = LOGPROBS[name].load(4.0)(p.e, p.c, p.targets)
        torch.testing.assert_close(logprobs, true[0])
        assert LOGPROBS[name].entropy == (entropies is not None) == (name == "trl")
    assert calls["trl"] == (None, 1.0, 32768, 4.0, 1.0, ("entropy",))
    assert calls["apple_cce"] == {"softcap": 4.0, "reduction": "none", "impl": "cce"}
    assert calls["liger"] == {"softcap": 4.0, "reduction": "none"}


@pytest.mark.parametrize("name", ["cce", "cce_exact"])
def test_ours_are_given_the_soft_targets(name, monkeypatch):
    told = []
    monkeypatch.setattr(cce_ext, "linear_cross_entropy", lambda *a, **options: told.append((a, options)))
    DISTILL[name].load(5.0)("e", "c", "t", "w")
    assert told == [(("e", "c", "t"), {"target_weights": "w", "softcap": 5.0, "impl": name})]


def peer(name: str, load, **options) -> Method:
    return Method(name, load, task="logprobs", **options)


def test_peers_that_fail_or_lack_something(monkeypatch):
    dense = plain.logprobs(None)

    def missing(softcap):
        import no_such_package  # noqa: F401

    class BackwardFails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            import no_such_trainer  # noqa: F401

    def no_backward(e, c, t):
        return tuple(BackwardFails.apply(x) for x in dense(e, c, t))

    def off(e, c, t):
        logprobs, entropies = dense(e, c, t)
        return logprobs, 1.1 * entropies

    def not_finite(e, c, t):
        logprobs, entropies = dense(e, c, t)
        return logprobs * float("nan"), entropies

    fakes = {
        "missing": (missing, {}),
        "no_backward": (lambda s: no_backward, {}),
        "off": (lambda s: off, {}),
        "not_finite": (lambda s: not_finite, {}),
        "alone": (lambda s: lambda e, c, t: (dense(e, c, t)[0], None), {"entropy": False, "note": "no entropy"}),
    }
    for name, (load, options) in fakes.items():
        monkeypatch.setitem(LOGPROBS, name, peer(name, load, **options))
    rows = measure(small_job(task="logprobs", methods=["mm", *fakes, "torch"]))
    for kind in KINDS:
        assert rows["missing", kind]["note"] == "missing: No module named 'no_such_package'"
        assert rows["off", kind]["note"].startswith("WRONG: entropy 0.")
        assert rows["off", kind]["logprobs_err"] < 1e-4 < 0.1 < rows["off", kind]["entropy_err"]
        assert rows["not_finite", kind]["note"].startswith("WRONG: logprobs nan off")
        assert rows["not_finite", kind]["logprobs_err"] is None
        # What has no entropy is held against the gradient of log-probabilities alone.
        assert rows["alone", kind]["note"] == "no entropy" and rows["alone", kind]["entropy_err"] is None
        assert rows["alone", kind]["logprobs_err"] < 1e-4
    assert rows["alone", "loss-bw"]["de_err"] < 1e-5 and rows["alone", "loss-bw"]["dc_err"] < 1e-5
    # A head whose backward cannot be imported has its scoring.
    assert rows["no_backward", "score"]["runtime_ms"] > 0 and rows["no_backward", "score"]["note"] == ""
    assert rows["no_backward", "loss-fw"]["note"] == "missing: No module named 'no_such_trainer'"
    assert rows["no_backward", "loss-fw"]["runtime_ms"] is None
    lines = tables.table(list(rows.values())).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("no_backward")] == [
        line.split(maxsplit=1)[1] for line in lines if line.startswith("no_backward") and "score" in line
    ] + ["missing: No module named 'no_such_trainer'"]
    short = tables.short_table(list(rows.values()))
    line = next(line for line in short.splitlines() if "no_backward" in line)
    assert line.endswith("missing: No module named 'no_such_trainer'")
    assert f"{rows['no_backward', 'score']['runtime_ms']:.3f}" in line


# ---- rows, files, the command ----


def test_rows(tmp_path):
    rows = measure(small_job(task="logprobs", methods=["mm", "cce", "cce_exact", "torch"], repeats=3))
    methods = ("cce", "cce_exact", "torch")
    assert set(rows) == {("mm", k) for k in timing.KINDS} | {(m, k) for m in methods for k in KINDS}
    for (method, kind), row in rows.items():
        assert row["x_mm"] == pytest.approx(row["runtime_ms"] / rows["mm", "loss-fw"]["runtime_ms"])
        products = {"score": 1, "loss-fw": 1, "loss-bw": 2, "loss-fw-bw": 3}[kind]
        assert row["tflops"] * row["runtime_ms"] == pytest.approx(products * 2 * 64 * 64 * 512 * 1e-9)
        assert (row["logprobs_err"] is not None) == (row["entropy_err"] is not None) == (method != "mm")
        has_gradient = kind in ("loss-bw", "loss-fw-bw") and method != "mm"
        assert (row["de_err"] is not None) == has_gradient
        assert (row["dc_err_mean8"] is not None) == (has_gradient and method == "cce")
        assert row["note"] == ("products only" if method == "mm" else "")
    for method in methods:
        assert rows[method, "score"]["logprobs_err"] < 1e-4 and rows[method, "loss-bw"]["entropy_err"] < 1e-4
    assert rows["cce_exact", "loss-bw"]["dc_err"] < 1e-5 and rows["torch", "loss-bw"]["de_err"] < 1e-5
    one, mean = rows["cce", "loss-bw"]["dc_err"], rows["cce", "loss-bw"]["dc_err_mean8"]
    assert 1e-4 < mean < 0.6 * one < 0.1
    meta = META | {"task": "logprobs"}
    files.save(tmp_path / "rows.json", meta, list(rows.values()))
    for wrong, message in ((META, "cce score: kind"), (META | {"task": "rl"}, "meta: task is 'rl'")):
        with pytest.raises(ValueError, match=message):
            files.check({"meta": wrong, "rows": list(rows.values())})


def test_rows_of_soft_targets_and_of_ignored_tokens():
    rows = measure(small_job(task="distill", methods=["mm", "torch"]))
    assert set(rows) == {(m, k) for m in ("mm", "torch") for k in timing.KINDS}
    assert rows["torch", "loss-bw"]["de_err"] < 1e-4 and rows["torch", "loss-fw"]["note"] == ""
    for task in ("logprobs", "distill"):
        found = rows_of(small_job(task=task, methods=["torch"], ignored=0.75))
        assert len(found) == 2 * (4 if task == "logprobs" else 3)
        assert {r["n"] for r in found} == {64, 16} and all(r["note"] == "" for r in found)
        assert all(r["de_err"] < 1e-4 and r["dc_err"] < 1e-4 for r in found if r["kind"] == "loss-bw")
        assert all(r["x_live"] > 0 for r in found if r["n"] == 64)
        if task == "logprobs":
            assert all(r["logprobs_err"] < 1e-4 and r["entropy_err"] < 1e-4 for r in found)


def test_outputs_of_what_fits(monkeypatch):
    """Errors on the first tokens, where fp64 of all does not fit, and none at all where it has no room."""
    monkeypatch.setattr(errors, "bytes_needed", lambda p, tokens, task: tokens)
    for room, notes in (
        (130, ["outputs error on the first 128 tokens", "gradient error on the first 128 tokens"]),
        (9, []),
    ):
        monkeypatch.setattr(errors, "free_bytes", lambda x, room=room: room)
        rows = measure(small_job(task="logprobs", methods=["torch"], shape=("512,8,50", 512, 8, 50), data="randn"))
        expected = notes or [f"{x} not checked: fp64 does not fit" for x in ("outputs", "gradient")]
        assert [rows["torch", kind]["note"] for kind in ("score", "loss-bw")] == expected
        assert (rows["torch", "score"]["logprobs_err"] is None) == (not notes)


def test_host_times_and_the_time_limit():
    rows = measure(small_job(task="logprobs", methods=["mm", "torch"], host=True))
    assert all(row["host_us"] > 0 for row in rows.values()) and ("torch", "score") in rows
    rows = measure(small_job(task="logprobs", methods=["mm", "torch"], seconds=0.0))
    assert len(rows) == 7 and {row["note"] for row in rows.values()} == {worker.TIME_LIMIT}


@pytest.mark.usefixtures("processes")
def test_memory_in_processes_of_their_own():
    p = policy(512, 32768, dtype=torch.float32)
    score, training = (memory.peaks(LOGPROBS["torch"], p, None, scoring) for scoring in (True, False))
    ours = memory.peaks(LOGPROBS["cce"], p, None, True)
    assert set(score) == set(ours) == {"score"} and set(training) == set(timing.KINDS)
    if score["score"] is None:
        pytest.skip("this system does not tell a process's peak memory")
    logits_mb = 512 * 32768 * 4 / 2**20
    assert score["score"] > 0.9 * logits_mb and ours["score"] < 0.5 * logits_mb
    soft = tasks.soft_targets(inputs.lm(64, 64, 300, dtype=torch.float32), 0)
    assert set(memory.peaks(DISTILL["torch"], soft, 3.0)) == set(timing.KINDS)


@pytest.mark.usefixtures("processes")
def test_memory_is_of_what_was_asked_for(monkeypatch, capsys):
    """The process that measures it is told whether to score, and has the weights and the softcap."""
    seen = []
    make_step = memory.make_step

    def step_of(method, p, softcap, scoring):
        seen.append((method.task, len(p.e), tuple(p.weights.shape), softcap, scoring))
        return make_step(method, p, softcap, scoring)

    def run(module, *arguments, **options):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        memory.main()
        return subprocess.CompletedProcess([], 0, stdout=capsys.readouterr().out, stderr="")

    monkeypatch.setattr(memory, "make_step", step_of)
    monkeypatch.setattr(memory.child, "run", run)
    p = policy(16, dtype=torch.float32)
    assert set(memory.peaks(LOGPROBS["torch"], p, 4.0, True)) == {"score"}
    assert set(memory.peaks(LOGPROBS["torch"], p, None)) == set(timing.KINDS)
    memory.peaks(DISTILL["torch"], tasks.soft_targets(p, 0), None)
    assert seen == [
        *(("logprobs", n, (n, 2), 4.0, True) for n in (8, 16)),
        *(("logprobs", n, (n, 2), None, False) for n in (8, 16)),
        *(("distill", n, (n, 64), None, False) for n in (8, 16)),
    ]


def in_this_process(job, left):
    state = worker.State(Path("unused"))
    state.save = lambda: None
    worker.Shapework(job, state).run()
    return state.rows, state.statistics


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "measure", in_this_process)
    saved = {}
    for task, methods in (("logprobs", ["cce", "torch", "trl"]), ("distill", ["torch"])):
        out = saved[task] = tmp_path / f"{task}.json"
        options = ["--task", task, "--shape", "16,64,256", "--device", "cpu", "--methods", *methods, "--repeats", "1"]
        monkeypatch.setattr(sys, "argv", ["bench", *options])
        monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", None)
        assert cli.main([*options, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        meta, rows = files.read_bench(out)
        assert meta["task"] == task == files.task_of(meta)
        if task == "logprobs":
            assert "lp err" in printed and "\ntrl    missing: " in printed
            assert "score ms" in tables.short_table(rows) and {r["kind"] for r in rows} == set(KINDS)
        else:
            assert "lp err" not in printed and "score ms" not in tables.short_table(rows)
        assert plot.main([str(out)]) == 0 and out.with_suffix(".png").stat().st_size > 10_000
        with pytest.raises(SystemExit):
            eps.main([str(out)])
        assert f"of --task {task}, which has no table of this kind" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(x) for x in saved.values()])
    assert "of --task distill, and" in capsys.readouterr().err


def test_arguments(capsys, monkeypatch):
    args, _ = cli.parse_arguments(["--device", "cpu"])
    assert args.task == "loss"
    for task, table in (("logprobs", LOGPROBS), ("distill", DISTILL)):
        args, todo = cli.parse_arguments(["--device", "cpu", "--task", task])
        assert args.methods == [m for m in table if not table[m].on_request] and len(todo) == 1
        for methods in (["eps"], ["baseline"]):
            with pytest.raises(SystemExit):
                cli.parse_arguments(["--device", "cpu", "--task", task, "--methods", *methods])
            assert f"there is no {methods[0]}; there are {', '.join(table)}" in capsys.readouterr().err
    args, _ = cli.parse_arguments(["--device", "cpu", "--task", "logprobs", "--methods", "fp32_head"])
    assert args.methods == ["mm", "fp32_head"]
    with pytest.raises(SystemExit):
        cli.parse_arguments(["--task", "rl"])
    assert "argument --task: invalid choice: 'rl'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for task, name in (("loss", "gemma2"), ("logprobs", "trl"), ("distill", "trl")):
        assert [place.shape.name for place in cli.parse_arguments(["--task", task])[1]] == [name]
    named = [shapes.parse(name)[1:] for name in ("trl", "trl_large", "liger")]
    assert named == [(8192, 4096, 151936), (16384, 2048, 248320), (4096, 4096, 128256)]


def test_files_of_before_have_the_columns():
    rows = made_up([(64, 32, 100)])
    old = [{k: x for k, x in row.items() if k not in ("logprobs_err", "entropy_err")} for row in rows]
    assert files.check({"meta": META, "rows": old}) == "bench" and [complete(row) for row in old] == rows
    del rows[0]["entropy_err"]
    with pytest.raises(ValueError, match=r"a row has \['entropy_err'\] too many or too few"):
        files.check({"meta": META, "rows": rows})
