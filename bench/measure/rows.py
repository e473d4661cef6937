"""The rows of a results file of `python -m bench`: bench/README.md says what the columns are."""

from __future__ import annotations

from typing import Any

from ..problems.shapes import Shape
from .timing import KINDS

Row = dict[str, Any]

# The measured columns, in the order of the files: a number, or None where it was not measured.
FIGURES = (
    *("runtime_ms", "runtime_p20", "runtime_p80", "x_mm", "tflops", "op_mem_mb"),
    *("de_err", "dc_err", "de_err_mean8", "dc_err_mean8"),
)
COLUMNS = ("shape", "n", "d", "v", "data", "method", "kind", *FIGURES, "note")


def empty_rows(shape: Shape, data: str, method: str, note: str) -> list[Row]:
    """The rows, one a kind, of a method that was not measured."""
    name, n, d, v = shape
    return [
        {"shape": name, "n": n, "d": d, "v": v, "data": data, "method": method, "kind": kind}
        | dict.fromkeys(FIGURES)
        | {"note": note}
        for kind in KINDS
    ]


def add_note(rows: list[Row], note: str) -> None:
    for row in rows:
        row["note"] = "; ".join(x for x in (row["note"], note) if x)
