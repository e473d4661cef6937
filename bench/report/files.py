"""Results files: writing one, and what each benchmark's must hold (bench/README.md)."""

from __future__ import annotations

import json
import math
from numbers import Real
from pathlib import Path
from typing import Any

from ..measure.rows import COLUMNS, FIGURES, Row, complete
from ..measure.timing import KINDS, SCORE
from ..problems.tasks import TASKS


def save(file: Path, meta: dict[str, Any], rows: list[Row]) -> None:
    """Writes a results file. Raises ValueError if it is none, which is a mistake of the benchmark's."""
    result = {"meta": meta, "rows": rows}
    check(result)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def read_bench(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """Meta and rows of a file of `python -m bench`, with every column. Raises OSError or ValueError, with its name."""
    try:
        result = json.loads(file.read_text())
        kind = check(result)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if kind != "bench":
        raise ValueError(f"{file}: a results file of another benchmark ({kind})")
    return result["meta"], [complete(row) for row in result["rows"]]


def task_of(meta: dict[str, Any]) -> str:
    """The task of a file of `python -m bench`: files from before there were several are of the loss."""
    task: str = meta.get("task", "loss")
    return task


_MACHINE = ("device", "torch", "commit", "command", "date")

_BACKWARD_ROWS = (
    {"shape", "kernel", "start_us", "length_us", "gap_us"},
    {"shape", "tiles", "first_rank", "visits", "runtime_ms"},
)
_DISTRIBUTED_ROW = {
    *("shape", "n", "d", "v", "ranks", "method", "kind", "runtime_ms", "runtime_p20", "runtime_p80"),
    *("op_mem_mb", "speed_up", "communication"),
}
_ACCURACY_ROW = {
    *("shape", "n", "d", "v", "data", "method", "note"),
    *("logprobs_max", "logprobs_rms", "entropy_max", "entropy_rms"),
}
_ENERGY_ROW = {
    *("shape", "n", "d", "v", "method", "runtime_ms", "joules", "watts"),
    *("x_mm_runtime_ms", "x_mm_joules"),
}
# packaging/try_torches.py: "ok" or what went wrong, and where a row is from, since several runs make up a file.
_TORCH_VERSION_ROW = {
    *("version", "torch", "python", "import", "opcheck", "compile", "step"),
    *("wheel", "wheel_sha256", "device", "commit", "date", "command"),
}


def check(result: dict[str, Any]) -> str:
    """What a results file is of: a kind of bench/README.md, or bench.

    Raises ValueError if it is of none.
    """
    if result.get("kind") == "study":
        _require({"config", "sessions", "runs"} <= set(result) and bool(result["runs"]), "a study file lacks its runs")
        for session in result["sessions"]:
            _require({"device", "commit", "command", "versions"} <= set(session), "a study's session lacks its origin")
        return "study"
    if "runs" in result:
        _require(bool(result["runs"]), "runs is empty")
        for name, run in result["runs"].items():
            for key in ("train_loss", "held_out_loss", "tokens_per_second", "peak_memory_bytes"):
                _require(key in run, f"run {name}: no {key}")
        _require(
            {"settings", "device", "command", "commit", "versions"} <= set(result), "a train file lacks its origin"
        )
        return "train"
    _require(set(result) == {"meta", "rows"}, f"expected meta and rows, got {sorted(result)}")
    meta, rows = result["meta"], result["rows"]
    _require(isinstance(rows, list) and bool(rows), "rows is empty")
    for key in _MACHINE:
        _require(isinstance(meta.get(key), str) and meta[key], f"meta: {key} is {meta.get(key)!r}")
    if "forward_us" in rows[0]:
        for row in rows:
            _require(set(row) == {"method", "forward_us", "forward_backward_us"}, f"an overhead row has {sorted(row)}")
        return "overhead"
    if "logprobs_rms" in rows[0]:
        for row in rows:
            _require(set(row) == _ACCURACY_ROW, f"a row of accuracy has {sorted(row)}")
            for of in ("logprobs", "entropy"):
                rms, largest = row[f"{of}_rms"], row[f"{of}_max"]
                given = rms is not None and largest is not None and 0 <= rms <= largest < math.inf
                _require(
                    given or bool(row["note"]), f"row {row['method']}, {row['data']}: {of}, and no note that says why"
                )
        return "accuracy"
    if "opcheck" in rows[0]:
        for row in rows:
            _require(set(row) == _TORCH_VERSION_ROW, f"a row of torch's versions has {sorted(row)}")
            filled = all(isinstance(row[name], str) and row[name] for name in _TORCH_VERSION_ROW - {"torch", "python"})
            _require(filled, f"row of torch {row['version']}: something is empty or no text")
        return "torch"
    if "joules" in rows[0]:
        for row in rows:
            _require(set(row) == _ENERGY_ROW, f"an energy row has {sorted(row)}")
            _require(all(row[of] > 0 for of in ("runtime_ms", "joules")), f"energy row {row['method']}: nothing taken")
        return "energy"
    if "kernel" in rows[0]:
        for row in rows:
            _require(set(row) in _BACKWARD_ROWS, f"a backward row has {sorted(row)}")
        return "backward"
    if "shift_of_e" in rows[0]:
        for row in rows:
            _require(set(row) == {"data", "ranks", "c", "shift_of_e"}, f"a row of ranks has {sorted(row)}")
            positive = all(isinstance(row[of], float) and row[of] > 0 for of in ("c", "shift_of_e"))
            _require(positive, f"row of {row['ranks']} ranks, {row['data']}: a ratio of variances that is none")
        return "ranks"
    if "ranks" in rows[0]:
        for row in rows:
            _require(set(row) == _DISTRIBUTED_ROW, f"a distributed row has {sorted(row)}")
            ordered = 0 <= row["runtime_p20"] <= row["runtime_ms"] <= row["runtime_p80"]
            _require(ordered, f"distributed row {row['shape']} {row['method']} {row['kind']}: the percentiles")
        return "distributed"
    if "x_dense" in rows[0]:
        keys = {"runtime_ms", "runtime_min_ms", "runtime_max_ms", "x_dense", "op_mem_mb", "mem_x_dense"}
        for row in rows:
            _require(set(row) == keys | {"method", "kind"}, f"a portable row has {sorted(row)}")
        return "portable"
    if "variant" in rows[0]:
        keys = {"variant", "shape", "n", "d", "v", "mm_ms", "runtime_ms", "x_mm", "x_mm_min", "x_mm_max"}
        for row in rows:
            _require(set(row) == keys, f"a ladder row has {sorted(row)}")
            _require(row["x_mm_min"] <= row["x_mm_max"], f"ladder row {row['shape']} {row['variant']}: the range")
        return "ladder"
    _check_bench(meta, rows)
    return "bench"


def _check_bench(meta: dict[str, Any], rows: list[Row]) -> None:
    for key in ("driver", "clocks", "cuda", "packages", "dtype", "softcap", "data_statistics"):
        _require(key in meta, f"meta: no {key}")
    _require(isinstance(meta["packages"], dict) and "cce_ext" in meta["packages"], "meta: packages lacks cce_ext")
    task = task_of(meta)
    _require(task in TASKS, f"meta: task is {task!r}")
    kinds = (*KINDS, SCORE) if task == "logprobs" else KINDS
    seen = set()
    for given in rows:
        row = complete(given)
        _require(set(row) == set(COLUMNS), f"a row has {sorted(set(row) ^ set(COLUMNS))} too many or too few")
        where = f"row {row['shape']} {row['method']} {row['kind']}"
        _require(row["kind"] in kinds, f"{where}: kind")
        for key in ("shape", "data", "regime", "method", "note"):
            _require(isinstance(row[key], str), f"{where}: {key} is {row[key]!r}")
        for key in ("n", "d", "v"):
            _require(isinstance(row[key], int) and row[key] > 0, f"{where}: {key} is {row[key]!r}")
        for key in FIGURES:
            x = row[key]
            real = isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) and x >= 0
            _require(x is None or real, f"{where}: {key} is {x!r}")
        if row["runtime_ms"] is None:
            _require(bool(row["note"]), f"{where}: no runtime and no note that says why")
        else:
            ordered = row["runtime_p20"] <= row["runtime_ms"] <= row["runtime_p80"]
            _require(ordered, f"{where}: the median is not between the percentiles")
        seen.add(tuple(row[key] for key in ("shape", "n", "d", "v", "data", "regime", "method", "kind")))
    _require(len(seen) == len(rows), "two rows are of the same measurement")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
