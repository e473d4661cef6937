"""The rows of a results file of `python -m bench`: bench/README.md says what the columns are."""

from __future__ import annotations

from typing import Any

from ..problems.shapes import Shape
from .timing import KINDS

Row = dict[str, Any]

# The measured columns, in the order of the files: a number, or None where it was not measured.
FIGURES = (
    *("runtime_ms", "runtime_p20", "runtime_p80", "x_mm", "x_live", "tflops", "op_mem_mb", "host_us"),
    *("de_err", "dc_err", "de_err_mean8", "dc_err_mean8"),
)
COLUMNS = ("shape", "n", "d", "v", "data", "regime", "method", "kind", *FIGURES, "note")
# What files from before these columns are taken to hold in them.
ADDED: Row = {"regime": "", "x_live": None, "host_us": None}


def empty_rows(shape: Shape, data: str, method: str, note: str, regime: str = "") -> list[Row]:
    """The rows, one a kind, of a method that was not measured."""
    name, n, d, v = shape
    return [
        {"shape": name, "n": n, "d": d, "v": v, "data": data, "regime": regime, "method": method, "kind": kind}
        | dict.fromkeys(FIGURES)
        | {"note": note}
        for kind in KINDS
    ]


def inputs_of(row: Row) -> str:
    """What a row is of: its data and, where it is not pretraining's, its regime."""
    return ", ".join(x for x in (row["data"], row["regime"]) if x)


def add_note(rows: list[Row], note: str) -> None:
    for row in rows:
        row["note"] = "; ".join(x for x in (row["note"], note) if x)
