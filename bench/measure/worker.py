"""All methods at one shape, in a process of its own: `python -m bench.measure.worker JOB.json STATE.json`.

A kernel that reads out of bounds takes its process's GPU context with it, and a compiler can crash or hang. So this
process notes in STATE what it is at; the one that started it (`supervisor.py`) starts another without the culprit.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..peers.method import (
    Gradients,
    LogProbsStep,
    LossStep,
    Method,
    Outputs,
    ProductStep,
    ScoreStep,
    Step,
    make_step,
    reason,
)
from ..peers.methods import OF_TASK
from ..problems import inputs, shapes
from ..problems.inputs import Problem, first_line
from ..problems.regimes import Regime, ignored_count, live_alone
from ..problems.shapes import Shape
from ..problems.statistics import statistics
from ..problems.tasks import of_task, without_entropy
from . import errors, host, memory
from .rows import Row, add_note, empty_rows
from .timing import FEWEST_REPEATS, KINDS, SCORE, SLOW_MS, Times, interleave, spread

# Floating-point operations of the dense task, in products of N x D x V multiply-adds: with both gradients, with one.
PRODUCTS = {SCORE: (1, 1), "loss-fw": (1, 1), "loss-bw": (2, 1), "loss-fw-bw": (3, 2)}
DRAWS = 8
# Of the time there is: for the first calls of all methods, and of any one of them.
PREPARE_SHARE = 0.75
METHOD_SHARE = 0.5
# Of the rms of log-probabilities or entropies: an rms error above it is a mistake. Rounding logits to bf16 costs some
# tenths of a percent.
WRONG_SHARE = 0.05
TIME_LIMIT = "not measured: the time limit"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure. data: one of inputs.KINDS, or saved:FILE. seconds: time to stay within, or None.

    excluded: the note of each case that is not to be tried again. ignored, spans, frozen: a Regime's. host: whether
    host times are measured as well. task: one of problems.tasks.TASKS.
    """

    shape: tuple[str, int, int, int]
    data: str
    dtype: str
    device: str
    methods: list[str]
    softcap: float | None
    seed: int
    repeats: int
    warmup: int
    seconds: float | None
    excluded: dict[str, str]
    ignored: float = 0.0
    spans: bool = False
    frozen: str | None = None
    host: bool = False
    task: str = "loss"

    @property
    def regime(self) -> Regime:
        return Regime(self.ignored, self.spans, self.frozen)

    @property
    def table(self) -> dict[str, Method]:
        """The methods of its task, by name."""
        return OF_TASK[self.task]


class Case(NamedTuple):
    """A method's training or scoring on the problem, or on its live rows alone: each has its own rows and turns."""

    method: str
    alone: bool
    scoring: bool = False

    @property
    def name(self) -> str:
        name = f"{self.method} scoring" if self.scoring else self.method
        return f"{name} on the live rows alone" if self.alone else name

    @property
    def kinds(self) -> tuple[str, ...]:
        return (SCORE,) if self.scoring else KINDS


def cases(job: Job) -> list[Case]:
    """Where tokens are ignored each method is also measured on the others alone.

    Log-probabilities are wanted without a gradient as well, where the plain product is no other than with one.
    """
    found = []
    for method in job.methods:
        for alone in (False, True) if job.ignored else (False,):
            scores = job.task == "logprobs" and not job.table[method].product
            found += [Case(method, alone, scoring) for scoring in ((True, False) if scores else (False,))]
    return found


def case_rows(job: Job, case: Case, note: str) -> list[Row]:
    """The rows of a case before anything is measured."""
    shape = Shape(*job.shape)
    if case.alone:
        shape = shapes.of(shape.n - ignored_count(shape.n, job.ignored), shape.d, shape.v)
    return empty_rows(shape, job.data, case.method, note, job.regime.name(case.alone), case.kinds)


