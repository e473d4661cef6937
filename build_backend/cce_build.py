"""PEP 517 backend: setuptools' own, plus build requirements that are asked for only where they are missing.

The extension uses PyTorch's stable ABI, so any PyTorch >= 2.10 will do to build it. pip's isolated
environment hides the packages of the environment it installs into, but runs that environment's interpreter:
a PyTorch installed there is found by its path, and only without one is a PyTorch downloaded for the build.

The CUDA compiler comes from PyPI as well where the machine has none: into the environment of the build, which
pip removes, never into the user's.
"""

import ctypes
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
CUDA_MINIMUM = (12, 0)  # the first with sm_90a
CUDA_DEFAULT = (13, 0)  # for a PyTorch that names no version of CUDA


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
    # nvcc says "Copyright (c) 2005-2025 ... release 13.0, V13.0.88".
    version = re.search(r"release (\d+)\.(\d+)", output) or re.search(r"(\d+)\.(\d+)", output)
    return (int(version[1]), int(version[2])) if version else None


# ---- the CUDA compiler ----


def torch_cuda(folder: Path | None) -> tuple[int, int] | None:
    """(major, minor) of the CUDA that the torch package in `folder` is built for; None without CUDA, or without torch.

    Read from its version.py, since the environment of a build cannot always import it.
    """
    source = folder / "version.py" if folder else None
    if source is None or not source.exists():
        return None
    version = re.search(r"""^cuda\b[^=\n]*=\s*['"](\d+)\.(\d+)""", source.read_text(), re.MULTILINE)
    return (int(version[1]), int(version[2])) if version else None


def machine_nvcc() -> str | None:
    """The nvcc that CMakeLists.txt takes, by its own rules; one that the environment names need not exist."""
    if compiler := os.environ.get("CUDACXX"):
        return compiler
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if toolkit := os.environ.get(name):
            return os.path.join(toolkit, "bin", "nvcc")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def machine_has_nvcc() -> bool:
    """Whether CMakeLists.txt finds an nvcc that is new enough, or was told of one and shall report what is wrong."""
    if any(os.environ.get(name) for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")):
        return True
    nvcc = machine_nvcc()
    return nvcc is not None and (_program_version(nvcc) or (0, 0)) >= CUDA_MINIMUM


def cuda_wheels(torch: Path | None) -> tuple[int, int] | None:
    """(major, minor) of the CUDA compiler to take from PyPI; None where none is needed, or none is there.

    CCE_CUDA_WHEELS=13.0 asks for one whatever the machine has. Otherwise it is for a machine without nvcc: the
    version of the torch that is installed. Where that names none it is 13.0, if CCE_CUDA=ON insists (a machine
    that builds for others), or if there is a GPU and torch is yet to be installed.
    For a torch of CUDA 12 nothing is taken: its wheels hold ptxas but no nvcc, and what nvcc 13 builds needs a
    newer driver (580) than that torch does.

    Raises RuntimeError where CCE_CUDA_WHEELS is set and no version of CUDA 13 or newer.
    """
    choice = os.environ.get("CCE_CUDA", "AUTO")
    if choice == "OFF" or not sys.platform.startswith("linux"):
        return None
    if override := os.environ.get("CCE_CUDA_WHEELS"):
        match = re.fullmatch(r"(\d+)\.(\d+)", override)
        if not match or int(match[1]) < 13:
            raise RuntimeError(
                f"CCE_CUDA_WHEELS must be a version of CUDA such as 13.0, but is {override!r} "
                "(the wheels of CUDA 12 hold no nvcc)"
            )
        return int(match[1]), int(match[2])
    if machine_has_nvcc():
        return None
    version = torch_cuda(torch)
    if version is None and (choice == "ON" or (torch is None and gpu_architectures())):
        version = CUDA_DEFAULT
    return version if version and version >= (13, 0) else None


def cuda_requirements(version: tuple[int, int]) -> list[str]:
    """The compiler as wheels. Left to themselves they would mix minor versions, which do not fit one another."""
    major, minor = version
    pinned = [f"nvidia-{name}=={major}.{minor}.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime")]
    # Its releases do not follow every minor version of the toolkit: 13.3's is the newest for 13.4 too.
    return [*pinned, f"nvidia-cuda-cccl>={major}.0,<{major}.{minor + 1}"]


def find_wheels_nvcc(version: tuple[int, int]) -> Path | None:
    """nvcc of the wheels that `cuda_requirements` names, from the environment this runs in."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    candidates = (Path(folder) / f"cu{version[0]}" / "bin" / "nvcc" for folder in folders or ())
    return next((nvcc for nvcc in candidates if nvcc.exists()), None)


def gpu_architectures() -> list[str]:
    """Compute capabilities of this machine's GPUs, such as ["80", "90"]; empty where its driver shows none.

    Asked of the driver's own library: neither nvidia-smi nor a CUDA runtime has to be installed.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return []
        found = set()
        for ordinal in range(count.value):
            device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
            # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            if (
                driver.cuDeviceGet(ctypes.byref(device), ordinal)
                or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
                or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
            ):
                return []
            found.add((major.value, minor.value))
    except (OSError, AttributeError):  # no driver, or a library that is none
        return []
    return [f"{major}{minor}" for major, minor in sorted(found)]


def why_without_kernels(torch: Path, build: Path) -> str | None:
    """Why the automatic choice left the CUDA kernels out although torch could use them; None where nothing is amiss.

    CMakeLists.txt leaves its own reason in the cache of the build folder.
    """
    cuda = torch_cuda(torch)
    reason = re.search(r"^CCE_WITHOUT_CUDA:INTERNAL=(.+)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    if cuda is None or reason is None:
        return None
    why = f"torch is built for CUDA {_dotted(cuda)}, but {reason[1]}."
    if cuda < (13, 0):
        why += (
            f" PyPI has no nvcc of CUDA {cuda[0]} either; where the driver is 580 or newer, CCE_CUDA_WHEELS=13.0 "
            "takes that of 13.0."
        )
    return f"{why} Install CUDA's nvcc, or set CUDA_HOME to its toolkit, and install cce_ext again."


# ---- the hooks ----


def extra_requirements() -> list[str]:
    """What the build needs beyond setuptools and does not find: torch, cmake, ninja, the CUDA compiler."""
    requirements = []
    torch = find_torch()
    if torch is None:
        requirements.append(f"torch>={_dotted(TORCH_MINIMUM)}")
    cmake = _program_version("cmake")
    if cmake is None or cmake < CMAKE_MINIMUM:
        requirements.append(f"cmake>={_dotted(CMAKE_MINIMUM)}")
    if _program_version("ninja") is None:
        requirements.append("ninja")
    if version := cuda_wheels(torch):
        requirements += cuda_requirements(version)
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + extra_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + extra_requirements()
