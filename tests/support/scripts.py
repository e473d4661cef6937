"""The examples and the scripts of packaging in this process: importing torch again for each run would take seconds."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def exit_of(script: str, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """How examples/script exits, run as a program."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *args])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return exit_.value.code


def packaging_script(name: str) -> ModuleType:
    """packaging/name.py as a module. No path leads there: a package `packaging` is what others mean by that name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "packaging" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the module of their class
    spec.loader.exec_module(module)
    return module
