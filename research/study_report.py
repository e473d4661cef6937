"""The study's results as Markdown tables and a plot: each phase's runs side by side."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import COLORS, draw_bars, smoothed
from study_data import FINETUNE_SHARE
from study_paired import Run, differences, error_of_mean, error_of_text, pairs

REFERENCE = "cce_exact"  # whose runs the others are compared with, seed by seed, where no other is named
POLICY = "policy"
TITLES = {
    "pretrain": "pretraining, large batches",
    "small_batch": "pretraining, small batches",
    "finetune": "fine-tuning, masked prompts",
    POLICY: "policy gradient, counted reward",
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


def number(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)


def last(run: Run, key: str) -> float:
    """The mean of the last tenth of a curve."""
    return float(np.mean(run[key][-max(1, len(run[key]) // 10) :]))


def part_tokens(config: dict[str, Any], phase: str) -> int:
    """Of the text that a phase trains on."""
    tokens = config["data"]["train_tokens"]
    for_finetuning = tokens // FINETUNE_SHARE
    return for_finetuning if phase == "finetune" else tokens - for_finetuning


def table(result: dict[str, Any], reference: str = REFERENCE) -> str:
    """Markdown, a table a phase; figures in the order of the seeds."""
    config, lines = result["config"], []
    for phase, impls in by_phase(result).items():
        seeds = sorted({run["seed"] for runs in impls.values() for run in runs})
        policy = phase == POLICY
        if policy:
            sampled = config["policy.prompts"] * config["policy.group"] * config["policy.completion"]
            size = f"{sampled:,} sampled tokens a step, {config['policy.steps']} steps"
        else:
            a_step = config[f"{phase}.batch"] * config["context"]
            passes = a_step * config[f"{phase}.steps"] / part_tokens(config, phase)
            size = f"{a_step:,} tokens a step, {config[f'{phase}.steps']} steps: {passes:.2g} passes over the text"
        final = "final_reward" if policy else "final_held_out_loss"
        heads = (
            "impl",
            "reward at the end" if policy else "held-out loss at the end",
            f"less `{reference}`'s",
            "mean ± its error over seeds",
            "entropy at the end" if policy else "error over held-out text",
            "tokens a second",
            "peak memory",
        )
        lines += [
            f"{TITLES[phase]}: {size}, "
            f"peak learning rate {config[f'{phase}.lr']:g}, seeds {', '.join(map(str, seeds))}",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
        ]
        for impl, runs in impls.items():
            of_reference = impls.get(reference, [])
            less = differences(runs, of_reference, final)
            itself = impl == reference
            error = None if itself else error_of_mean(less)
            peak = mean(runs, "peak_memory_bytes")
            text_error = None if itself or policy else error_of_text(runs, of_reference)
            cells = (
                f"`{impl}`",
                ", ".join(f"{run[final]:.4f}" for run in runs),
                ", ".join(f"{x:+.4f}" for x in less) or "–",
                "–" if error is None else f"{np.mean(less):+.4f} ± {error:.4f}",
                ", ".join(f"{last(run, 'entropy'):.2f}" for run in runs) if policy else number(text_error, ".4f"),
                number(mean(runs, "tokens_per_second"), ",.0f"),
                "–" if peak is None else f"{peak / 1e9:.2f} GB",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def colors_of(impls: list[str]) -> dict[str, str]:
    """The example's colours; the other impls (an eps, another package) get one each."""
    others = [impl for impl in impls if impl not in COLORS]
    return {impl: COLORS.get(impl) or colormaps["tab10"](others.index(impl) % 10) for impl in impls}


