"""What a release says of itself: one version everywhere, an sdist that is the tree, a table of what was run."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from pathlib import Path

import pytest
from support.scripts import packaging_script

ROOT = Path(__file__).resolve().parents[1]


def only(pattern: str, file: str) -> str:
    """The one match of a pattern in a file of the repository."""
    found = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert len(found) == 1, f"{file} must hold {pattern!r} once, but has {found}"
    return found[0]


# ---- the version ----


@pytest.fixture(scope="module")
def version() -> str:
    return only(r'^__version__ = "(\d+\.\d+\.\d+)"$', "cce_ext/__init__.py")


def test_the_version_has_one_source(version):
    assert only(r"^dynamic = (.*)$", "pyproject.toml") == '["version"]'
    assert only(r"^version = (.*)$", "pyproject.toml") == '{ attr = "cce_ext.__version__" }'
    for file in ("setup.py", "CMakeLists.txt", "build_backend/cce_build.py", "README.md"):
        assert version not in (ROOT / file).read_text(), f"{file} states the version by itself"


def test_setuptools_reads_it_without_importing_the_package(version, monkeypatch):
    """The build has no torch to import."""
    expand = pytest.importorskip("setuptools.config.expand")
    for name in [name for name in sys.modules if name.split(".")[0] in ("cce_ext", "torch")]:
        monkeypatch.delitem(sys.modules, name)
    assert expand.read_attr("cce_ext.__version__", root_dir=ROOT) == version
    assert "torch" not in sys.modules


def test_changelog_and_citation_are_of_this_version(version):
    releases = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert releases[0][0] == version, "the newest release of CHANGELOG.md is another"
    assert (only(r"^version: (.*)$", "CITATION.cff"), only(r"^date-released: (.*)$", "CITATION.cff")) == releases[0]


# ---- the sdist ----


def test_sdist_differences(tmp_path):
    check_sdist = packaging_script("check_sdist")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("kept", "changed", "forgotten"):
        (tree / name).write_text(name)
    sdist = tmp_path / "a.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name, data in {"kept": b"kept", "changed": b"other", "stray.log": b"", "PKG-INFO": b"generated"}.items():
            member = tarfile.TarInfo(f"cce_ext-1/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    found = check_sdist.differences(check_sdist.contents(sdist), {"kept", "changed", "forgotten"}, tree)
    assert [line.split(": ")[1] for line in found] == ["forgotten", "stray.log", "changed"]
    with tarfile.open(sdist, "w:gz") as archive:
        link = tarfile.TarInfo("cce_ext-1/link")
        link.type, link.linkname = tarfile.FIFOTYPE, ""
        archive.addfile(link)
    with pytest.raises(ValueError, match="cce_ext-1/link is no file"):
        check_sdist.contents(sdist)


# ---- several versions of torch ----


def test_a_row_says_what_failed():
    try_torches = packaging_script("try_torches")
    lines = [{"torch": "2.12.1+cu130", "python": "3.11.7"}, {"check": "import", "result": "ok", "seconds": 1.0}]
    row = try_torches.row_of("2.12.1", [*lines, {"check": "opcheck", "result": "OpCheckError: x\ny"}], "ended")
    assert not try_torches.passed(row)
    assert (row["torch"], row["import"], row["compile"], row["step"]) == ("2.12.1+cu130", "ok", "ended", "ended")
    shown = try_torches.table([row])
    assert shown.splitlines()[2] == "| 2.12.1+cu130 | 3.11.7 | ok | OpCheckError: x y | ended | ended |"
    assert sorted([{"version": "2.9.1"}, {"version": "2.10.0"}], key=try_torches.order)[0]["version"] == "2.9.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2.10", "--wheel", __file__], "VERSION must be like 2.10.0, but is '2.10'"),
        (["2.10.0", "--wheel", __file__], f"--wheel: {__file__} is no wheel"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["try_torches.py", *arguments])
    with pytest.raises(SystemExit):
        packaging_script("try_torches").main()
    assert message in capsys.readouterr().err


def test_the_training_step_that_each_torch_makes(monkeypatch):
    """It passes here, and fails with a loss that is not the dense one."""
    import cce_ext

    checks = packaging_script("torch_checks")
    checks.training_step()
    right = cce_ext.linear_cross_entropy
    monkeypatch.setattr(cce_ext, "linear_cross_entropy", lambda *x, **options: 1.01 * right(*x, **options))
    with pytest.raises(AssertionError):
        checks.training_step()
