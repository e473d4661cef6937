"""The ranks that run tests/ranks (support/pool.py): what they report, and that they outlast failures."""

from __future__ import annotations

import pytest
from support.pool import Failed, Pool
from torch import distributed as dist

CASES = """
import os
import sys
import time
import pytest
import torch
from torch import distributed as dist

def test_passes():
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x == dist.get_world_size()

def test_fails_alike():
    known = 40
    assert known + 2 == 43

def test_fails_on_one_while_others_wait():
    if dist.get_rank() == 1:
        raise ValueError("only here")
    dist.barrier()

def test_dies():
    print("famous last words", file=sys.stderr, flush=True)
    os._exit(3)

def test_hangs():
    time.sleep(600)

@pytest.mark.parametrize("reason", ["not today"])
def test_skips(reason):
    pytest.skip(reason)
"""


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_each_failure_is_told_and_the_next_case_runs(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES)
    pool = Pool(tmp_path, tmp_path, case=10, others=2)

    def failure(case: str) -> str:
        with pytest.raises(Failed) as failed:
            pool.run(2, f"test_cases.py::{case}")
        assert not pool.processes  # the next case has new ones
        return str(failed.value)

    try:
        alike = failure("test_fails_alike")
        assert alike.startswith("---- rank 0, 1: call") and "assert (40 + 2) == 43" in alike
        one = failure("test_fails_on_one_while_others_wait")
        assert "ValueError: only here" in one and "---- rank 0: did not finish" in one and "in barrier" in one
        dead = failure("test_dies")
        assert "---- rank 0, 1: ended with exit code 3" in dead and "famous last words" in dead
        assert "did not finish" in (hung := failure("test_hangs")) and "in test_hangs" in hung
        assert "does not know test_cases.py::test_other" in failure("test_other")
        pool.run(2, "test_cases.py::test_passes")
        processes = pool.processes
        with pytest.raises(pytest.skip.Exception, match="not today"):
            pool.run(2, "test_cases.py::test_skips[not today]")
        pool.run(2, "test_cases.py::test_passes")
        assert pool.processes == processes and len(processes) == 2
    finally:
        pool.close()
