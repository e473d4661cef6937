"""Peak memory over the inputs of a method's forward and backward.

On a CPU each method has a fresh process that holds the inputs already: memory that a process has freed but kept would
not be seen. `python -m bench.measure.memory METHOD FILE [SOFTCAP]`
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile

import torch

from cce_ext.measure import phase_peaks

from ..peers.method import Method, make_step
from ..peers.methods import METHODS
from ..problems.inputs import Problem
from . import child
from .timing import KINDS


def peaks(method: Method, p: Problem, softcap: float | None) -> dict[str, float | None]:
    """MB of each kind. The forward is the training one, which leaves what the backward needs; gradients count.

    loss-bw is the peak while the backward runs, over the inputs as well. None where the system does not tell.
    Raises RuntimeError if the process fails.
    """
    if p.e.is_cuda:
        return peaks_here(method, p, softcap, "cuda")
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/inputs.pt"
        torch.save({"e": p.e, "c": p.c, "targets": p.targets, "frozen": p.frozen}, file)
        arguments = [method.name, file] + ([] if softcap is None else [str(softcap)])
        done = child.run("bench.measure.memory", *arguments, capture=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"memory: {lines[-1]}")
    figures: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return figures


def peaks_here(method: Method, p: Problem, softcap: float | None, device: str) -> dict[str, float | None]:
    """As peaks, in this process."""
    step = make_step(method, p, softcap)
    both = phase_peaks([step.forward, step.backward], device)
    step.release()
    if both is None:
        return dict.fromkeys(KINDS)
    return {"loss-fw": both[0], "loss-bw": both[1], "loss-fw-bw": max(both)}


def main() -> None:
    name, file, *rest = sys.argv[1:]
    method, softcap = METHODS[name], float(rest[0]) if rest else None
    p = Problem(**torch.load(file))
    # Libraries load and threads start on the first call; a compiler's own memory is not its kernel's.
    e, c, targets = p.e[:8].clone(), p.c[:256].clone(), p.targets[:8] % min(256, len(p.c))
    tiny = dataclasses.replace(p, e=e, c=c, targets=targets)
    warm = make_step(method, p if method.compiled else tiny, softcap)
    warm.forward()
    warm.backward()
    del warm
    print(json.dumps(peaks_here(method, p, softcap, "cpu")))


if __name__ == "__main__":
    main()
