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

from ..peers.method import Gradients, LossStep, Step, Unsupported, make_step
from ..peers.methods import METHODS
from ..problems import inputs, shapes
from ..problems.inputs import Problem, first_line
from ..problems.regimes import Regime, ignored_count, live_alone
from ..problems.shapes import Shape
from ..problems.statistics import statistics
from . import errors, host, memory
from .rows import Row, add_note, empty_rows
from .timing import FEWEST_REPEATS, SLOW_MS, Times, interleave, spread

# Floating-point operations of the dense loss, in products of N x D x V multiply-adds: with both gradients, with one.
PRODUCTS = {"loss-fw": (1, 1), "loss-bw": (2, 1), "loss-fw-bw": (3, 2)}
DRAWS = 8
# Of the time there is: for the first calls of all methods, and of any one of them.
PREPARE_SHARE = 0.75
METHOD_SHARE = 0.5
TIME_LIMIT = "not measured: the time limit"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure. data: one of inputs.KINDS, or saved:FILE. seconds: time to stay within, or None.

    excluded: the note of each case that is not to be tried again. ignored, spans, frozen: a Regime's. host: whether
    host times are measured as well.
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

    @property
    def regime(self) -> Regime:
        return Regime(self.ignored, self.spans, self.frozen)


class Case(NamedTuple):
    """A method on the problem, or on its live rows alone: each has rows, and turns, of its own."""

    method: str
    alone: bool

    @property
    def name(self) -> str:
        return f"{self.method} on the live rows alone" if self.alone else self.method


def cases(job: Job) -> list[Case]:
    """Where tokens are ignored each method is also measured on the others alone."""
    return [Case(m, alone) for m in job.methods for alone in ((False, True) if job.ignored else (False,))]


def case_rows(job: Job, case: Case, note: str) -> list[Row]:
    """The rows of a case before anything is measured."""
    shape = Shape(*job.shape)
    if case.alone:
        shape = shapes.of(shape.n - ignored_count(shape.n, job.ignored), shape.d, shape.v)
    return empty_rows(shape, job.data, case.method, note, job.regime.name(case.alone))


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
    return job.regime.of(p, job.seed)


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
        self.exact: dict[bool, errors.Exact | None] = {}
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
        if not self.job.ignored:
            self.problems, self.exact = {False: p}, {False: errors.exact(p, self.job.softcap)}
            return
        self.problems = {False: p, True: live_alone(p)}
        # Of the live rows, whatever the number that fits: the first tokens of all may have no live one among them.
        exact = errors.exact(self.problems[True], self.job.softcap)
        self.exact = {True: exact, False: exact and exact.among(p)}

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
        """The first calls: compiles, checks the loss and the gradient, measures memory. None if the method fails."""
        rows, method, problem = self.rows[case.name], METHODS[case.method], self.problems[case.alone]
        try:
            step = make_step(method, problem, self.job.softcap)
            if isinstance(step, LossStep):
                self.check(step, case)
            self.call(step)
            start = time.perf_counter()
            self.call(step)
            self.calls_ms[case.name] = 1e3 * (time.perf_counter() - start)
            peaks = memory.peaks(method, problem, self.job.softcap)
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

    def check(self, step: LossStep, case: Case) -> None:
        """Loss and gradients against the exact ones; a loss that is more than 1 % off is noted."""
        rows, method, exact = self.rows[case.name], METHODS[case.method], self.exact[case.alone]
        if exact is None:
            add_note(rows, "gradient not checked: fp64 does not fit")
            return
        of = exact.problem
        if len(of.e) < len(self.problems[case.alone].e):
            add_note(rows, f"gradient error on the first {len(of.e)} tokens")
            step = LossStep(step.function, of)
        total: Gradients = ()
        figures: dict[str, float | None] = {}
        for draw in range(DRAWS if method.draws else 1):
            torch.manual_seed(self.job.seed + draw)
            step.forward()
            step.backward()
            assert step.loss is not None and step.gradients is not None
            if draw == 0:
                loss = step.loss.item()
                if not abs(loss - exact.loss) <= 0.01 * abs(exact.loss):
                    add_note(rows, f"WRONG: loss {loss:.6g}, exact {exact.loss:.6g}")
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

    def failed(self, name: str, error: Exception) -> None:
        """Notes why a method has no figures. Raises DeviceLost if the GPU does not answer any more."""
        if isinstance(error, ImportError) and isinstance(error.__cause__ or error, ModuleNotFoundError):
            note = f"missing: {first_line(error)}"
        elif isinstance(error, Unsupported):
            note = f"not run: {first_line(error)}"
        else:
            note = f"failed: {first_line(error)}"
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
    if job.ignored and any(METHODS[m].compiled for m in job.methods):
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
