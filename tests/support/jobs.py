"""The benchmark on a small shape, in this process, and the fixtures of its tests. Needs tqdm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.measure import memory, timing, worker


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """One thread for tiny calls and, but for a test that wants its processes, a made-up memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if "processes" not in request.fixturenames:
        monkeypatch.setattr(memory, "peaks", lambda *a: dict.fromkeys((*timing.KINDS, timing.SCORE), 1.0))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def processes():
    """For a test that measures memory in processes of their own."""


def small_job(**options) -> worker.Job:
    given = {
        "shape": ("64,64,512", 64, 64, 512),
        "data": "lm",
        "dtype": "float32",
        "device": "cpu",
        "methods": ["mm"],
        "softcap": None,
        "seed": 0,
        "repeats": 2,
        "warmup": 1,
        "seconds": None,
        "excluded": {},
    }
    return worker.Job(**(given | options))


def rows_of(job: worker.Job) -> list[dict]:
    state = worker.State(Path("unused"))
    state.save = lambda: None
    worker.Shapework(job, state).run()
    return state.rows


def measure(job: worker.Job) -> dict[tuple[str, str], dict]:
    """Its rows by method and kind."""
    return {(r["method"], r["kind"]): r for r in rows_of(job)}
