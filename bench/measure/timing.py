"""Times of forward and backward, the methods taking turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

# Clock cycles that the GPU spins before a call is timed, about a millisecond: in training, too, the layers before the
# loss give the host this much of a lead, and without it every launch of a call would be waited for.
SPIN_CYCLES = 2_000_000
SHORT_SPIN_CYCLES = 500_000  # for a call without a backward
FEWEST_REPEATS = 5
SLOW_MS = 100.0


class Steps(Protocol):
    """forward() and backward() of one call; release() drops what they left."""

    def forward(self) -> None: ...
    def backward(self) -> None: ...
    def release(self) -> None: ...


@dataclass
class Times:
    """Of each repeat: milliseconds, where nothing else is said."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def of(self, kind: str) -> list[float]:
        """The times of one of KINDS, or of SCORE."""
        if kind in ("loss-fw", SCORE):
            return self.forward
        if kind == "loss-bw":
            return self.backward
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


KINDS = ("loss-fw", "loss-bw", "loss-fw-bw")
# A forward of which nobody wants a gradient: what a rollout's log-probabilities are found by.
SCORE = "score"


def spread(ms: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(ms) == 1:
        return ms[0], ms[0], ms[0]
    cuts = statistics.quantiles(ms, n=5, method="inclusive")
    return statistics.median(ms), cuts[0], cuts[-1]


class Stopwatch:
    """Times one call at a time on a device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
            self.flush = torch.empty(4 * l2, dtype=torch.uint8, device="cuda")

    def time(self, step: Steps) -> tuple[float, float]:
        """Milliseconds of forward and of backward."""
        forward, backward = self._cuda(step) if self.cuda else self._cpu(step)
        step.release()
        return forward, backward

    def _cuda(self, step: Steps) -> tuple[float, float]:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        step.forward()
        middle.record()
        step.backward()
        end.record()
        end.synchronize()
        return start.elapsed_time(middle), middle.elapsed_time(end)

    def _cpu(self, step: Steps) -> tuple[float, float]:
        start = time.perf_counter()
        step.forward()
        middle = time.perf_counter()
        step.backward()
        end = time.perf_counter()
        return 1e3 * (middle - start), 1e3 * (end - middle)


def milliseconds(call: Callable[[], object], flush: torch.Tensor) -> float:
    """Of one call on the GPU, behind the flush of its L2."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(SHORT_SPIN_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(
    steps: Mapping[str, Steps],
    device: str,
    repeats: int,
    warmup: int,
    *,
    few: frozenset[str] = frozenset(),
    deadline: float = float("inf"),
    tick: Callable[[], object] = lambda: None,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, Times]:
    """Each step's times, the steps taking turns in an order that is drawn anew for each round.

    few: steps that take FEWEST_REPEATS of the repeats, spread over them. From deadline (time.monotonic) on no call is
    begun. failed(name, error) is told of a step that raises, which is then left out; without it the error goes on.
    """
    stopwatch = Stopwatch(device)
    times = {name: Times() for name in steps}
    names = list(steps)
    order = random.Random(0)
    for round_ in range(-warmup, repeats):
        # Not a rotation, which leaves everybody the same predecessor: a GPU that comes from a product at full power
        # runs at lower clocks.
        order.shuffle(names)
        for name in names:
            if name not in times or (name in few and not _takes_part(round_, repeats)):
                continue
            if time.monotonic() >= deadline:
                return times
            try:
                forward, backward = stopwatch.time(steps[name])
            except Exception as error:
                if failed is None:
                    raise
                steps[name].release()
                del times[name]
                failed(name, error)
                continue
            if round_ >= 0:
                times[name].forward.append(forward)
                times[name].backward.append(backward)
            tick()
    return times


def _takes_part(round_: int, repeats: int) -> bool:
    """Whether a slow step has a turn: in FEWEST_REPEATS of the repeats, evenly, and once for warm-up."""
    if round_ < 0:
        return round_ == -1
    fewest = min(FEWEST_REPEATS, repeats)
    return (round_ + 1) * fewest // repeats > round_ * fewest // repeats
