"""A rank of the pool: python -m support.rank CONNECTION STORE FOLDER ROOT runs the cases that it is told to."""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
from multiprocessing.connection import Connection

import pytest
import torch
from torch import distributed as dist

# A rank that waits for one that has failed fails too, where the pool does not end it before.
COLLECTIVE_LIMIT = datetime.timedelta(seconds=60)


class Rank:
    """A pytest plugin: cases come and outcomes go by the connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        cases = {item.nodeid: item for item in session.items}
        self.connection.send(("ready", ""))
        while True:
            try:
                case = self.connection.recv()
            except EOFError:  # the pool is gone
                return True
            if case in cases:
                self.reports.clear()
                cases[case].ihook.pytest_runtest_protocol(item=cases[case], nextitem=None)
                self.connection.send(self.outcome())
            else:
                self.connection.send(("failed", f"does not know {case}"))

    def outcome(self) -> tuple[str, str]:
        failed = [report for report in self.reports if report.failed]
        if failed:
            return "failed", "\n".join(self.text_of(report) for report in failed)
        for report in self.reports:
            if report.skipped:
                return "skipped", report.longrepr[2]
        return "passed", ""

    @staticmethod
    def text_of(report: pytest.TestReport) -> str:
        captured = [f"{title}:\n{text}" for title, text in report.sections]
        return "\n".join([f"{report.when}\n{report.longreprtext}", *captured])


def main(connection: str, store: str, folder: str, root: str) -> int:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    gpus = os.environ.get("CCE_RANKS_DEVICE") == "cuda"
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo",
        init_method=f"file://{store}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=COLLECTIVE_LIMIT,
    )
    plugin = Rank(Connection(int(connection)))
    # tee-sys: what is printed goes to the log as well, where it outlives the process.
    options = ["-q", "--capture=tee-sys", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return pytest.main([*options, f"--rootdir={root}", folder], plugins=[plugin])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
