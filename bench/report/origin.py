"""Where figures come from: the machine, its clocks, the commit and the command."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..measure.child import ROOT


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
    """Device, versions, commit, command and date of this run of `python -m module`.

    Of a saved problem the command has the file's name alone, as the rows have.
    """
    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or git_commit(),
        "command": shlex.join(["python", "-m", module, *map(without_folder, sys.argv[1:])]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def without_folder(argument: str) -> str:
    """saved:FOLDER/FILE as saved:FILE, and an absolute path as its name, with an option's name before it or not."""
    option, saved, file = argument.partition("saved:")
    if not saved:
        option, equals, file = argument.rpartition("=")
        option += equals
    return option + saved + Path(file).name if saved or file.startswith("/") else argument


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
