#!/usr/bin/env bash
# The files of a release: the sdist, and from it this platform's wheel under auditwheel's tag, both checked.
#
#     packaging/build_wheels.sh [OUT]     # OUT: dist by default
#
# CCE_CUDA, CCE_CUDA_ARCHS, CCE_TORCH_DIR, MAX_JOBS and the others of docs/install.md are passed on to the build. PYTHON
# (python3 by default, 3.11 or newer) runs it all; its torch is built against, or else BUILD_TORCH is installed for it.
# PLATFORM is auditwheel's: by default `auto`, as old as the C and C++ runtimes here let the wheel be. A release is built
# in a manylinux_2_28 container (.github/workflows/wheels.yml), and fails if it needs newer ones. Needs git, nm and readelf.
set -euo pipefail
out=$(realpath -m "${1:-dist}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

readonly PYTHON=${PYTHON:-python3} BUILD_TORCH=${BUILD_TORCH:-torch==2.13.0}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A wheel is for all GPUs, not for those of this machine: the build must not see them.
export CUDA_VISIBLE_DEVICES=

say() { printf '\n=== %s\n' "$*"; }

# The pinned tools of an extra in pyproject.toml, one a line.
requirements() {
  "$PYTHON" - "$@" <<'PYTHON'
import sys
import tomllib

extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print("\n".join(requirement for extra in sys.argv[1:] for requirement in extras[extra]))
PYTHON
}

say "tools"
requirements wheels audit >"$scratch/requirements.txt"
"$PYTHON" -m venv "$scratch/tools"
python=$scratch/tools/bin/python
export PATH=$scratch/tools/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip install --quiet --requirement "$scratch/requirements.txt"

# The build takes headers and libtorch_cpu.so from torch, and runs nothing of it: torch's own requirements, gigabytes
# of CUDA libraries, are not needed.
if [ -z "${CCE_TORCH_DIR:-}" ]; then
  find_torch='import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")'
  CCE_TORCH_DIR=$(cd / && "$PYTHON" -c "$find_torch")
  if [ -z "$CCE_TORCH_DIR" ]; then
    say "$BUILD_TORCH"
    "$python" -m pip install --quiet --no-deps "$BUILD_TORCH"
    CCE_TORCH_DIR=$(cd / && "$python" -c "$find_torch")
  fi
fi
export CCE_TORCH_DIR

say "sdist"
"$python" -m build --sdist --outdir "$scratch/sdist" . >"$scratch/sdist.log" || { cat "$scratch/sdist.log"; exit 1; }
sdist=$(echo "$scratch"/sdist/*.tar.gz)
"$python" packaging/check_sdist.py "$sdist"

say "wheel, from the sdist (CCE_CUDA=${CCE_CUDA:-AUTO}, CCE_CUDA_ARCHS=${CCE_CUDA_ARCHS:-all}, torch in $CCE_TORCH_DIR)"
mkdir "$scratch/source"
tar -xzf "$sdist" -C "$scratch/source" --strip-components=1
started=$SECONDS
(cd "$scratch/source" && "$python" -m build --wheel --outdir "$scratch/built" .)
echo "built in $((SECONDS - started)) s"
built=$(echo "$scratch"/built/*.whl)

# torch has loaded its library before ours, so that the wheel must not carry a copy.
say "auditwheel"
"$python" -m auditwheel show "$built"
"$python" -m auditwheel repair --plat "${PLATFORM:-auto}" --exclude libtorch_cpu.so --wheel-dir "$scratch/repaired" "$built"
wheel=$(echo "$scratch"/repaired/*.whl)
case $wheel in
  *-py3-none-manylinux*) ;;
  *) echo "auditwheel gave no manylinux tag: ${wheel##*/}" >&2; exit 1 ;;
esac

say "audit"
"$python" packaging/audit_library.py "$wheel"

say "files"
mkdir -p "$out"
mv "$sdist" "$wheel" "$out"
for file in "$out/${sdist##*/}" "$out/${wheel##*/}"; do
  printf '%s: %d bytes, sha256 %s\n' "$file" "$(stat -c %s "$file")" "$(sha256sum "$file" | cut -d ' ' -f 1)"
done
