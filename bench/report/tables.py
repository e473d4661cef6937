"""The tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable

from ..measure.rows import Row, inputs_of
from ..measure.timing import SCORE

# Columns that few runs have: their heads, and how their figures are written.
MORE = {
    "x_live": ("x live", ".2f"),
    "host_us": ("host us", ".0f"),
    "logprobs_err": ("lp err", ".0e"),
    "entropy_err": ("H err", ".0e"),
}


def table(rows: list[Row]) -> str:
    """The rows of one shape and regime: a line a method and kind, then what was not measured.

    The columns of MORE are there where they were measured: `lp err` and `H err` are the largest errors, in nats, of
    log-probabilities and of entropies.
    """
    width = max(len("method"), *(len(r["method"]) for r in rows))
    more, heads = _more(rows)
    lines = [
        f"{'method':<{width}} {'kind':<10} {'runtime_ms':>10} {'op_mem_mb':>9} {'test_data':<9}"
        f" {'p20-p80':>17} {'x mm':>6}{heads} {'TFLOP/s':>7} {'dE error':>8} {'dC error':>8} {'mean of 8':>17}  note"
    ]
    for r in rows:
        if r["runtime_ms"] is None:
            continue
        both = f"{_number(r['runtime_p20'], '.3f')}-{_number(r['runtime_p80'], '.3f')}"
        mean = "" if r["de_err_mean8"] is None else f"{r['de_err_mean8']:.1e}, {_number(r['dc_err_mean8'], '.1e')}"
        lines.append(
            f"{r['method']:<{width}} {r['kind']:<10} {r['runtime_ms']:>10.3f} {_number(r['op_mem_mb'], '.1f'):>9}"
            f" {r['data'][:9]:<9} {both:>17} {_number(r['x_mm'], '.2f'):>6}{more(r)} {_number(r['tflops'], '.3g'):>7}"
            f" {_number(r['de_err'], '.1e'):>8} {_number(r['dc_err'], '.1e'):>8} {mean:>17}  {r['note']}".rstrip()
        )
    without = dict.fromkeys((r["method"], r["note"]) for r in rows if r["runtime_ms"] is None)
    lines += [f"{method:<{width}} {note}" for method, note in without]
    return "\n".join(lines)


def short_table(rows: list[Row]) -> str:
    """Forward and forward + backward beside the plain product, a line a shape and method, with both gradients' errors.

    Before them scoring, where it was measured. Dense torch's own error is in its line.
    """
    names = {inputs_of(r): "" for r in rows}
    head = ""
    if len(names) > 1:
        width = max(16, *map(len, names))
        names = {name: f" {name:<{width}}" for name in names}
        head = f" {'data':<{width}}"
    more, heads = _more(rows)
    scored = any(r["kind"] == SCORE for r in rows)
    score_heads = f" {'score ms':>9} {'x mm':>6} {'MB':>8}" if scored else ""
    lines = [
        f"{'shape':<14}{head} {'method':<24}{score_heads} {'fw ms':>9} {'x mm':>6} {'fw+bw ms':>9} {'x mm':>6}{heads}"
        f" {'MB':>8} {'dE error':>8} {'dC error':>8}"
    ]
    pairs = {(r["shape"], inputs_of(r), r["method"], r["kind"]): r for r in rows}
    for shape, data, method, kind in pairs:
        if kind != "loss-fw":
            continue
        forward, both = pairs[shape, data, method, kind], pairs[shape, data, method, "loss-fw-bw"]
        score = _score(pairs.get((shape, data, method, SCORE))) if scored else ""
        start = f"{shape:<14}{names[data]} {method:<24}{score}"
        if forward["runtime_ms"] is None:
            lines.append(f"{start} {forward['note']}")
            continue
        lines.append(
            f"{start} {forward['runtime_ms']:>9.3f} {_number(forward['x_mm'], '.2f'):>6}"
            f" {both['runtime_ms']:>9.3f} {_number(both['x_mm'], '.2f'):>6}{more(both)}"
            f" {_number(both['op_mem_mb'], '.0f'):>8}"
            f" {_number(both['de_err'], '.1e'):>8} {_number(both['dc_err'], '.1e'):>8}"
        )
    return "\n".join(lines)


def _score(row: Row | None) -> str:
    """Time, ratio and memory of a row, or of none."""
    ms, ratio, mb = (None, None, None) if row is None else (row["runtime_ms"], row["x_mm"], row["op_mem_mb"])
    return f" {_number(ms, '.3f'):>9} {_number(ratio, '.2f'):>6} {_number(mb, '.1f'):>8}"


def _more(rows: list[Row]) -> tuple[Callable[[Row], str], str]:
    """Of the columns of MORE that were measured: what a row has in them, and their heads."""
    there = {key: x for key, x in MORE.items() if any(r[key] is not None for r in rows)}

    def cells(row: Row) -> str:
        return "".join(f" {_number(row[key], form):>7}" for key, (_, form) in there.items())

    return cells, "".join(f" {head:>7}" for head, _ in there.values())


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)
