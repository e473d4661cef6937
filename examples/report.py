"""What a run of the example leaves behind: a table, and a plot of the implementations side by side."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Curves that coincide stay visible: the later ones are thinner and drawn above the earlier.
STYLES: dict[str, dict[str, Any]] = {
    "baseline": {"color": "0.75", "linewidth": 8},
    "torch_compile": {"color": "#e69f00", "linewidth": 5},
    "cce_exact": {"color": "#009e73", "linewidth": 3},
    "cce_threshold": {"color": "#cc3311", "linewidth": 1.8, "linestyle": (0, (5, 2, 1, 2))},
    "cce": {"color": "#003f7f", "linewidth": 1.2, "linestyle": (0, (4, 2))},
}
COLORS = {impl: style["color"] for impl, style in STYLES.items()}


def last_train_loss(run: dict[str, Any]) -> float:
    """Mean training loss over the last tenth of the steps."""
    losses = run["train_loss"]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def print_table(runs: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{'impl':14}{'steps':>7}{'held-out loss':>15}{'train loss':>12}{'tokens/s':>11}{'peak MB':>9}{'seconds':>9}"
    )
    for impl, run in runs.items():
        held_out = f"{run['held_out_loss'][-1]:.4f}" if run["held_out_loss"] else "-"
        speed = f"{run['tokens_per_second']:,.0f}" if run["tokens_per_second"] else "-"
        peak = f"{run['peak_memory_bytes'] / 1e6:,.0f}" if run["peak_memory_bytes"] else "-"
        print(
            f"{impl:14}{len(run['train_loss']):>7}{held_out:>15}{last_train_loss(run):>12.4f}{speed:>11}{peak:>9}"
            f"{run['seconds']:>9.0f}"
        )


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Held-out and smoothed training loss against steps, speed and memory: one PNG at `path`."""
    runs = {impl: result["runs"][impl] for impl in STYLES if impl in result["runs"]}
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["held-out", "train", "speed"], ["held-out", "train", "memory"]], width_ratios=[3, 3, 1.7]
    )
    held_out, train = axes["held-out"], axes["train"]
    for impl, run in runs.items():
        final = f"{run['held_out_loss'][-1]:.3f}" if run["held_out_loss"] else "interrupted"
        held_out.plot(run["held_out_step"], run["held_out_loss"], **STYLES[impl], label=f"{impl}  {final}")
        train.plot(*smoothed(run["train_loss"]), **STYLES[impl], label=impl)
    held_out.axhline(result["unigram_loss"], color="0.4", linewidth=0.8, label="token frequencies alone")
    held_out.legend(title="loss at the end", handlelength=3.5)
    for axis, title in ((held_out, "held-out loss (nats a token)"), (train, "training loss, smoothed")):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    draw_bars(axes["speed"], "tokens a second", runs, "tokens_per_second", 1, COLORS)
    draw_bars(axes["memory"], "peak memory (MB)", runs, "peak_memory_bytes", 1e-6, COLORS)
    settings = result["settings"]
    figure.suptitle(
        f"{settings['layers']} layers, width {settings['width']}, vocabulary {result['vocabulary']:,}, "
        f"{settings['batch'] * settings['context']} tokens a step, {settings['dtype']}, {result['device']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def smoothed(losses: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, counted from 1, and the mean loss of the twentieth of all steps that ends there."""
    window = max(1, len(losses) // 20)
    return np.arange(window, len(losses) + 1), np.convolve(losses, np.full(window, 1 / window), mode="valid")


def draw_bars(
    axis: Axes, title: str, runs: dict[str, dict[str, Any]], key: str, unit: float, colors: dict[str, str]
) -> None:
    """One horizontal bar an implementation; none where a figure was not measured."""
    known = {impl: run[key] * unit for impl, run in runs.items() if run[key] is not None}
    if not known:
        axis.set_visible(False)
        return
    bars = axis.barh(list(known), list(known.values()), color=[colors[impl] for impl in known])
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.tick_params(axis="y", labelsize=8)
    axis.xaxis.set_visible(False)
    axis.margins(x=0.25)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
