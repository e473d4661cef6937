"""The layers of csrc: each includes only what lies below it, so kernels see no torch and operators CUDA.

And of the Python around cce_ext: it uses no private names of the package.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
LAYERS = ["ptx", "tile", "kernels", "launch", "ops"]
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())

# What operators may know of the launch layer: its interface, never a kernel.
LAUNCH_INTERFACE = {"launch/launch.h", "launch/params.h", "launch/heuristics.h"}
MAX_LINES = {"kernels": 400, "ptx": 260}


def violations(name: str, text: str) -> list[str]:
    """What is wrong with the includes of the file `name`, a path below csrc."""
    layer, suffix = name.split("/")[0], Path(name).suffix
    found = []
    for bracket, target in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        if bracket == '"':
            other = target.split("/")[0]
            if other not in LAYERS:
                found.append(f"{name}: {target} is not written as a path below csrc")
            elif LAYERS.index(other) > LAYERS.index(layer):
                found.append(f"{name}: {layer} lies below {other} and includes {target}")
            elif layer == "ops" and other != "ops" and target not in LAUNCH_INTERFACE:
                found.append(f"{name}: operators reach kernels through the launchers only, not {target}")
            if suffix in (".h", ".cpp") and target.endswith(".cuh"):
                found.append(f"{name}: a file for the host compiler includes the CUDA header {target}")
        elif re.match(r"(torch|ATen|c10)/", target):
            if layer != "ops":
                found.append(f"{name}: only ops sees torch, not {target}")
        elif re.match(r"(cuda|cu|cooperative_groups)", target):
            if suffix not in (".cuh", ".cu"):
                found.append(f"{name}: a file for the host compiler includes {target}")
        elif re.match(r"(Python\.h|pybind11/)", target):
            found.append(f"{name}: the library knows no Python, so no {target}")
    return found


def test_kernels_in_headers_belong_to_the_file_that_includes_them():
    """nvcc ignores `inline` on a kernel: without `static` or a template, two files that include it define it twice."""
    found = 0
    for path in CSRC.rglob("*.cuh"):
        text = path.read_text()
        for kernel in re.finditer(r"^[^\n]*__global__", text, re.MULTILINE):
            found += 1
            before = text[: kernel.start()].rstrip().splitlines()[-1]
            assert kernel[0].startswith("static ") or before.startswith("template <"), f"{path.name}: {kernel[0]}"
    assert found > 5


def test_includes_go_downwards():
    assert SOURCES
    wrong = [v for path in SOURCES for v in violations(path.relative_to(CSRC).as_posix(), path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ptx/a.cuh", '#include "tile/constants.h"'),
        ("tile/a.h", '#include "kernels/label_logits_config.h"'),
        ("kernels/a.cuh", '#include "launch/params.h"'),
        ("launch/a.cuh", '  #  include "ops/checks.h"'),
        ("ops/a.cpp", '#include "tile/sampling.h"'),
        ("ops/a.cpp", '#include "launch/dtype.cuh"'),
        ("ops/a.cpp", "#include <cuda_runtime_api.h>"),
        ("launch/heuristics.h", "#include <cuda_fp16.h>"),
        ("launch/a.cu", "#include <torch/csrc/stable/tensor.h>"),
        ("kernels/a.h", '#include "tile/warp.cuh"'),
        ("kernels/a.cuh", '#include "label_logits_config.h"'),
        ("ops/a.cpp", "#include <Python.h>"),
    ],
)
def test_a_wrong_include_is_found(name, line):
    assert violations(name, f"#pragma once\n{line}\n")


def test_files_stay_short():
    for layer, most in MAX_LINES.items():
        for path in (CSRC / layer).iterdir():
            lines = len(path.read_text().splitlines())
            assert lines <= most, f"csrc/{layer}/{path.name} has {lines} lines; {most} at most"


def test_cmake_lists_every_source():
    listed = set(re.findall(r"\bcsrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    present = {p.relative_to(ROOT).as_posix() for p in SOURCES if p.suffix in (".cpp", ".cu")}
    assert listed - {"csrc/host_tests.cpp"} == present  # tests/csrc/host_tests.cpp: the host test module


def private_names(name: str, text: str) -> list[str]:
    """Where the Python file `name` imports a private name of cce_ext, or reaches one in a module of it."""
    found, modules = [], set()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name.split(".")[0] for a in node.names if a.name.split(".")[0] == "cce_ext"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cce_ext":
            modules |= {a.asname or a.name for a in node.names}
            used = [*node.module.split("."), *(a.name for a in node.names)]
            found += [f"{name}:{node.lineno}: {x}" for x in used if re.match("_(?!_)", x)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules:
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_outside_of_the_package_uses_its_private_names():
    paths = [path for folder in ("bench", "examples", "research", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert paths
    found = [x for path in paths for x in private_names(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "from cce_ext.api import _compiled",
        "from cce_ext._hidden import name",
        "import cce_ext as c\nc.api._compiled()",
        "from cce_ext import api\napi._compiled",
    ],
)
def test_a_private_name_is_found(text):
    assert len(private_names("a.py", text)) == 1
    assert not private_names("a.py", text.replace("_compiled", "compiled").replace("_hidden", "hidden"))
