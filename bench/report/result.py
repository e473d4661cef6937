"""`python -m bench result FILE [--shape ..] [--out FILE.png]`: the picture for readers, one run's time against memory.

Forward + backward, one panel a shape. Each point has its name and its gradient's error beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import arguments
from ..measure.rows import Row, inputs_of
from .files import read_bench
from .plot import STYLES, measured, number_ticks, place

# What a reader calls them. Other methods have the names that the benchmark gives them.
NAMES = {
    "baseline": "PyTorch",
    "torch_compile": "PyTorch, compiled",
    "compiled_baseline": "PyTorch, compiled",
    "cce_fp8": "cce, 8-bit scan",
    "apple_cce": "Apple cce",
    "apple_cce_exact": "Apple cce_exact",
    "liger": "Liger",
    "liger_cutedsl": "Liger, CuTeDSL",
    "liger_cutedsl_scaled": "Liger, CuTeDSL, no logits",
}
# Where a label may stand beside its point, in points: offset and alignment, the best first.
PLACES = (
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, -9, "center", "top"), (0, 9, "center", "bottom")),
    *((7, -12, "left", "top"), (7, 12, "left", "bottom"), (-7, 12, "right", "bottom"), (-7, -12, "right", "top")),
    *((7, -30, "left", "top"), (7, 30, "left", "bottom")),
)


def draw(meta: dict[str, Any], rows: list[Row], source: str, file: Path) -> None:
    """One PNG. source: the results file's name, which it shows. Raises ValueError if nothing can be drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    products = {place(r): r for r in measured(rows) if r["method"] == "mm"}
    rows = [r for r in measured(rows) if r["op_mem_mb"] is not None and r["method"] != "mm"]
    if not rows:
        raise ValueError("no row has a forward + backward time and a memory: there is nothing to draw")
    places = list(dict.fromkeys(place(r) for r in rows))
    figure = Figure(figsize=(4.7 * len(places), 4.5), layout="constrained")
    figure.suptitle(
        f"Forward + backward, {meta['dtype']}, {meta['device']}: left is less memory, down is less time\n"
        "beside each name the error of its gradients against fp64, of dE and of dC",
        fontsize=10,
    )
    figure.supxlabel(
        f"{source}, cce_ext {meta['packages']['cce_ext']}, torch {meta['torch']}", fontsize=8, color="0.35"
    )
    panels = list(figure.subplots(1, len(places), squeeze=False).flat)
    for axes, at in zip(panels, places, strict=True):
        draw_panel(axes, [r for r in rows if place(r) == at], products.get(at))
    FigureCanvasAgg(figure).draw()  # from here on the axes stand, and a label's size in them can be asked for
    for axes, at in zip(panels, places, strict=True):
        add_labels(axes, [r for r in rows if place(r) == at])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def draw_panel(axes: Any, rows: list[Row], product: Row | None) -> None:
    for row in rows:
        color, marker = STYLES.get(row["method"], ("0.6", "o"))
        axes.scatter(
            *point(row), s=230 if marker == "*" else 60, color=color, marker=marker, edgecolors="white", zorder=3
        )
    if product is not None:
        axes.axhline(product["runtime_ms"], color="0.35", linewidth=0.8, linestyle=":", zorder=1)
        at = (0.01, product["runtime_ms"])
        text = "the three products of a dense step alone"
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(text, at, (0, -3), **where, va="top", fontsize=7, color="0.35")
    first = rows[0]
    axes.set(xscale="log", yscale="log", xlabel="peak memory over the inputs (MB)", ylabel="time (ms)")
    axes.margins(x=0.3, y=0.12)
    number_ticks(axes)
    axes.set_title(f"{first['shape']}: N={first['n']} D={first['d']} V={first['v']}, {inputs_of(first)}", fontsize=9)
    axes.grid(alpha=0.3, linewidth=0.5)


def point(row: Row) -> tuple[float, float]:
    """A method with little memory is drawn at 1 MB, as in plot."""
    return max(row["op_mem_mb"], 1.0), row["runtime_ms"]


def label_of(row: Row) -> str:
    name = NAMES.get(row["method"], row["method"])
    if row["de_err"] is None or row["dc_err"] is None:
        return name
    return f"{name}: {row['de_err']:.3f}, {row['dc_err']:.3f}"


def add_labels(axes: Any, rows: list[Row]) -> None:
    """Each where it touches neither a point nor another label; where there is no such place, in the best one."""
    renderer = axes.figure.canvas.get_renderer()
    points = axes.transData.transform([point(r) for r in rows])
    frame, taken = axes.get_window_extent(renderer), []

    def annotate(row: Row, x: int, y: int, horizontal: str, vertical: str) -> Any:
        weight = "bold" if row["method"] == "cce" else "normal"
        style = {"ha": horizontal, "va": vertical, "fontsize": 8, "fontweight": weight}
        return axes.annotate(label_of(row), point(row), (x, y), textcoords="offset points", **style)

    def fits(box: Any) -> bool:
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        return inside and not any(map(box.overlaps, taken)) and not any(box.contains(*p) for p in points)

    for row in sorted(rows, key=lambda r: r["runtime_ms"]):
        for at in PLACES:
            label = annotate(row, *at)
            if fits(label.get_window_extent(renderer)):
                break
            label.remove()
        else:
            label = annotate(row, *PLACES[0])
        taken.append(label.get_window_extent(renderer))


def main(argv: list[str]) -> int:
    parser = arguments.parser("bench result", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="results of python -m bench")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="these alone, and mm for the line of the products")
    parser.add_argument("--out", type=Path, default=Path("docs/result.png"), metavar="FILE.png")
    args = parser.parse_args(argv)
    if args.out.suffix != ".png":
        parser.error(f"--out: expected a .png file, got {str(args.out)!r}")
    try:
        meta, rows = read_bench(args.file)
        for key, wanted in (("shape", args.shape), ("method", args.methods)):
            names = {r[key] for r in rows}
            unknown = set(wanted or ()) - names
            if unknown:
                parser.error(f"{args.file} has no {key} {', '.join(sorted(unknown))}, but {', '.join(sorted(names))}")
            rows = [r for r in rows if not wanted or r[key] in wanted]
        draw(meta, rows, args.file.name, args.out)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        parser.error('matplotlib is missing: pip install ".[bench]"')
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"saved {args.out}")
    return 0
