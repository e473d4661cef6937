"""The study's results as a Markdown table and a plot: each phase's runs side by side."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import COLORS, draw_bars, smoothed

Run = dict[str, Any]
REFERENCE = "cce_exact"  # whose runs the others are compared with, seed by seed
TITLES = {
    "pretrain": "pretraining, large batches",
    "small_batch": "pretraining, small batches",
    "finetune": "fine-tuning, masked prompts",
}


def by_phase(result: dict[str, Any]) -> dict[str, dict[str, list[Run]]]:
    """Runs by phase and impl, in order of their seeds."""
    phases: dict[str, dict[str, list[Run]]] = {phase: defaultdict(list) for phase in TITLES}
    for run in sorted(result["runs"], key=lambda run: run["seed"]):
        phases[run["phase"]][run["impl"]].append(run)
    return {phase: impls for phase, impls in phases.items() if impls}


def mean(runs: list[Run], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return float(np.mean(values)) if values else None


def differences(runs: list[Run], reference: list[Run]) -> list[float]:
    """Final held-out losses less the reference's of the same seed: what differs from seed to seed drops out."""
    final = {run["seed"]: run["final_held_out_loss"] for run in reference}
    return [run["final_held_out_loss"] - final[run["seed"]] for run in runs if run["seed"] in final]


def table(result: dict[str, Any]) -> str:
    """Markdown, a table a phase; losses in the order of the seeds."""
    config, lines = result["config"], []
    for phase, impls in by_phase(result).items():
        tokens = config[f"{phase}.batch"] * config["context"]
        seeds = sorted({run["seed"] for runs in impls.values() for run in runs})
        lines += [
            f"{TITLES[phase]}: {tokens:,} tokens a step, {config[f'{phase}.steps']} steps, "
            f"peak learning rate {config[f'{phase}.lr']:g}, seeds {', '.join(map(str, seeds))}",
            "",
            f"| impl | held-out loss at the end | less `{REFERENCE}`'s | tokens a second | peak memory |",
            "|---|---|---|---|---|",
        ]
        for impl, runs in impls.items():
            speed, peak = mean(runs, "tokens_per_second"), mean(runs, "peak_memory_bytes")
            cells = (
                f"`{impl}`",
                ", ".join(f"{run['final_held_out_loss']:.4f}" for run in runs),
                ", ".join(f"{x:+.4f}" for x in differences(runs, impls.get(REFERENCE, []))) or "–",
                f"{speed:,.0f}" if speed else "–",
                f"{peak / 1e9:.2f} GB" if peak else "–",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def colors_of(impls: list[str]) -> dict[str, str]:
    """The example's colours; the other impls (an eps, another package) get one each."""
    others = [impl for impl in impls if impl not in COLORS]
    return {impl: COLORS.get(impl) or colormaps["tab10"](others.index(impl) % 10) for impl in impls}


def save_plot(result: dict[str, Any], path: Path) -> None:
    """One PNG, a row a phase: held-out loss, its difference from the reference, training loss, speed, memory."""
    config, phases = result["config"], by_phase(result)
    colors = colors_of(list(dict.fromkeys(impl for impls in phases.values() for impl in impls)))
    figure = Figure(figsize=(16, 4.2 * len(phases) + 0.8), layout="constrained")
    rows = figure.subplots(len(phases), 5, squeeze=False, width_ratios=[3, 3, 3, 1.6, 1.6])
    for (phase, impls), (held_out, difference, train, speed, memory) in zip(phases.items(), rows, strict=True):
        draw_curves(held_out, difference, train, impls, colors)
        held_out.set_title(f"{TITLES[phase]}\nheld-out loss (nats a token)", fontsize=10)
        means = {
            impl: {key: mean(runs, key) for key in ("tokens_per_second", "peak_memory_bytes")}
            for impl, runs in impls.items()
        }
        draw_bars(speed, "tokens a second", means, "tokens_per_second", 1, colors)
        draw_bars(memory, "peak memory (MB)", means, "peak_memory_bytes", 1e-6, colors)
    figure.suptitle(
        f"{result['runs'][0]['parameters'] / 1e6:.1f} M parameters, vocabulary {config['data']['vocab']:,}, "
        f"{config['dtype']}, {result['sessions'][0]['device']}; a line a seed",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_curves(
    held_out: Axes, difference: Axes, train: Axes, impls: dict[str, list[Run]], colors: dict[str, str]
) -> None:
    """One phase's curves: a line a run. The second axis shows what the first one hides, a few hundredths."""
    exact = {run["seed"]: run for run in impls.get(REFERENCE, [])}
    for impl, runs in impls.items():
        for i, run in enumerate(runs):
            style = {"color": colors[impl], "linewidth": 1.3, "label": impl if i == 0 else None}
            steps, losses = run["held_out_step"], np.array(run["held_out_loss"])
            held_out.plot(steps, losses, **style)
            train.plot(*smoothed(run["train_loss"]), **style)
            if run["seed"] in exact:
                difference.plot(steps, losses - exact[run["seed"]]["held_out_loss"], marker=".", **style)
    held_out.legend(fontsize=7)
    difference.set_title(f"held-out loss less {REFERENCE}'s of the same seed", fontsize=10)
    train.set_title("training loss, smoothed", fontsize=10)
    for axis in (held_out, difference, train):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
