"""Whether an sdist holds what git tracks and a build or the tests need, as git has it, and nothing else.

python packaging/check_sdist.py cce_ext-X.Y.Z.tar.gz
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What setuptools writes itself, and what only a clone on GitHub has a use for.
GENERATED = {"PKG-INFO", "setup.cfg"}
ONLY_IN_GIT = (".github/", ".gitignore")


def tracked() -> set[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listing.split("\0") if name and not name.startswith(ONLY_IN_GIT)}


def contents(sdist: Path) -> dict[str, bytes]:
    """The files of an sdist but for those that setuptools writes. Raises ValueError for a member that is no file."""
    files = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, _, name = member.name.partition("/")
            if member.isdir():
                continue
            data = archive.extractfile(member)
            if data is None or not name:
                raise ValueError(f"{sdist.name}: {member.name} is no file in one folder")
            if name not in GENERATED and not name.startswith("cce_ext.egg-info/"):
                files[name] = data.read()
    return files


def differences(files: dict[str, bytes], expected: set[str], folder: Path) -> list[str]:
    missing = [f"is missing: {name}" for name in sorted(expected - set(files))]
    surplus = [f"is not tracked by git, or of no use here: {name}" for name in sorted(set(files) - expected)]
    common = sorted(expected & set(files))
    changed = [f"differs from the tree's: {name}" for name in common if files[name] != (folder / name).read_bytes()]
    return missing + surplus + changed


def main() -> None:
    parser = argparse.ArgumentParser(prog="check_sdist.py", description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path)
    args = parser.parse_args()
    files = contents(args.sdist)
    found = differences(files, tracked(), ROOT)
    for line in found:
        print(f"{args.sdist.name}: {line}", file=sys.stderr)
    if not found:
        print(f"{args.sdist.name}: {len(files)} files, as git has them; {args.sdist.stat().st_size} bytes")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
