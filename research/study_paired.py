"""Differences between runs of one seed, and their standard errors.

Two errors are told apart. Over seeds: another initialization, order of batches and sampling; with few seeds it is
itself known roughly. Over held-out text: another text of this kind for these very models; it says nothing of other
trainings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Run = dict[str, Any]
BLOCKS = 64  # at most, into which the held-out text is cut: far longer than what neighbouring windows share


def pairs(runs: list[Run], reference: list[Run]) -> list[tuple[Run, Run]]:
    """Each run with the reference's of its seed, where there is one."""
    of_seed = {run["seed"]: run for run in reference}
    return [(run, of_seed[run["seed"]]) for run in runs if run["seed"] in of_seed]


def differences(runs: list[Run], reference: list[Run], key: str) -> list[float]:
    """The figure `key` less the reference's of the same seed: what differs from seed to seed drops out."""
    return [run[key] - other[key] for run, other in pairs(runs, reference)]


def error_of_mean(values: list[float]) -> float | None:
    """The standard error of the mean of independent values; None of fewer than two."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def error_of_text(runs: list[Run], reference: list[Run]) -> float | None:
    """The standard error that the held-out text gives the mean difference of final losses, over BLOCKS stretches.

    A stretch's difference is the mean over the seeds. Stretches need not have equally many tokens that count: the mean
    is a ratio, whose error is that of the stretches' sums about it. None where a run has no windows, as in older
    files, or where there are fewer than two.
    """
    paired = pairs(runs, reference)
    if not paired or any("final_window_loss" not in run for pair in paired for run in pair):
        return None
    sums = np.mean([np.subtract(a["final_window_loss"], b["final_window_loss"]) for a, b in paired], axis=0)
    counts = np.array(paired[0][0]["final_window_tokens"], dtype=float)
    n = min(BLOCKS, len(sums))
    if n < 2:
        return None
    cuts = np.linspace(0, len(sums), n, endpoint=False).astype(int)
    block_sums, block_counts = np.add.reduceat(sums, cuts), np.add.reduceat(counts, cuts)
    mean = block_sums.sum() / block_counts.sum()
    residuals = block_sums - mean * block_counts
    return float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / block_counts.sum())
