"""`python -m bench eps FILE.. [--out FILE.md]`: time against gradient error, in Markdown, a table a shape and data.

The first rows are dense PyTorch's: its own error, in the dtype of the run, is what the others are to be held against.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import arguments
from ..measure.rows import Row, inputs_of
from ..peers.methods import DENSE, EPS, METHODS
from .files import read_bench, task_of

HEADER = (
    *("gradient", "forward ms", "backward ms", "both ms", "x mm"),
    *("error of dE", "of dC", "mean of 8: dE", "dC"),
)


def tables(meta: dict[str, Any], rows: list[Row]) -> str:
    """One table for each shape and data whose gradient errors were measured."""
    places = dict.fromkeys((r["shape"], r["n"], r["d"], r["v"], inputs_of(r)) for r in rows)
    softcap = f", softcap {meta['softcap']:g}" if meta["softcap"] else ""
    blocks = []
    for shape, n, d, v, data in places:
        here = [r for r in rows if (r["n"], r["d"], r["v"], inputs_of(r)) == (n, d, v, data)]
        name = f"{shape}: " if "," not in shape else ""
        title = f"{name}N={n} D={d} V={v}, {data}, {meta['dtype']}{softcap}, {meta['device']}"
        blocks.append(f"{title}\n\n{table(here)}")
    return "\n\n".join(blocks)


def table(rows: list[Row]) -> str:
    """Of the rows of one shape and data; notes that are not of every run stand below."""
    kinds = {(r["method"], r["kind"]): r for r in rows}
    methods = dict.fromkeys(r["method"] for r in rows)
    order = [m for m in dict.fromkeys((*DENSE, *EPS, *METHODS)) if m in methods and m != "mm"]
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    notes = []
    for method in order:
        forward, backward, both = (kinds[method, kind] for kind in ("loss-fw", "loss-bw", "loss-fw-bw"))
        one = [both["de_err"], both["dc_err"]]
        # A gradient that is not drawn is its own mean.
        eight = [both["de_err_mean8"], both["dc_err_mean8"]] if METHODS[method].draws else one
        cells = [
            label(method),
            *(number(r["runtime_ms"], ".2f") for r in (forward, backward, both)),
            number(both["x_mm"], ".2f"),
            *(number(x, ".2e") for x in (*one, *eight)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        note = both["note"].replace(METHODS[method].note, "").strip("; ")
        if note:
            notes.append(f"{label(method)}: {note}")
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def label(method: str) -> str:
    """Of dense torch and ours what it is; of another package its name."""
    if method in EPS:
        return f"`cce`, eps 2^-{EPS[method]}"
    return {"baseline": "dense torch (`baseline`)", "cce": "`cce`, its default eps"}.get(method, f"`{method}`")


def number(x: float | None, form: str) -> str:
    return "–" if x is None else format(x, form)


def main(argv: list[str]) -> int:
    parser = arguments.parser("bench eps", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results of python -m bench")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also written here")
    args = parser.parse_args(argv)
    blocks = []
    for file in args.files:
        try:
            meta, rows = read_bench(file)
            if task_of(meta) != "loss":
                raise ValueError(f"{file}: of --task {task_of(meta)}, which has no table of this kind")
            blocks.append(tables(meta, rows))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    text = "\n\n".join(blocks)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0
