"""Builds the operator library for a machine of another kind, links it, and looks at what came out.

    python packaging/cross_compile.py linux-aarch64 [--cuda] [--run]
    python packaging/cross_compile.py macos-arm64

Runs on an x86_64 Linux. torch's headers and libtorch_cpu are those of the other machine's wheel, which pip downloads:
146 MB of torch 2.10.0 for Linux, 80 MB for macOS. The library goes to build/cross/TARGET.

linux-aarch64 needs Debian's g++-aarch64-linux-gnu. --cuda adds the kernels, for Hopper only: nvcc compiles for aarch64
with its own headers, and NVIDIA's wheel has the static CUDA runtime. --run unpacks an aarch64 Debian with Python and
torch, and has qemu run the package's self-check in it; it needs mmdebstrap and qemu-user-static.

macos-arm64 needs the PyPI package ziglang, whose clang brings macOS's headers, and llvm. It is not all that a Mac does:
zig's linker makes no bundles, so that the library is linked as a dylib, and with zig's libc++ in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.11"  # Debian bookworm's, for --run; the library is the same for all

# What torch's Python needs to be imported. pip evaluates the requirements of another platform's wheel as if it were
# for this machine, so that they are named here.
PYTHON_PACKAGES = ["filelock", "typing-extensions", "sympy==1.14.0", "networkx==3.4.2", "jinja2", "fsspec"]
PYTHON_PACKAGES += ["mpmath==1.3.0", "markupsafe", "numpy"]

SELF_CHECK = (
    "import sys; from cce_ext import __main__ as self; self.print_installation(); sys.exit(not self.check('cpu'))"
)


@dataclass(frozen=True)
class Target:
    torch: str  # the smallest wheel: later ones for aarch64 carry CUDA, 420 MB and more
    platforms: tuple[str, ...]
    nm: tuple[str, ...]  # lists undefined symbols


TARGETS = {
    "linux-aarch64": Target(
        "torch==2.10.0",
        ("manylinux_2_28_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64"),
        ("aarch64-linux-gnu-nm", "-D", "--undefined-only"),
    ),
    "macos-arm64": Target("torch==2.10.0", ("macosx_14_0_arm64", "macosx_11_0_arm64"), ("llvm-nm", "--undefined-only")),
}


class CrossError(Exception):
    pass


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    code = subprocess.run([str(c) for c in command], env={**os.environ, **environment}, check=False).returncode
    if code:
        raise CrossError(f"{Path(command[0]).name} failed with exit code {code}")


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise CrossError(f"{name} was not found: apt-get install {package}")
    return found


def pip_options(target: Target) -> list[str]:
    platforms = [option for name in target.platforms for option in ("--platform", name)]
    return ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *platforms, "--disable-pip-version-check"]


def unpacked_wheel(target: Target, requirement: str, folder: Path) -> Path:
    """The folder with this wheel's files, which are downloaded at most once."""
    unpacked = folder / re.sub(r"\W+", "_", requirement)
    if not unpacked.exists():
        downloads = folder / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        run(sys.executable, "-m", "pip", "download", "-d", downloads, *pip_options(target), requirement)
        (wheel,) = downloads.glob("*.whl")
        partial = unpacked.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(unpacked)
        shutil.rmtree(downloads)
    return unpacked


def options_for_linux(target: Target, folder: Path, cuda: bool) -> list[str]:
    compiler = program("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    options = [
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    ]
    if not cuda:
        return [*options, "-DCCE_CUDA=OFF"]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CrossError("--cuda: nvcc was not found on the PATH")
    steps = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if top is None or version is None:
        raise CrossError(f"--cuda: {nvcc} tells neither its folder nor its version")
    # nvcc looks in targets/aarch64-linux, which the toolkit of an x86_64 machine has not. The headers are the same.
    headers = Path(top[1], "targets", "x86_64-linux", "include").resolve()
    package = "nvidia-cuda-runtime" + ("" if int(version[1].split(".")[0]) >= 13 else "-cu12")
    runtime = unpacked_wheel(target, f"{package}=={version[1]}.*", folder)
    (static,) = runtime.rglob("libcudart_static.a")
    return [
        *options,
        "-DCCE_CUDA=ON",
        "-DCCE_CUDA_ARCHS=90-real",
        f"-DCMAKE_CUDA_HOST_COMPILER={compiler}",
        f"-DCMAKE_CUDA_FLAGS=-isystem={headers} -isystem={headers}/cccl -L{static.parent}",
    ]