@dataclasses.dataclass
class State:
    """What the worker is at (current: a case's name, or None), why it ended, and what it found."""

    file: Path
    current: str | None = None
    reason: str | None = None
    done: bool = False
    statistics: dict[str, float] = dataclasses.field(default_factory=dict)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def save(self) -> None:
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "file"}
        self.file.write_text(json.dumps(content))


class DeviceLost(Exception):
    """The GPU context is gone: nothing more can run in this process."""


def load_problem(job: Job) -> Problem:
    dtype = getattr(torch, job.dtype)
    if job.data.startswith("saved:"):
        p = inputs.saved(job.data.removeprefix("saved:"), dtype=dtype, device=job.device)
    else:
        p = inputs.make(job.data, *job.shape[1:], dtype=dtype, device=job.device, seed=job.seed)
    return of_task(job.task, job.regime.of(p, job.seed), job.seed)


def fill_times(job: Job, rows: dict[str, list[Row]], times: dict[str, Times]) -> None:
    """Times, and what follows from them, into the rows of each case."""
    medians: dict[tuple[str, bool, str], float] = {}
    measured = [case for case in cases(job) if case.name in times]
    for case in measured:
        if not times[case.name].forward:
            add_note(rows[case.name], TIME_LIMIT)
            continue
        for row in rows[case.name]:
            row["runtime_ms"], row["runtime_p20"], row["runtime_p80"] = spread(times[case.name].of(row["kind"]))
            medians[case.method, case.alone, row["kind"]] = row["runtime_ms"]
            operations = 2 * PRODUCTS[row["kind"]][bool(job.frozen)] * row["n"] * row["d"] * row["v"]
            row["tflops"] = operations / row["runtime_ms"] * 1e-9
    for case in measured:
        for row in rows[case.name]:
            mm = medians.get(("mm", case.alone, "loss-fw"))
            live = None if case.alone else medians.get((case.method, True, row["kind"]))
            row["x_mm"] = row["runtime_ms"] / mm if mm and row["runtime_ms"] else None
            row["x_live"] = row["runtime_ms"] / live if live and row["runtime_ms"] else None


def added(total: Gradients, drawn: Gradients) -> Gradients:
    """The sums of both, in the place of the first."""
    return tuple(None if t is None or g is None else t.add_(g) for t, g in zip(total, drawn, strict=True))


