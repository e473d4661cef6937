"""Time and peak memory of a call, on a CPU or a GPU: for `python -m cce_ext` and the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """MB that call() needs at its peak beyond what is held before it: phase_peaks of one phase."""
    peaks = phase_peaks([call], device)
    return None if peaks is None else peaks[0]


def phase_peaks(phases: Sequence[Callable[[], object]], device: str) -> list[float] | None:
    """MB at the peak of each phase, called one after the other, beyond what is held before the first.

    What a phase returns is dropped. CUDA: of PyTorch's allocator. CPU: growth of the resident set, on Linux (None
    elsewhere); memory that the process has freed but kept is not seen, so that a fresh process gives the honest figure.
    """
    peaks = []
    if device == "cuda":
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        for phase in phases:
            torch.cuda.reset_peak_memory_stats()
            phase()
            torch.cuda.synchronize()
            peaks.append((torch.cuda.max_memory_allocated() - allocated) / 2**20)
        return peaks
    try:
        _reset_peak()
        before = _status_kilobytes("VmRSS")
    except OSError:
        return None
    for phase in phases:
        _reset_peak()
        phase()
        peaks.append(max(0, _status_kilobytes("VmHWM") - before) / 1024)
    return peaks


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc_pid_clear_refs(5)


def _status_kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def interleaved_times(
    calls: dict[str, Callable[[], object]], device: str, repeats: int, tick: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of each call, which take turns, after one warm-up round; tick() is called after each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                call()
                elapsed = 1e3 * (time.perf_counter() - start)
            if repeat:
                times[name].append(elapsed)
            tick()
    return times
