"""Modules of the benchmark in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(
    module: str, *arguments: str, capture: bool = False, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`, wherever this process was started. Raises subprocess.TimeoutExpired."""
    inherited = [str(Path(folder).resolve()) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *inherited])},
        capture_output=capture,
        text=True,
        check=False,
        timeout=timeout,
    )
