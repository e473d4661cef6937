"""Runs CMake, which knows every source and flag, and tags the wheel. Everything else is in pyproject.toml."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from cce_build import (  # noqa: E402
    cuda_requirements,
    cuda_wheels,
    find_torch,
    find_wheels_nvcc,
    gpu_architectures,
    machine_nvcc,
    why_without_kernels,
)

if sys.platform == "win32":  # at once: pip would fetch a torch for the build first, and CMake fail on the flags
    raise SystemExit("cce_ext does not support Windows: install it in WSL 2")


def parallel_jobs() -> int:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdecimal() or int(jobs) < 1:
        raise SetupError(f"MAX_JOBS must be a positive integer, but is {jobs!r}")
    return int(jobs)


def run_cmake(step: str, *arguments: str) -> None:
    command = ["cmake", *arguments]
    print("+", *command, flush=True)
    try:
        code = subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise ExecError("cmake was not found: pip install 'cmake>=3.24'") from None
    if code:
        raise ExecError(f"CMake's {step} step failed (exit code {code}): its message is above")


def say(line: str) -> None:
    """Print a line that users must see: pip keeps a build's output to itself, so it goes to the terminal as well."""
    print(line, flush=True)
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        terminal.write(f"\n{line}\n")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        jobs = parallel_jobs()
        try:
            torch = find_torch()
            wheels = cuda_wheels(torch)
        except RuntimeError as error:
            raise SetupError(str(error)) from None
        if torch is None:
            raise SetupError("there is no torch >= 2.10 to build against: install it, or set CCE_TORCH_DIR")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        ninja = shutil.which("ninja")
        # An editable install's build_temp is gone after it: in the clone the next one builds what has changed.
        folder = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        build = folder / ("cmake-ninja" if ninja else "cmake-make")
        arguments = [
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCCE_TORCH_DIR={torch}",
            f"-DCCE_OUTPUT_DIR={library.parent}",
            f"-DCCE_OUTPUT_NAME={library.name}",
            f"-DCCE_CUDA={os.environ.get('CCE_CUDA') or 'AUTO'}",
            f"-DCCE_STRICT={os.environ.get('CCE_STRICT') or 'OFF'}",
            f"-DCCE_GPUS={';'.join(gpu_architectures())}",
            # The longest of the kernels' files takes a third of the work: with many cores its architectures
            # are compiled side by side.
            f"-DCCE_NVCC_THREADS={max(1, jobs // 4)}",
        ]
        # The build folder outlives this run, so what an earlier one cached is set again or dropped: ninja may have
        # been in a pip environment that is gone.
        if ninja:
            arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        architectures = os.environ.get("CCE_CUDA_ARCHS")
        arguments.append(f"-DCCE_CUDA_ARCHS={architectures}" if architectures else "-UCCE_CUDA_ARCHS")
        nvcc = find_wheels_nvcc(wheels) if wheels else None
        if nvcc is None and (wanted := os.environ.get("CCE_CUDA_WHEELS")) and wheels:
            raise SetupError(
                f"CCE_CUDA_WHEELS={wanted}, but the environment of this build has no such nvcc: build without "
                f"--no-build-isolation, or install {' '.join(cuda_requirements(wheels))}"
            )
        arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}" if nvcc else "-UCMAKE_CUDA_COMPILER")
        # CMake goes on with the CUDA compiler that it first found there, gone or not. --fresh forgets it, and the
        # objects with it.
        found = nvcc or machine_nvcc()
        compiler = os.path.realpath(found) if found else ""
        stamp = build / "nvcc.txt"
        if not stamp.exists() or stamp.read_text() != compiler:
            arguments.append("--fresh")
        run_cmake("configure", *arguments)
        stamp.write_text(compiler)
        run_cmake("build", "--build", str(build), "--parallel", str(jobs))
        if why := why_without_kernels(torch, build):
            say(f"cce_ext is built WITHOUT its CUDA kernels: {why}")
        # From the root of a clone Python finds the package's own folder before the installed one, so that the
        # library has to be there as well.
        in_tree = ROOT / "cce_ext" / library.name
        if library != in_tree:
            shutil.copy2(library, in_tree)


class Wheel(bdist_wheel):
    def get_tag(self):
        # The library holds no Python symbol, so one wheel serves every Python.
        # A universal Python on a Mac tags for two kinds of processor, while CMake builds for this one.
        return "py3", "none", super().get_tag()[2].replace("universal2", platform.machine())


setup(
    ext_modules=[Extension("cce_ext._C", [], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
