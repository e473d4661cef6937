"""Time of the host in a call: many calls one after another, and nobody waits for the GPU between them."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

import torch

from .timing import Steps, Times

# Turns of each step, and its calls in one. So few that the queue of the GPU's work does not fill, which would make the
# host wait: a call has some tens of launches, and the queue room for about a thousand.
ROUNDS = 10
WARMUP = 1
CALLS = 12


def microseconds(
    steps: Mapping[str, Steps], device: str, *, few: frozenset[str] = frozenset(), deadline: float = float("inf")
) -> dict[str, Times]:
    """The time of each call's forward and backward until they return; on a CPU that is all of their time.

    few: steps that have one call in a turn. From deadline (time.monotonic) on no turn is begun.
    """
    times = {name: Times() for name in steps}
    names = list(steps)
    order = random.Random(0)
    for round_ in range(-WARMUP, ROUNDS):
        order.shuffle(names)
        for name in names:
            if time.monotonic() >= deadline:
                return times
            step = steps[name]
            if device == "cuda":
                torch.cuda.synchronize()
            for _ in range(1 if name in few else CALLS):
                start = time.perf_counter()
                step.forward()
                middle = time.perf_counter()
                step.backward()
                end = time.perf_counter()
                step.release()
                if round_ >= 0:
                    times[name].forward.append(1e6 * (middle - start))
                    times[name].backward.append(1e6 * (end - middle))
    if device == "cuda":
        torch.cuda.synchronize()
    return times
