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
    *("logprobs_err", "entropy_err"),
)
COLUMNS = ("shape", "n", "d", "v", "data", "regime", "method", "kind", *FIGURES, "note")
# Columns that came later, together: what files from before them are taken to hold in them.
ADDED: tuple[Row, ...] = (
    {"regime": "", "x_live": None, "host_us": None},
    {"logprobs_err": None, "entropy_err": None},
)


def complete(row: Row) -> Row:
    """A row of a file of any age, with every column, unless it has some only of those that came together."""
    for columns in ADDED:
        if not columns.keys() & row.keys():
            row = columns | row
    return row


def empty_rows(
    shape: Shape, data: str, method: str, note: str, regime: str = "", kinds: tuple[str, ...] = KINDS
) -> list[Row]:
    """The rows, one a kind, of a method that was not measured."""
    name, n, d, v = shape
    return [
        {"shape": name, "n": n, "d": d, "v": v, "data": data, "regime": regime, "method": method, "kind": kind}
        | dict.fromkeys(FIGURES)
        | {"note": note}
        for kind in kinds
    ]


def inputs_of(row: Row) -> str:
    """What a row is of: its data and, where it is not pretraining's, its regime."""
    return ", ".join(x for x in (row["data"], row["regime"]) if x)


def add_note(rows: list[Row], note: str) -> None:
    for row in rows:
        row["note"] = "; ".join(x for x in (row["note"], note) if x)
