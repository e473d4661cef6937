"""What a results file says of where its figures come from, what it must hold, and the table on the terminal."""

from __future__ import annotations

import json
import math
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from .child import ROOT
from .timing import KINDS

Row = dict[str, Any]


def cpu_name() -> str:
    """The processor's model name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str:
    """The commit of this clone, with -dirty where files differ from it; unknown without git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def machine(device: str, module: str, commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit, command and date of this run of `python -m module`."""
    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or git_commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


_CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the GPU in use: driver, clocks (MHz), power (W). None without nvidia-smi."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    # By the GPU's own number where nvidia-smi knows it; without one it lists all, of which there must be one only.
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    for options in ([f"--id={gpu}"], []):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        values = [x.strip() for x in done.stdout.strip().split(",")]
        if done.returncode == 0 and len(values) == len(_CLOCKS):
            return dict(zip(_CLOCKS, values, strict=True))
    return None


def save(file: Path, meta: dict[str, Any], rows: list[Row]) -> None:
    """Writes a results file. Raises ValueError if it is none, which is a mistake of the benchmark's."""
    result = {"meta": meta, "rows": rows}
    check(result)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


# ---- what results files hold: README.md ----

_MACHINE = ("device", "torch", "commit", "command", "date")
_FIGURES = ("runtime_ms", "runtime_p20", "runtime_p80", "x_mm", "tflops", "op_mem_mb", "de_err", "dc_err")
_ROW = {"shape", "n", "d", "v", "data", "method", "kind", "note", "de_err_mean8", "dc_err_mean8", *_FIGURES}

_BACKWARD_ROWS = (
    {"shape", "kernel", "start_us", "length_us", "gap_us"},
    {"shape", "tiles", "first_rank", "visits", "runtime_ms"},
)
_DISTRIBUTED_ROW = {
    *("shape", "n", "d", "v", "ranks", "method", "kind", "runtime_ms", "runtime_p20", "runtime_p80"),
    *("op_mem_mb", "speed_up", "communication"),
}


def check(result: dict[str, Any]) -> str:
    """Which benchmark a results file is of: bench, backward, distributed, ladder, portable, overhead, study or
    train.

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
    if "kernel" in rows[0]:
        for row in rows:
            _require(set(row) in _BACKWARD_ROWS, f"a backward row has {sorted(row)}")
        return "backward"
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
    seen = set()
    for row in rows:
        _require(set(row) == _ROW, f"a row has {sorted(set(row) ^ _ROW)} too many or too few")
        where = f"row {row['shape']} {row['method']} {row['kind']}"
        _require(row["kind"] in KINDS, f"{where}: kind")
        for key in ("shape", "data", "method", "note"):
            _require(isinstance(row[key], str), f"{where}: {key} is {row[key]!r}")
        for key in ("n", "d", "v"):
            _require(isinstance(row[key], int) and row[key] > 0, f"{where}: {key} is {row[key]!r}")
        for key in (*_FIGURES, "de_err_mean8", "dc_err_mean8"):
            x = row[key]
            real = isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) and x >= 0
            _require(x is None or real, f"{where}: {key} is {x!r}")
        if row["runtime_ms"] is None:
            _require(bool(row["note"]), f"{where}: no runtime and no note that says why")
        else:
            ordered = row["runtime_p20"] <= row["runtime_ms"] <= row["runtime_p80"]
            _require(ordered, f"{where}: the median is not between the percentiles")
        seen.add((row["shape"], row["n"], row["d"], row["v"], row["data"], row["method"], row["kind"]))
    _require(len(seen) == len(rows), "two rows are of the same measurement")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- the terminal ----


def table(rows: list[Row]) -> str:
    """The rows of one shape: a line a method and kind, then what was not measured."""
    width = max(len(r["method"]) for r in rows)
    lines = [
        f"{'method':<{width}} {'kind':<10} {'runtime_ms':>10} {'op_mem_mb':>9} {'test_data':<9}"
        f" {'p20-p80':>17} {'x mm':>6} {'TFLOP/s':>7} {'dE error':>8} {'dC error':>8} {'mean of 8':>17}  note"
    ]
    for r in rows:
        if r["runtime_ms"] is None:
            continue
        both = f"{_number(r['runtime_p20'], '.3f')}-{_number(r['runtime_p80'], '.3f')}"
        mean = "" if r["de_err_mean8"] is None else f"{r['de_err_mean8']:.1e}, {_number(r['dc_err_mean8'], '.1e')}"
        lines.append(
            f"{r['method']:<{width}} {r['kind']:<10} {r['runtime_ms']:>10.3f} {_number(r['op_mem_mb'], '.1f'):>9}"
            f" {r['data'][:9]:<9} {both:>17} {_number(r['x_mm'], '.2f'):>6} {_number(r['tflops'], '.3g'):>7}"
            f" {_number(r['de_err'], '.1e'):>8} {_number(r['dc_err'], '.1e'):>8} {mean:>17}  {r['note']}".rstrip()
        )
    without = {r["method"]: r["note"] for r in rows if r["runtime_ms"] is None}
    lines += [f"{method:<{width}} {note}" for method, note in without.items()]
    return "\n".join(lines)


def short_table(rows: list[Row]) -> str:
    """Forward and forward + backward beside the plain product, a line a shape and method."""
    lines = [f"{'shape':<14} {'method':<24} {'fw ms':>9} {'x mm':>6} {'fw+bw ms':>9} {'x mm':>6} {'MB':>8}"]
    pairs = {(r["shape"], r["data"], r["method"], r["kind"]): r for r in rows}
    for shape, data, method, kind in pairs:
        if kind != "loss-fw":
            continue
        forward, both = pairs[shape, data, method, kind], pairs[shape, data, method, "loss-fw-bw"]
        if forward["runtime_ms"] is None:
            lines.append(f"{shape:<14} {method:<24} {forward['note']}")
            continue
        lines.append(
            f"{shape:<14} {method:<24} {forward['runtime_ms']:>9.3f} {_number(forward['x_mm'], '.2f'):>6}"
            f" {both['runtime_ms']:>9.3f} {_number(both['x_mm'], '.2f'):>6} {_number(both['op_mem_mb'], '.0f'):>8}"
        )
    return "\n".join(lines)


def _number(x: float | None, form: str) -> str:
    return "-" if x is None else format(x, form)
