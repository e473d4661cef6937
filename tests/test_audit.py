"""packaging/audit_library.py lets our library pass, and none that needs more than torch's stable ABI."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.scripts import packaging_script

pytest.importorskip("torch_abi_audit", reason="the extra `audit` is not installed")
pytest.importorskip("abi3audit", reason="the extra `audit` is not installed")

MINIMUM = (2, 10, 0)


@pytest.fixture(scope="module")
def audit():
    return packaging_script("audit_library")


@pytest.fixture
def build(tmp_path):
    """build(source, *flags): a library that calls what the source calls, and is otherwise as ours."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    # What is in libtorch_cpu.so does not matter to a linker that is told to leave symbols undefined.
    torch_cpu = tmp_path / "libtorch_cpu.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-xc++", "/dev/null", "-o", str(torch_cpu)], check=True)
    (tmp_path / "exports.map").write_text("{ local: *; };\n")

    def library(source: str, *flags: str) -> Path:
        file, out = tmp_path / "library.cpp", tmp_path / "_C.abi3.so"
        file.write_text(source)
        hide = flags or ("-Wl,--version-script=exports.map",)
        command = [compiler, "-shared", "-fPIC", str(file), "-o", str(out)]
        subprocess.run(
            [*command, "-Wl,--no-as-needed", f"-L{tmp_path}", "-ltorch_cpu", *hide], check=True, cwd=tmp_path
        )
        return out

    return library


STABLE = 'extern "C" int torch_call_dispatcher();\n'
CALL = "static int run() {{ return torch_call_dispatcher(){}; }}\nint (*used)() = run;\n"


def test_the_installed_library_passes(audit, capsys):
    import cce_ext

    library = Path(cce_ext.__file__).with_name("_C.abi3.so")
    assert audit.findings_of(library, audit.minimum_torch()) == []
    assert "holds to the stable ABI" in capsys.readouterr().out


def test_a_library_of_stable_calls_passes(audit, build):
    assert audit.findings_of(build(STABLE + CALL.format("")), MINIMUM) == []


@pytest.mark.parametrize(
    ("declared", "called", "finding"),
    [
        ("namespace c10 { struct Error { Error(); int x; }; }", "+ c10::Error().x", "stable ABI: _ZN3c105ErrorC1Ev"),
        ("namespace at { int add(); }", "+ at::add()", "stable ABI: _ZN2at3addEv"),
        ("namespace torch { int load(); }", "+ torch::load()", "torch-abi-audit: not of the stable ABI: torch::load"),
        # Of Python's limited API, which abi3audit allows.
        ('extern "C" int PyObject_Repr();', "+ PyObject_Repr()", "needs Python: PyObject_Repr"),
        ('extern "C" int PyUnicode_AsUTF8();', "+ PyUnicode_AsUTF8()", "needs Python: PyUnicode_AsUTF8"),
        ('extern "C" int _PyObject_Dump();', "+ _PyObject_Dump()", "abi3audit: "),
        # A name like those of the stable ABI, which torch-abi-audit takes for one; and one of a later torch.
        (
            'extern "C" int torch_make_coffee();',
            "+ torch_make_coffee()",
            "not of torch's stable ABI: torch_make_coffee",
        ),
        (
            'extern "C" int torch_from_blob();',
            "+ torch_from_blob()",
            "torch has from 2.11.0 on, but must load in 2.10.0",
        ),
        ('extern "C" int cudaMalloc();', "+ cudaMalloc()", "not of torch's stable ABI: cudaMalloc"),
        # dlsym's argument.
        ('const char* volatile name = "torch_make_coffee";', "+ *name", "looks up a function that is not of torch's"),
        ('const char* volatile name = "torch_from_blob";', "+ *name", "torch has from 2.11.0 on"),
    ],
)
def test_a_library_that_needs_more_fails(audit, build, declared, called, finding):
    found = audit.findings_of(build(STABLE + declared + "\n" + CALL.format(called)), MINIMUM)
    assert any(finding in line for line in found), found


def test_a_library_that_exports_or_knows_its_builder_fails(audit, build):
    source = STABLE + CALL.format("")
    found = audit.findings_of(build(source, "-Wl,-rpath,/home/builder"), MINIMUM)
    assert [line.split()[0] for line in found] == ["has", "exports"]


def test_no_operator_library_fails(audit, build):
    found = audit.findings_of(build("static int x() { return 1; }\nint (*used)() = x;\n"), MINIMUM)
    assert found == ["torch-abi-audit: uses nothing of torch"]


def test_targets(audit, tmp_path):
    with pytest.raises(ValueError, match="no shared library"):
        audit.libraries_of(tmp_path / "nothing.so", tmp_path)
    with pytest.raises(ValueError, match="no wheel or folder that holds one"):
        audit.libraries_of(tmp_path, tmp_path)
