"""What would tie the package to x86 and Linux. `packaging/cross_compile.py` builds it for other machines."""

import ast
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cce_ext import measure

ROOT = Path(__file__).resolve().parents[1]

# Headers, intrinsics, macros and instructions of x86, and inline assembly of any processor.
X86 = r"\w*mmintrin\.h|x86\w*\.h|cpuid\.h|_mm\d*_\w+|rdtsc\w*"
X86 += r"|__(SSE|AVX|FMA|BMI)\w*|(__|_M_)(x86_64|amd64|i386|X64|IX86)\w*"
ASSEMBLY = r"\b(__asm__|__asm|asm)\b"

# Modules and functions that Python has on some systems only.
MODULES = {"fcntl", "grp", "msvcrt", "pty", "pwd", "resource", "syslog", "termios", "winreg"}
FUNCTIONS = {"fork", "getloadavg", "getpgid", "killpg", "memfd_create", "setsid", "uname", "wait4"}


def processor_specific(name: str, text: str) -> list[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    pattern = X86 if Path(name).suffix in (".cu", ".cuh") else f"{X86}|{ASSEMBLY}"  # of the GPU: PTX
    return [f"{name}: {found[0]}" for found in re.finditer(pattern, code)]


def system_specific(name: str, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and (node.attr in FUNCTIONS or node.attr.startswith("sched_")):
                found.append(f"os.{node.attr}")
            elif node.value.id == "signal" and node.attr.startswith("SIG"):
                found.append(f"signal.{node.attr}")
    return [f"{name}: {x}" for x in found]


def test_csrc_is_for_any_processor():
    files = [path for folder in ("csrc", "tests/csrc") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert [x for path in files for x in processor_specific(path.relative_to(ROOT).as_posix(), path.read_text())] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops/a.cpp", "#include <immintrin.h>\n"),
        ("ops/a.cpp", "auto x = _mm256_loadu_ps(p);"),
        ("tile/a.h", "#if defined(__x86_64__)\n"),
        ("tile/a.h", "#ifdef __AVX2__\n"),
        ("tile/a.h", 'asm volatile("pause");'),
        ("kernels/a.cuh", "#ifdef _M_X64\n"),
    ],
)
def test_code_for_x86_is_found(name, text):
    assert len(processor_specific(name, text)) == 1


def test_ptx_and_comments_are_not_code_for_x86():
    assert processor_specific("ptx/a.cuh", 'asm volatile("bar.sync 0;");') == []
    assert processor_specific("ops/a.cpp", "// as _mm_pause would\nint asmodeus = 0;") == []


def test_package_is_for_any_system():
    files = sorted((ROOT / "cce_ext").rglob("*.py"))
    assert files
    assert [x for path in files for x in system_specific(path.relative_to(ROOT).as_posix(), path.read_text())] == []


@pytest.mark.parametrize(
    "text",
    [
        "import resource",
        "from fcntl import flock",
        "len(os.sched_getaffinity(0))",
        "os.fork()",
        "signal.signal(signal.SIGUSR1, stop)",
    ],
)
def test_code_for_one_system_is_found(text):
    assert len(system_specific("a.py", text)) == 1


def test_memory_is_not_measured_without_proc(monkeypatch):
    """As on a Mac: there is no figure, and no error."""

    def missing(self, *args, **kwargs):
        raise FileNotFoundError(self)

    calls = []
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(Path, "write_text", missing)
    assert measure.phase_peaks([lambda: calls.append(1)], "cpu") is None
    assert measure.peak_memory(lambda: calls.append(1), "cpu") is None
    assert calls == []


# ---- setup.py on other systems, which it is only told it is on ----


def on_system(system: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code with build_backend's module cce_build imported, and with sys.platform changed after that."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="this setuptools is too old to build the package")
    prepare = f"import runpy, sys, setuptools.command.build_ext, cce_build; sys.platform = {system!r}\n"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'build_backend')\n{prepare}{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_windows_is_refused_before_a_torch_is_fetched():
    done = on_system("win32", "print(cce_build.get_requires_for_build_wheel())")
    assert done.returncode != 0
    assert done.stderr.strip() == "cce_ext does not support Windows: install it in WSL 2"
    assert "torch" not in done.stdout


def test_a_universal_python_makes_a_wheel_for_its_own_processor():
    done = on_system(
        "darwin",
        "setuptools.setup = lambda **arguments: None\n"
        "wheel = runpy.run_path('setup.py')['Wheel']\n"
        "wheel.__base__.get_tag = lambda self: ('cp311', 'abi3', 'macosx_14_0_universal2')\n"
        "print(*wheel.__new__(wheel).get_tag())",
    )
    assert done.stdout.split() == ["py3", "none", f"macosx_14_0_{platform.machine()}"], done.stderr
