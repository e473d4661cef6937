"""PEP 517 backend: setuptools' own, plus build requirements that are asked for only where they are missing.

The extension uses PyTorch's stable ABI, so any PyTorch >= 2.10 will do to build it. pip's isolated
environment hides the packages of the environment it installs into, but runs that environment's interpreter:
a PyTorch installed there is found by its path, and only without one is a PyTorch downloaded for the build.
"""

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

TORCH_MINIMUM = (2, 10)
CMAKE_MINIMUM = (3, 24)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def torch_version(folder: Path) -> tuple[int, int] | None:
    """(major, minor) of the torch package in `folder`, or None where its headers or library are missing."""
    header = folder / "include/torch/headeronly/version.h"
    if not header.exists() or not list((folder / "lib").glob("libtorch_cpu.*")):
        return None
    parts = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(parts["MAJOR"]), int(parts["MINOR"])


def _candidate_folders() -> list[Path]:
    folders = []
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent)
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if os.environ.get("VIRTUAL_ENV"):
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        sites.append(os.path.join(os.environ["VIRTUAL_ENV"], "lib", python, "site-packages"))
    sites.append(site.getusersitepackages())  # pip's isolation switches the user's site off, not the install
    return folders + [Path(s) / "torch" for s in sites]


def find_torch() -> Path | None:
    """Folder of a PyTorch that can be built against.

    In this order: CCE_TORCH_DIR, the build environment's own, the environment's that the build is for.
    Raises RuntimeError where CCE_TORCH_DIR is set and holds none.
    """
    if override := os.environ.get("CCE_TORCH_DIR"):
        version = torch_version(Path(override))
        if version is None or version < TORCH_MINIMUM:
            found = "no torch package" if version is None else f"torch {_dotted(version)}"
            wanted = f"torch >= {_dotted(TORCH_MINIMUM)}"
            raise RuntimeError(f"CCE_TORCH_DIR must be the folder of {wanted}, but {override} has {found}")
        return Path(override)
    for folder in _candidate_folders():
        version = torch_version(folder)
        if version is not None and version >= TORCH_MINIMUM:
            return folder
    return None


def _program_version(name: str) -> tuple[int, int] | None:
    """(major, minor) of a program that works: isolation takes the package of some on the PATH away."""
    program = shutil.which(name)
    if program is None:
        return None
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"(\d+)\.(\d+)", output)
    return (int(version[1]), int(version[2])) if version else None


def extra_requirements() -> list[str]:
    """What the build needs beyond setuptools and does not find: torch, cmake, ninja."""
    requirements = []
    if find_torch() is None:
        requirements.append(f"torch>={_dotted(TORCH_MINIMUM)}")
    cmake = _program_version("cmake")
    if cmake is None or cmake < CMAKE_MINIMUM:
        requirements.append(f"cmake>={_dotted(CMAKE_MINIMUM)}")
    if _program_version("ninja") is None:
        requirements.append("ninja")
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + extra_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + extra_requirements()
