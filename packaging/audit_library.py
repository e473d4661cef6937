"""What the operator library asks of whoever loads it: nothing of Python's, of torch only the stable ABI of its minimum.

    python packaging/audit_library.py [LIBRARY.so | WHEEL.whl | FOLDER ...]

Without arguments it looks at the cce_ext that this Python would import. Fails, and says why, if any library does not
hold to it. Needs `nm` and the packages of the extra `audit`.

Two tools look, and then we do, since neither is strict enough for this library. abi3audit allows the Python functions
of the limited API, and ours may use none. torch-abi-audit takes any name that begins with torch_ for the stable ABI,
of whatever version, and cannot see what is looked up by dlsym.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tomllib
from torch_abi_audit import inspect_extension
from torch_abi_audit.torch_versions import format_version, stable_shim_versions

ROOT = Path(__file__).resolve().parents[1]
Version = tuple[int, ...]

# Symbols of these versions come from the C and C++ runtime of every Linux; auditwheel says which Linux is old enough.
SYSTEM = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
# What a compiler adds to every library, and what nobody needs to have.
OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
LIBRARIES = re.compile(r"libtorch_cpu\.so|libstdc\+\+\.so\.6|lib(gcc_s|c|m|dl|rt|pthread)\.so\.\d|ld-linux-.*\.so\.\d")
# dlsym's arguments. They are found as strings, so that names in messages do not count: those do not end there.
LOOKED_UP = re.compile(rb"(?<![A-Za-z0-9_])((?:aoti_)?torch_[A-Za-z0-9_]+)\0")


@dataclass(frozen=True)
class Needs:
    """What a library needs of others when it is loaded, and what it looks up later."""

    symbols: dict[str, str]  # the name of each undefined symbol: its version, or ""
    libraries: list[str]
    runpath: bool
    exported: list[str]
    looked_up: set[str]

    def newest(self, prefix: str) -> str:
        """The newest version of a runtime that a symbol is of, such as 2.14 of GLIBC."""
        versions = (v.removeprefix(prefix + "_") for v in self.symbols.values() if v.startswith(prefix + "_"))
        return max(versions, key=lambda v: [int(x) for x in v.split(".")], default="none")


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needs_of(library: Path) -> Needs:
    symbols = {}
    for line in output_of("nm", "-D", "--undefined-only", str(library)).splitlines():
        name, _, version = line.split()[-1].partition("@")
        symbols[name] = version.lstrip("@")
    dynamic = output_of("readelf", "-d", str(library))
    return Needs(
        symbols=symbols,
        libraries=re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic),
        runpath=bool(re.search(r"\((RUNPATH|RPATH)\)", dynamic)),
        exported=[x.split()[-1] for x in output_of("nm", "-D", "--defined-only", str(library)).splitlines()],
        looked_up={name.decode() for name in LOOKED_UP.findall(library.read_bytes())},
    )


def minimum_torch() -> Version:
    """The torch that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [re.fullmatch(r"torch>=(\d+)\.(\d+)", x) for x in project["dependencies"]]
    found = [(int(x[1]), int(x[2]), 0) for x in versions if x]
    if len(found) != 1:
        raise ValueError(f"pyproject.toml: dependencies must hold one torch>=X.Y, but is {project['dependencies']}")
    return found[0]


def own_findings(needs: Needs, minimum: Version) -> list[str]:
    """What is wrong by our own rules: every symbol is the runtime's, or a function of that torch's stable ABI."""
    stable = stable_shim_versions()
    findings = []
    for name, version in sorted(needs.symbols.items()):
        if SYSTEM.fullmatch(version) or name in OPTIONAL:
            continue
        if re.match(r"_?Py[A-Z_]", name):
            findings.append(f"needs Python: {name}")
        elif name not in stable:
            findings.append(f"needs a symbol that is not of torch's stable ABI: {name}")
    for name in sorted(needs.looked_up - set(needs.symbols) - set(stable)):
        findings.append(f"looks up a function that is not of torch's stable ABI: {name}")
    for name in sorted((needs.looked_up | set(needs.symbols)) & set(stable)):
        if stable[name] > minimum:
            new, old = format_version(stable[name]), format_version(minimum)
            findings.append(f"uses what torch has from {new} on, but must load in {old}: {name}")
    findings += [f"needs the library {name}" for name in needs.libraries if not LIBRARIES.fullmatch(name)]
    if "libtorch_cpu.so" not in needs.libraries:
        findings.append("does not need libtorch_cpu.so, so that it is no operator library at all")
    if needs.runpath:
        findings.append("has a RUNPATH, a path of the machine that built it")
    findings += [f"exports {name}" for name in needs.exported]
    return findings


def findings_of(library: Path, minimum: Version) -> list[str]:
    """All that is wrong with a library, by both tools and by our own rules."""
    needs = needs_of(library)
    findings = own_findings(needs, minimum)
    report = inspect_extension(library)
    if report.error:
        findings.append(f"torch-abi-audit: {report.error}")
    elif not report.torch.uses_torch:
        findings.append("torch-abi-audit: uses nothing of torch")
    findings += [f"torch-abi-audit: not of the stable ABI: {name}" for name in report.torch.unstable_symbols]
    findings += [f"torch-abi-audit: unknown: {name}" for name in report.torch.unknown_shim_symbols]
    abi3audit = [sys.executable, "-m", "abi3audit", "--strict", "--verbose", "--assume-minimum-abi3", "3.10"]
    done = subprocess.run([*abi3audit, str(library)], capture_output=True, text=True, check=False)
    if done.returncode:
        findings.append(f"abi3audit: {' '.join((done.stdout + done.stderr).split())}")
    torch_minimum = report.torch.min_torch_version
    print(
        f"{library.name}: {library.stat().st_size} bytes; {report.torch.stable_shim_count} symbols of torch, "
        f"{len(needs.looked_up - set(needs.symbols))} looked up at run time, minimum torch {torch_minimum}; "
        f"GLIBC {needs.newest('GLIBC')}, GLIBCXX {needs.newest('GLIBCXX')}, CXXABI {needs.newest('CXXABI')}; "
        f"{'FAILED' if findings else 'holds to the stable ABI, and needs nothing of Python'}"
    )
    return findings


def libraries_of(target: Path, scratch: Path) -> list[Path]:
    """The shared libraries of a file, a wheel or a folder. Raises ValueError if it has none."""
    if target.suffix == ".whl":
        with zipfile.ZipFile(target) as wheel:
            wheel.extractall(scratch / target.stem)
        libraries = sorted((scratch / target.stem).rglob("*.so*"))
    elif target.is_dir():
        libraries = sorted(target.rglob("*.so*"))
    else:
        libraries = [target] if target.is_file() else []
    if not libraries:
        raise ValueError(f"{target} is no shared library, and no wheel or folder that holds one")
    return libraries


def installed() -> Path:
    spec = importlib.util.find_spec("cce_ext")
    if spec is None or spec.origin is None:
        raise ValueError("cce_ext is not installed here: name a library, a wheel or a folder")
    return Path(spec.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="audit_library.py", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", type=Path, metavar="LIBRARY|WHEEL|FOLDER")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        try:
            minimum = minimum_torch()
            libraries = [x for t in args.targets or [installed()] for x in libraries_of(t, Path(scratch))]
        except ValueError as error:
            parser.error(str(error))
        for library in libraries:
            for finding in findings_of(library, minimum):
                print(f"  {finding}")
                failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
