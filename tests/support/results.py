"""A results file of the benchmark's that nobody measured."""

from __future__ import annotations

import math

from bench.measure.rows import empty_rows
from bench.problems import shapes

META = {
    "device": "a CPU",
    "driver": None,
    "clocks": None,
    "torch": "2",
    "cuda": None,
    "commit": "0",
    "command": "python -m bench",
    "date": "today",
    "packages": {"cce_ext": "0"},
    "dtype": "float32",
    "softcap": None,
    "data_statistics": {},
}


def made_up(places: list[tuple[int, int, int]], names: tuple[str, ...] = ("mm", "cce")) -> list[dict]:
    """Rows of these N, D, V and methods, measured one and all."""
    rows = []
    for at in places:
        for name in names:
            for row in empty_rows(shapes.of(*at), "lm", name, ""):
                ms = 1e-6 * math.prod(at) / len(name)
                figures = dict(runtime_ms=ms, runtime_p20=ms, runtime_p80=ms, x_mm=1.0, tflops=1.0, op_mem_mb=5.0)
                rows.append(row | figures)
    return rows
