"""Peak memory over the inputs of a method's forward and backward.

On a CPU each method has a fresh process that holds the inputs already: memory that a process has freed but kept would
not be seen. `python -m bench.measure.memory FILE`
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace

import torch

from cce_ext.measure import phase_peaks

from ..peers.method import Method, make_step
from ..peers.methods import OF_TASK
from ..problems.inputs import Problem
from . import child
from .timing import KINDS, SCORE


def peaks(method: Method, p: Problem, softcap: float | None, scoring: bool = False) -> dict[str, float | None]:
    """MB of each kind, or of scoring.

    The forward of training leaves what the backward needs; gradients count. loss-bw is the peak while the backward
    runs, over the inputs as well. None where the system does not tell. Raises RuntimeError if the process fails.
    """
    if p.e.is_cuda:
        return peaks_here(method, p, softcap, "cuda", scoring)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/inputs.pt"
        problem = {"e": p.e, "c": p.c, "targets": p.targets, "frozen": p.frozen, "weights": p.weights}
        of = {"task": method.task, "method": method.name, "softcap": softcap, "scoring": scoring}
        torch.save({"problem": problem, **of}, file)
        done = child.run("bench.measure.memory", file, capture=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"memory: {lines[-1]}")
    figures: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return figures


def peaks_here(
    method: Method, p: Problem, softcap: float | None, device: str, scoring: bool = False
) -> dict[str, float | None]:
    """As peaks, in this process."""
    step = make_step(method, p, softcap, scoring)
    both = phase_peaks([step.forward, step.backward], device)
    step.release()
    if both is None:
        return dict.fromkeys((SCORE,) if scoring else KINDS)
    if scoring:
        return {SCORE: both[0]}
    return {"loss-fw": both[0], "loss-bw": both[1], "loss-fw-bw": max(both)}


def main() -> None:
    of = torch.load(sys.argv[1])
    method, softcap, scoring = OF_TASK[of["task"]][of["method"]], of["softcap"], of["scoring"]
    p = Problem(**of["problem"])
    # Libraries load and threads start on the first call; a compiler's own memory is not its kernel's.
    few = p.rows(slice(8))
    tiny = replace(few, e=few.e.clone(), c=p.c[:256].clone(), targets=few.targets % min(256, len(p.c)))
    warm = make_step(method, p if method.compiled else tiny, softcap, scoring)
    warm.forward()
    warm.backward()
    del warm
    print(json.dumps(peaks_here(method, p, softcap, "cpu", scoring)))


if __name__ == "__main__":
    main()
