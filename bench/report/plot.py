"""`python -m bench plot FILE.. [--out FILE.png]`: time against memory, one panel a shape; cost against V and N.

Shapes that differ only in V, or only in N, are a sweep: forward + backward against it, in place of a panel each. Where
the host's time of a call was measured (--host), it is the dashed line of a method's colour.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from .. import arguments
from ..measure.rows import Row, inputs_of
from ..peers.methods import EPS
from .files import read_bench, task_of

# One colour a family, one marker a member.
STYLES: dict[str, tuple[str, str]] = {
    "mm": ("0.35", "X"),
    "cce": ("#0057b8", "*"),
    "cce_fp8": ("#000000", "*"),
    **dict(zip(EPS, (("#9ecae1", x) for x in "<>^pPh"), strict=True)),
    "cce_exact": ("#0057b8", "o"),
    "cce_compiled": ("#56b4e9", "*"),
    "cce_exact_compiled": ("#56b4e9", "o"),
    "cce_threshold": ("#0057b8", "v"),
    "torch_compile": ("#e69f00", "o"),
    "baseline": ("#e69f00", "s"),
    "torch": ("#e69f00", "s"),
    "compiled_torch": ("#e69f00", "v"),
    "fp32_head": ("#e69f00", "o"),
    "trl": ("#8844aa", "s"),
    "compiled_baseline": ("#e69f00", "v"),
    "torch_chunked": ("#e69f00", "D"),
    "apple_cce": ("#cc3311", "o"),
    "apple_cce_exact": ("#cc3311", "s"),
    "apple_cce_kahan_full_c": ("#cc3311", "D"),
    "liger": ("#009e73", "o"),
    "liger_cutedsl": ("#009e73", "s"),
    "liger_cutedsl_scaled": ("#009e73", "D"),
    "quack": ("#8844aa", "o"),
}

Place = tuple[int, int, int, str]


def load(files: list[Path]) -> tuple[dict[str, Any], list[Row]]:
    """The first file's meta and the rows of all. Raises OSError or ValueError, which name the file.

    Files of another task than the first one's are refused: their methods have the same names.
    """
    rows: list[Row] = []
    first: dict[str, Any] = {}
    for file in files:
        meta, found = read_bench(file)
        first = first or meta
        if task_of(meta) != task_of(first):
            raise ValueError(f"{file}: of --task {task_of(meta)}, and {files[0]} of {task_of(first)}")
        rows += found
    return first, rows


def measured(rows: list[Row]) -> list[Row]:
    """Forward + backward, where it was measured. A later file's row takes the place of an earlier one's."""
    latest = {(*place(r), r["method"]): r for r in rows if r["kind"] == "loss-fw-bw" and r["runtime_ms"] is not None}
    return list(latest.values())


def place(row: Row) -> Place:
    return row["n"], row["d"], row["v"], inputs_of(row)


def find_sweeps(places: list[Place]) -> tuple[list[tuple[str, list[Place]]], list[Place]]:
    """(axis, places) of each sweep, "v" or "n", and the places that are in none."""
    sweeps = []
    for axis, index in (("v", 2), ("n", 0)):
        groups = defaultdict(list)
        for at in places:
            groups[at[:index] + at[index + 1 :]].append(at)
        sweeps += [(axis, sorted(group)) for group in groups.values() if len(group) > 1]
    swept = {at for _, group in sweeps for at in group}
    return sweeps, [at for at in places if at not in swept]


def draw(meta: dict[str, Any], rows: list[Row], file: Path) -> None:
    """One PNG. Raises ValueError if nothing was measured."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = measured(rows)
    if not rows:
        raise ValueError("no row has a forward + backward time: there is nothing to draw")
    sweeps, single = find_sweeps(list(dict.fromkeys(place(r) for r in rows)))
    count = len(sweeps) + len(single)
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(7.2, 5.4 * columns), 4.4 * lines + 1.3), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes, at in zip(panels, single, strict=False):
        draw_shape(axes, [r for r in rows if place(r) == at])
    for axes, (axis, group) in zip(panels[len(single) :], sweeps, strict=False):
        draw_sweep(axes, axis, [r for r in rows if place(r) in group])
    handles = {}
    for axes in panels[:count]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if any(r["host_us"] and place(r) not in single for r in rows):
        handles["dashed: the host's time"] = Line2D([], [], color="0.4", linewidth=1.0, linestyle="--")
    names = [m for m in STYLES if m in handles] + [m for m in handles if m not in STYLES]
    figure.legend(
        [handles[m] for m in names], names, loc="outside lower center", ncols=min(len(names), 3 * columns), fontsize=8
    )
    softcap = f", softcap {meta['softcap']:g}" if meta["softcap"] else ""
    of = {"loss": "", "logprobs": " of log-probabilities and entropies", "distill": " of soft targets"}
    title = f"Forward + backward{of[task_of(meta)]}"
    figure.suptitle(f"{title}, {meta['dtype']}{softcap}, {meta['device']}, torch {meta['torch']}", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def draw_shape(axes: Any, rows: list[Row]) -> None:
    """Time against memory; a method with little memory is drawn at 1 MB."""
    for row in rows:
        if row["op_mem_mb"] is None:
            continue
        color, marker = STYLES.get(row["method"], ("0.6", "o"))
        size = 170 if marker == "*" else 55
        axes.scatter(
            max(row["op_mem_mb"], 1.0),
            row["runtime_ms"],
            s=size,
            color=color,
            marker=marker,
            label=row["method"],
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
    products = [r for r in rows if r["method"] == "mm"]
    if products:
        axes.axhline(products[0]["runtime_ms"], color="0.35", linewidth=0.8, linestyle=":", zorder=1)
        at = (0.99, products[0]["runtime_ms"])
        axes.annotate("the products alone", at, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    first = rows[0]
    axes.set(xscale="log", yscale="log", xlabel="peak memory over the inputs (MB)", ylabel="time (ms)")
    number_ticks(axes)
    name = f"{first['shape']}: " if "," not in first["shape"] else ""
    axes.set_title(f"{name}N={first['n']} D={first['d']} V={first['v']}, {inputs_of(first)}", fontsize=9)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.margins(0.12)


def draw_sweep(axes: Any, axis: str, rows: list[Row]) -> None:
    methods = dict.fromkeys(r["method"] for r in rows)
    for method in methods:
        points = sorted((r[axis], r["runtime_ms"]) for r in rows if r["method"] == method)
        color, marker = STYLES.get(method, ("0.6", "o"))
        size = 11 if marker == "*" else 6
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=size, linewidth=1.2, label=method)
        hosts = sorted((r[axis], 1e-3 * r["host_us"]) for r in rows if r["method"] == method and r["host_us"])
        if hosts:
            axes.plot(*zip(*hosts, strict=True), color=color, linewidth=1.0, linestyle="--", zorder=1)
    first = rows[0]
    fixed = f"N={first['n']} D={first['d']}" if axis == "v" else f"D={first['d']} V={first['v']}"
    axes.set(xscale="log", yscale="log", ylabel="time (ms)")
    axes.set_xlabel("vocabulary V" if axis == "v" else "tokens N")
    values = sorted({r[axis] for r in rows})
    # A long sweep has names of one size that would touch.
    axes.set_xticks(values, [str(x) for x in values], fontsize=8 if len(values) < 9 else 7)
    axes.minorticks_off()
    number_ticks(axes, x=False)
    axes.set_title(f"{fixed}, {inputs_of(first)}", fontsize=9)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)


def number_ticks(axes: Any, x: bool = True) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, as plain numbers: a log axis of one decade has few of its own."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis) if x else (axes.yaxis,):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=15))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def main(argv: list[str]) -> int:
    parser = arguments.parser("bench plot", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results of python -m bench")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="default: the first file's name, as .png")
    args = parser.parse_args(argv)
    out = args.out or args.files[0].with_suffix(".png")
    if out.suffix != ".png":
        parser.error(f"--out: expected a .png file, got {str(out)!r}")
    try:
        draw(*load(args.files), out)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        parser.error('matplotlib is missing: pip install ".[bench]"')
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"saved {out}")
    return 0
