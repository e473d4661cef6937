"""The examples run in this process: importing torch again for each run would take seconds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def exit_of(script: str, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """How examples/script exits, run as a program."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *args])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return exit_.value.code
