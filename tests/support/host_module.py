"""Builds and imports cce_host_tests: the C++ that runs without a GPU. Needs no torch."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # pytest -n has several processes that want it
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_alone(folder)


def _build_alone(folder: Path) -> None:
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    configure = [
        cmake,
        f"-S{ROOT}",
        f"-B{folder}",
        "-DCCE_LIBRARY=OFF",
        "-DCCE_TESTS=ON",
        "-DCCE_CUDA=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    if ninja:
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"


def load() -> ModuleType:
    """The module, built again where its sources have changed. Skips the test where it cannot be built."""
    pytest.importorskip("pybind11")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python's C headers are not installed")
    generator = "ninja" if shutil.which("ninja") else "make"
    folder = ROOT / "build" / "host_tests" / f"{sys.implementation.cache_tag}-{generator}"
    _build(folder)
    library = folder / f"cce_host_tests{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("cce_host_tests", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
