"""The benchmark on a small shape, in this process. Needs tqdm."""

from __future__ import annotations

from pathlib import Path

from bench.measure import worker


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