def save_plot(result: dict[str, Any], path: Path, reference: str = REFERENCE) -> None:
    """One PNG, a row a phase: held-out loss, its difference from the reference, training loss, speed, memory.

    Of the policy gradient: reward, its difference, entropy.
    """
    config, phases = result["config"], by_phase(result)
    colors = colors_of(list(dict.fromkeys(impl for impls in phases.values() for impl in impls)))
    figure = Figure(figsize=(16, 4.2 * len(phases) + 0.8), layout="constrained")
    rows = figure.subplots(len(phases), 5, squeeze=False, width_ratios=[3, 3, 3, 1.6, 1.6])
    for (phase, impls), (first, difference, third, speed, memory) in zip(phases.items(), rows, strict=True):
        if phase == POLICY:
            draw_policy(first, difference, third, impls, colors, reference)
        else:
            draw_curves(first, difference, third, impls, colors, reference)
            first.set_title(f"{TITLES[phase]}\nheld-out loss (nats a token)", fontsize=10)
        first.legend(fontsize=7)
        for axis in (first, difference, third):
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        means = {
            impl: {key: mean(runs, key) for key in ("tokens_per_second", "peak_memory_bytes")}
            for impl, runs in impls.items()
        }
        draw_bars(speed, "tokens a second", means, "tokens_per_second", 1, colors)
        draw_bars(memory, "peak memory (MB)", means, "peak_memory_bytes", 1e-6, colors)
    figure.suptitle(
        f"{result['runs'][0]['parameters'] / 1e6:.1f} M parameters, vocabulary {config['data']['vocab']:,}, "
        f"{config['dtype']}, {result['sessions'][0]['device']}; "
        "a line a seed; bars and bands: ± one standard error over seeds",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_curves(
    held_out: Axes,
    difference: Axes,
    train: Axes,
    impls: dict[str, list[Run]],
    colors: dict[str, str],
    reference: str,
) -> None:
    """One phase's curves: a line a run. The second axis shows what the first one hides, a few hundredths.

    It ends with the difference on all of the held-out text that is kept for the end, the seeds' mean and its error.
    """
    of_reference = {run["seed"]: run for run in impls.get(reference, [])}
    for impl, runs in impls.items():
        for i, run in enumerate(runs):
            style = {"color": colors[impl], "linewidth": 1.3, "label": impl if i == 0 else None}
            steps, losses = run["held_out_step"], np.array(run["held_out_loss"])
            held_out.plot(steps, losses, **style)
            train.plot(*smoothed(run["train_loss"]), **style)
            if run["seed"] in of_reference:
                other = of_reference[run["seed"]]["held_out_loss"]
                difference.plot(steps, losses - other, marker=".", alpha=0.6, **style)
        less = differences(runs, impls.get(reference, []), "final_held_out_loss")
        if impl != reference and less:
            end = runs[0]["held_out_step"][-1] * 1.04
            difference.errorbar(
                end, np.mean(less), yerr=error_of_mean(less), color=colors[impl], marker="D", markersize=4, capsize=3
            )
    difference.set_title(f"held-out loss less {reference}'s of the same seed", fontsize=10)
    train.set_title("training loss, smoothed", fontsize=10)


def draw_policy(
    reward: Axes,
    difference: Axes,
    entropy: Axes,
    impls: dict[str, list[Run]],
    colors: dict[str, str],
    reference: str,
) -> None:
    """Reward, smoothed, its difference and the entropy: the seeds' mean, with a band of one standard error."""
    for impl, runs in impls.items():
        style = {"color": colors[impl], "linewidth": 1.3, "label": impl}
        draw_band(reward, [smoothed(run["reward"]) for run in runs], style)
        draw_band(entropy, [smoothed(run["entropy"]) for run in runs], style)
        paired = pairs(runs, impls.get(reference, []))
        if impl != reference and paired:
            draw_band(difference, [smoothed(np.subtract(a["reward"], b["reward"])) for a, b in paired], style)
    reward.set_title(f"{TITLES[POLICY]}\nreward of a completion", fontsize=10)
    difference.set_title(f"reward less {reference}'s of the same seed", fontsize=10)
    entropy.set_title("entropy (nats a token)", fontsize=10)


def draw_band(axis: Axes, curves: list[tuple[np.ndarray, np.ndarray]], style: dict[str, Any]) -> None:
    """Curves (steps, values) of the seeds, all of the same steps."""
    steps, values = curves[0][0], np.array([curve for _, curve in curves])
    middle = values.mean(0)
    axis.plot(steps, middle, **style)
    if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(steps, middle - error, middle + error, color=style["color"], alpha=0.2, linewidth=0)