def options_for_macos(folder: Path) -> list[str]:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise CrossError(f"{sys.executable} has no ziglang: pip install ziglang")
    program("llvm-nm", "llvm")
    rules = folder / "dylib.cmake"
    rules.write_text('set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS "-dynamiclib")\n')
    return [
        "-DCMAKE_SYSTEM_NAME=Darwin",
        "-DCMAKE_SYSTEM_PROCESSOR=arm64",
        f"-DCMAKE_CXX_COMPILER={Path(spec.origin).with_name('zig')};c++",
        "-DCMAKE_CXX_COMPILER_TARGET=aarch64-macos.14.0",
        "-DCMAKE_INSTALL_NAME_TOOL=/bin/false",  # CMake insists on one, and has no use for it: nothing is installed
        f"-DCMAKE_USER_MAKE_RULES_OVERRIDE={rules}",
        "-DCCE_CUDA=OFF",
    ]


def build(name: str, cuda: bool, folder: Path) -> tuple[Path, Path]:
    """Folder of the torch that the library was built with, and the library."""
    target = TARGETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    options = options_for_macos(folder) if name == "macos-arm64" else options_for_linux(target, folder, cuda)
    torch = unpacked_wheel(target, target.torch, folder) / "torch"
    work = folder / ("build-cuda" if cuda else "build")
    if shutil.which("ninja"):
        options.append("-GNinja")
    output = folder / ("cuda" if cuda else "cpu")
    run("cmake", f"-S{ROOT}", f"-B{work}", *options, f"-DCCE_TORCH_DIR={torch}", f"-DCCE_OUTPUT_DIR={output}")
    run("cmake", "--build", work, "--parallel", str(os.cpu_count() or 1))
    return torch, output / "_C.abi3.so"


def inspect(name: str, library: Path) -> None:
    """Prints what the library needs. Raises CrossError if it is for another machine, or needs more than it may."""
    # Mach-O names have one more underscore.
    prefix = "_" if name == "macos-arm64" else ""
    wanted = [line.split()[-1].split("@")[0] for line in output_of(*TARGETS[name].nm, library).splitlines()]
    symbols = [symbol.removeprefix(prefix) for symbol in wanted]
    of_torch = sorted(s for s in symbols if re.match(r"(aoti_)?torch_", s))
    surplus = [s for s in symbols if re.match(r"_?Py[A-Z_]|cuda[A-Z]|cu[A-Z]|_Z.*(c10|2at|5torch)", s)]
    # The first bytes, of ELF: class 64, little-endian, machine 183 (AArch64); of Mach-O: 64 bits, CPU type arm64.
    start = library.read_bytes()[:20]
    right = (
        start[:8] == b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"
        if name == "macos-arm64"
        else start[:6] == b"\x7fELF\x02\x01" and start[18:20] == b"\xb7\x00"
    )
    print(f"\n{library}: {library.stat().st_size} bytes, needs of torch: {', '.join(of_torch)}")
    if not right:
        raise CrossError(f"{library} is not for {name}: it begins with {start.hex()}")
    if not of_torch or surplus:
        raise CrossError(f"{library} must need torch's stable ABI only, but needs {surplus or 'nothing of torch'}")


def run_under_qemu(torch: Path, library: Path, folder: Path) -> None:
    qemu = program("qemu-aarch64-static", "qemu-user-static")
    system, packages = folder / "debian", folder / "python"
    if not system.exists():
        mmdebstrap = program("mmdebstrap", "mmdebstrap")
        partial = folder / "debian.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # Unpacked only: nothing of it has to run to install it, and no root is needed.
        include = "--include=python3,libstdc++6,libgomp1"
        run(mmdebstrap, "--variant=extract", "--architectures=arm64", include, "bookworm", partial)
        partial.rename(system)
    if not packages.exists():
        partial = folder / "python.partial"
        shutil.rmtree(partial, ignore_errors=True)
        options = pip_options(TARGETS["linux-aarch64"])
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", partial, *options, *PYTHON_PACKAGES)
        partial.rename(packages)
    copy = folder / "package" / "cce_ext"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "cce_ext", copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy2(library, copy)
    path = os.pathsep.join(str(p) for p in (copy.parent, torch.parent, packages))
    python = system / "usr" / "bin" / f"python{PYTHON}"
    # -P: not the clone's own cce_ext, which may be in the folder that this was started in.
    run(qemu, "-L", system, "-E", f"PYTHONPATH={path}", python, "-P", "-c", SELF_CHECK)


def main() -> None:
    parser = argparse.ArgumentParser(prog="cross_compile.py", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels, for Hopper only (linux-aarch64)")
    parser.add_argument("--run", action="store_true", help="run the package's self-check by qemu (linux-aarch64)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cross", help="default: build/cross")
    args = parser.parse_args()
    if args.target != "linux-aarch64" and (args.cuda or args.run):
        parser.error(f"--cuda and --run are for linux-aarch64, not for {args.target}")
    folder = args.folder.resolve() / args.target
    try:
        torch, library = build(args.target, args.cuda, folder)
        inspect(args.target, library)
        if args.run:
            run_under_qemu(torch, library, folder)
    except CrossError as error:
        sys.exit(f"cross_compile.py: {error}")


if __name__ == "__main__":
    main()
