"""The workers of one shape: `worker.py` measures, and what takes it down is left out of the next one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import child
from .rows import Row
from .worker import TIME_LIMIT, Job, case_rows, cases

# Of a shape's time what its process plans with, and the seconds more after which it is ended: a call takes what it
# takes, and a compiler that hangs does not look at the clock.
SHARE = 0.9
GRACE_SECONDS = 20.0


def measure(job: Job, seconds_left: float) -> tuple[list[Row], dict[str, float]]:
    """Rows and input statistics of a shape, from workers: another one without the culprit where one comes to grief."""
    end = time.monotonic() + seconds_left
    while True:
        left = end - time.monotonic()
        limited = job.seconds is not None
        if limited and left <= 0:
            return not_measured(job, TIME_LIMIT), {}
        with tempfile.TemporaryDirectory() as folder:
            job_file, state_file = Path(folder, "job.json"), Path(folder, "state.json")
            seconds = SHARE * min(job.seconds, left) if job.seconds is not None else None
            job_file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, seconds=seconds))))
            timeout = None if seconds is None else min(left, seconds + GRACE_SECONDS)
            try:
                code = child.run("bench.measure.worker", str(job_file), str(state_file), timeout=timeout).returncode
                ended = f"failed: its process ended with code {code}"
            except subprocess.TimeoutExpired:
                ended = "failed: it went on past the time limit"
            state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
        if state.get("done"):
            return state["rows"], state["statistics"]
        note = state.get("reason") or ended
        culprit = state.get("current")
        if culprit is None:
            return not_measured(job, note), {}
        print(f"{culprit}: {note}; again without it", file=sys.stderr)
        job = dataclasses.replace(job, excluded={**job.excluded, culprit: note})


def not_measured(job: Job, note: str) -> list[Row]:
    return [r for case in cases(job) for r in case_rows(job, case, job.excluded.get(case.name, note))]