class Shapework:
    """Measures the cases of a job, one after the other and then in turns."""

    def __init__(self, job: Job, state: State) -> None:
        self.job, self.state = job, state
        self.shape = Shape(*job.shape)
        seconds = float("inf") if job.seconds is None else job.seconds
        self.deadline = time.monotonic() + seconds
        # First calls can take long, and without the turns after them nothing is measured at all.
        self.prepare_until = time.monotonic() + PREPARE_SHARE * seconds
        self.problems: dict[bool, Problem] = {}
        self.exact: dict[tuple[bool, bool], errors.Exact | None] = {}
        self.rows: dict[str, list[Row]] = {}
        self.calls_ms: dict[str, float] = {}

    def run(self) -> None:
        """Fills state.statistics and state.rows. Raises DeviceLost."""
        job = self.job
        self.prepare_problems()
        self.state.statistics = statistics(self.problems[False])
        steps: dict[str, Step] = {}
        for case in tqdm(cases(job), desc=f"{self.shape.name}: first calls", leave=False):
            name = case.name
            self.rows[name] = case_rows(job, case, job.excluded.get(name, ""))
            if name in job.excluded:
                continue
            if time.monotonic() + self.seconds_to_time() >= self.prepare_until:
                add_note(self.rows[name], TIME_LIMIT)
                continue
            self.state.current = name
            self.state.save()
            step = self.prepare_in_time(case)
            if step is not None:
                steps[name] = step
        self.state.current = None
        self.state.save()
        self.exact = {}

        slow = frozenset(name for name in steps if self.calls_ms[name] > SLOW_MS and job.repeats > FEWEST_REPEATS)
        with tqdm(total=self.turns(steps, slow), desc=f"{self.shape.name}: in turns", leave=False) as bar:
            times = interleave(
                steps,
                job.device,
                job.repeats,
                job.warmup,
                few=slow,
                deadline=self.deadline,
                tick=bar.update,
                failed=self.failed,
            )
        fill_times(job, self.rows, times)
        for name, measured in times.items():
            if 0 < len(measured.forward) < job.repeats:
                add_note(self.rows[name], f"{len(measured.forward)} repeats")
        if job.host:
            steps = {name: steps[name] for name in times}
            for name, found in host.microseconds(steps, job.device, few=slow, deadline=self.deadline).items():
                for row in self.rows[name]:
                    row["host_us"] = spread(found.of(row["kind"]))[0] if found.forward else None
        self.state.rows = [row for rows in self.rows.values() for row in rows]

    def prepare_problems(self) -> None:
        """The problem and, where tokens are ignored, its live rows alone (of True), with the exact gradient of each."""
        p = load_problem(self.job)
        self.problems = {False: p, True: live_alone(p)} if self.job.ignored else {False: p}
        self.find_exact(entropy=True)

    def find_exact(self, entropy: bool) -> None:
        """Of each problem; of log-probabilities with their entropy, or of those alone, which some methods have."""
        of = {alone: p if entropy else without_entropy(p) for alone, p in self.problems.items()}
        # Of the live rows, whatever the number that fits: the first tokens of all may have no live one among them.
        found = errors.exact(of[bool(self.job.ignored)], self.job.softcap, self.job.task)
        self.exact[bool(self.job.ignored), entropy] = found
        if self.job.ignored:
            self.exact[False, entropy] = found and found.among(of[False])

    def exact_of(self, case: Case) -> errors.Exact | None:
        entropy = self.job.table[case.method].entropy
        if (case.alone, entropy) not in self.exact:
            self.find_exact(entropy)
        return self.exact[case.alone, entropy]

    def turns(self, steps: dict[str, Step], slow: frozenset[str]) -> int:
        quick = len(steps) - len(slow)
        return quick * (self.job.repeats + self.job.warmup) + len(slow) * (FEWEST_REPEATS + min(1, self.job.warmup))

    def seconds_to_time(self) -> float:
        """Seconds that the turns of what is prepared so far will take, with a little to spare."""
        rounds = self.job.repeats + self.job.warmup
        few = min(rounds, FEWEST_REPEATS + 1)
        ms = sum(x * (few if x > SLOW_MS else rounds) for x in self.calls_ms.values())
        return 1.1e-3 * ms

    def prepare_in_time(self, case: Case) -> Step | None:
        """prepare(), in a process that ends itself if that hangs, to leave the others their time."""
        if self.job.seconds is None:
            return self.prepare(case)
        limit = METHOD_SHARE * self.job.seconds

        def end() -> None:
            self.state.reason = f"failed: its first calls took more than {limit:.0f} s"
            self.state.save()
            os._exit(3)

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            return self.prepare(case)
        finally:
            timer.cancel()

    def prepare(self, case: Case) -> Step | None:
        """The first calls: compiles, checks the outputs and the gradient, measures memory. None if the method fails."""
        rows, method, problem = self.rows[case.name], self.job.table[case.method], self.problems[case.alone]
        try:
            step = make_step(method, problem, self.job.softcap, case.scoring)
            if not isinstance(step, ProductStep):
                self.check(step, case)
            self.call(step)
            start = time.perf_counter()
            self.call(step)
            self.calls_ms[case.name] = 1e3 * (time.perf_counter() - start)
            peaks = memory.peaks(method, problem, self.job.softcap, case.scoring)
            for row in rows:
                row["op_mem_mb"] = peaks[row["kind"]]
            add_note(rows, method.note)
            return step
        except Exception as error:
            self.failed(case.name, error)
        return None

    def call(self, step: Step) -> None:
        step.forward()
        step.backward()
        step.release()
        self.synchronize()

    def synchronize(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()

    def check(self, step: LossStep | LogProbsStep | ScoreStep, case: Case) -> None:
        """Outputs and gradients against the exact ones; a loss that is more than 1 % off is noted."""
        rows, method, exact = self.rows[case.name], self.job.table[case.method], self.exact_of(case)
        what = "outputs" if case.scoring else "gradient"
        if exact is None:
            add_note(rows, f"{what} not checked: fp64 does not fit")
            return
        of = exact.problem
        if len(of.e) < len(self.problems[case.alone].e):
            add_note(rows, f"{what} error on the first {len(of.e)} tokens")
            step = type(step)(step.function, of)
        if isinstance(step, ScoreStep):
            step.forward()
            assert step.outputs is not None
            self.check_outputs(step.outputs, exact, rows)
            step.release()
            return
        total: Gradients = ()
        figures: dict[str, float | None] = {}
        for draw in range(DRAWS if method.draws else 1):
            torch.manual_seed(self.job.seed + draw)
            step.forward()
            step.backward()
            assert step.gradients is not None
            if draw == 0:
                if isinstance(step, LossStep):
                    assert step.loss is not None
                    loss = step.loss.item()
                    if not abs(loss - exact.loss) <= 0.01 * abs(exact.loss):
                        add_note(rows, f"WRONG: loss {loss:.6g}, exact {exact.loss:.6g}")
                else:
                    assert step.outputs is not None
                    self.check_outputs(step.outputs, exact, rows)
                figures["de_err"], figures["dc_err"] = exact.errors(step.gradients)
            if method.draws:
                drawn = tuple(None if g is None else g.float() / DRAWS for g in step.gradients)
                total = added(total, drawn) if total else drawn
            step.release()
        if method.draws:
            figures["de_err_mean8"], figures["dc_err_mean8"] = exact.errors(total)
        if any(x is not None and not math.isfinite(x) for x in figures.values()):
            add_note(rows, "WRONG: a gradient is not finite")
            figures = {name: x if x is not None and math.isfinite(x) else None for name, x in figures.items()}
        for row in rows:
            if row["kind"] != "loss-fw":
                row.update(figures)

    def check_outputs(self, outputs: Outputs, exact: errors.Exact, rows: list[Row]) -> None:
        """The largest error of log-probabilities and of entropies into the rows; a note where the rms is too large."""
        live = exact.problem.live()
        for name, x, true in zip(("logprobs", "entropy"), outputs, exact.outputs, strict=True):
            if x is None:
                continue
            largest, rms = errors.distances(x, true, live)
            scale = true[live].square().mean().sqrt().item()
            if not rms <= WRONG_SHARE * scale:
                add_note(rows, f"WRONG: {name} {rms:.3g} off (rms), of {scale:.3g}")
            for row in rows:
                row[f"{name}_err"] = largest if math.isfinite(largest) else None

    def failed(self, name: str, error: Exception) -> None:
        """Notes why a method has no figures. Raises DeviceLost if the GPU does not answer any more."""
        note = reason(error)
        case = next(x for x in cases(self.job) if x.name == name)
        self.rows[name] = case_rows(self.job, case, note)
        self.calls_ms.pop(name, None)
        error.__traceback__ = None  # its frames hold the method's tensors
        gc.collect()
        if self.job.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except Exception as lost:
            self.state.current = name
            raise DeviceLost(note) from lost
        torch.cuda.empty_cache()


def main() -> None:
    job_file, state_file = sys.argv[1:]
    job = Job(**json.loads(Path(job_file).read_text()))
    state = State(Path(state_file))
    if job.ignored and any(job.table[m].compiled for m in job.methods):
        # The live rows are a second length, for which a compiled function would become one of any length, for both.
        torch._dynamo.config.automatic_dynamic_shapes = False
    try:
        Shapework(job, state).run()
        state.done = True
    except DeviceLost as lost:
        state.reason = str(lost)
        state.save()
        os._exit(3)  # a context that is lost cannot be torn down in order
    except Exception as error:
        state.current = None
        state.reason = f"failed: {first_line(error)}"
    state.save()
    sys.exit(0 if state.done else 3)


if __name__ == "__main__":
    main()
