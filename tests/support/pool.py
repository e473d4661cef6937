"""Processes of a group that run cases of tests/ranks, one after the other, each on all ranks at once.

A pool starts with its first case and stays: starting takes seconds, a case much less. A case that fails on any rank, or
takes a rank down, or hangs, ends the pool, since ranks that parted ways cannot go on together; the next case has a
new one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """What went wrong, rank by rank."""


class Pool:
    def __init__(self, folder: Path, root: Path, *, start: float = 180, case: float = 240, others: float = 10) -> None:
        """Cases of `folder`, named as pytest does below `root`. Limits in seconds: until all ranks are there, of a
        case, and of the other ranks once one has failed."""
        self.folder, self.root = folder, root
        self.start_limit, self.case_limit, self.others_limit = start, case, others
        self.processes: list[subprocess.Popen] = []
        self.connections: list = []
        self.logs = Path()

    def run(self, ranks: int, case: str) -> None:
        """Raises Failed where a rank did not pass, and skips where they do."""
        if len(self.processes) != ranks:
            self.close()
            self._start(ranks)
        for connection in self.connections:
            with suppress(OSError):  # a rank that has ended says so below
                connection.send(case)
        answers = self._finish(self._answers(self.case_limit))
        reasons = [text for outcome, text in answers if outcome == "skipped"]
        if reasons:
            pytest.skip(reasons[0])

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for connection in self.connections:
            connection.close()
        if self.processes:
            shutil.rmtree(self.logs, ignore_errors=True)
        self.processes, self.connections = [], []

    def _start(self, ranks: int) -> None:
        self.logs = Path(tempfile.mkdtemp(prefix="ranks-"))
        path = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        for rank in range(ranks):
            ours, theirs = Pipe()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **({} if os.environ.get("CCE_RANKS_DEVICE") == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
            }
            command = [sys.executable, "-m", "support.rank", str(theirs.fileno()), str(self.logs / "store")]
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [*command, str(self.folder), str(self.root)],
                    env=environment,
                    cwd=self.root,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[theirs.fileno()],
                )
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        self._finish(self._answers(self.start_limit))

    def _answers(self, limit: float) -> dict[int, tuple[str, str]]:
        """(outcome, text) of the ranks that answer in time, or end."""
        answers: dict[int, tuple[str, str]] = {}
        deadline = time.monotonic() + limit
        while len(answers) < len(self.connections):
            waiting = [c for rank, c in enumerate(self.connections) if rank not in answers]
            for connection in wait(waiting, max(0.0, deadline - time.monotonic())):
                rank = self.connections.index(connection)
                try:
                    answers[rank] = connection.recv()
                except (EOFError, ConnectionError):
                    code = self.processes[rank].wait()
                    answers[rank] = "failed", f"ended with exit code {code}. Its last words:\n{self._tail(rank)}"
                if answers[rank][0] == "failed":
                    deadline = min(deadline, time.monotonic() + self.others_limit)
            if time.monotonic() >= deadline:
                break
        return answers

    def _finish(self, answers: dict[int, tuple[str, str]]) -> list[tuple[str, str]]:
        """All ranks' answers where none failed. Ends the pool otherwise."""
        missing = [rank for rank in range(len(self.processes)) if rank not in answers]
        if not missing and all(outcome != "failed" for outcome, _ in answers.values()):
            return [answers[rank] for rank in sorted(answers)]
        for rank in missing:  # faulthandler writes where it is to its log
            self.processes[rank].send_signal(signal.SIGUSR1)
        if missing:
            time.sleep(1)
        for rank in missing:
            answers[rank] = "failed", f"did not finish, and was killed. It was here:\n{self._tail(rank)}"
        passed = [rank for rank in sorted(answers) if answers[rank][0] != "failed"]
        texts: dict[str, list[int]] = {}
        for rank in sorted(answers, key=lambda rank: (rank in missing, rank)):  # the cause first
            if rank not in passed:
                texts.setdefault(answers[rank][1], []).append(rank)
        self.close()
        parts = [f"---- rank {', '.join(map(str, ranks))}: {text.rstrip()}" for text, ranks in texts.items()]
        if passed:
            parts.append(f"---- rank {', '.join(map(str, passed))}: no failure")
        raise Failed("\n\n".join(parts))

    def _log(self, rank: int) -> Path:
        return self.logs / f"rank{rank}.log"

    def _tail(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")[-4000:]
