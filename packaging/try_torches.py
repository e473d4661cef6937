"""One wheel with several versions of torch, each in an environment of its own: what docs/start.md says was run.

    python packaging/try_torches.py --wheel dist/cce_ext-X.Y.Z-py3-none-manylinux_2_28_x86_64.whl 2.10.0 2.14.1

Per version: a new virtual environment, that torch with all that it needs, the wheel, and torch_checks.py (import,
torch.library.opcheck of every operator, torch.compile(fullgraph=True) forward and backward, a training step against
the dense loss), on the CPU. Then the environment is removed. A torch with CUDA takes 3 GB of download and 7 GB of disk
while it is tried. Prints the table and writes it to --out; --add keeps the rows there of versions that are not tried.

Needs what the benchmark needs (`pip install ".[bench]"`) and a C++ compiler, for torch.compile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench.report import files, origin  # noqa: E402

CHECKS = ("import", "opcheck", "compile", "step")
STAGES = ("environment", "torch", "wheel", *CHECKS)
GIGABYTES = 12  # free disk before a torch with CUDA is installed
Row = dict[str, Any]


def row_of(version: str, lines: list[dict[str, Any]], error: str) -> Row:
    """A version's row, from what torch_checks.py printed; error stands where it printed nothing."""
    row: Row = {"version": version, "torch": "", "python": ""} | dict.fromkeys(CHECKS, error)
    for line in lines:
        if "check" in line:
            row[line["check"]] = line["result"]
        else:
            row |= line
    return row


def run(command: list[str], log: Path) -> str:
    """Runs a command into the log. Returns "", or what went wrong."""
    with log.open("a") as out:
        out.write(f"+ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd="/", check=False).returncode
    if code == 0:
        return ""
    errors = [line for line in log.read_text().splitlines() if re.match(r"(ERROR|\w*Error)\b", line)]
    return errors[-1] if errors else f"exit code {code}"


def run_checks(python: Path, log: Path, tick: Callable[[str], None]) -> tuple[list[dict[str, Any]], str]:
    """What torch_checks.py prints, and why it ended early, if it did."""
    lines: list[dict[str, Any]] = []
    command = [str(python), str(ROOT / "packaging" / "torch_checks.py")]
    with (
        log.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=log.parent) as child,
    ):
        assert child.stdout is not None
        for text in child.stdout:
            if not text.startswith("{"):  # torch's own words
                continue
            lines.append(json.loads(text))
            if "check" in lines[-1]:
                tick(lines[-1]["check"])
    return lines, f"not run: torch_checks.py ended with exit code {child.returncode}"


def try_version(version: str, wheel: Path, python: str, work: Path, tick: Callable[[str], None]) -> Row:
    """The row of one version. Its environment is gone afterwards; its log stays if something failed."""
    environment, log = work / f"torch-{version}", work / f"torch-{version}.log"
    log.unlink(missing_ok=True)
    own = environment / "bin" / "python"
    pip = [str(own), "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off"]
    steps = {
        "environment": [python, "-m", "venv", "--clear", str(environment)],
        "torch": [*pip, f"torch=={version}"],
        "wheel": [*pip, "--no-deps", str(wheel)],
    }
    try:
        for name, command in steps.items():
            error = run(command, log)
            if error:
                return row_of(version, [], f"not run: {name}: {error}")
            tick(name)
        lines, ended = run_checks(own, log, tick)
        return row_of(version, lines, ended)
    finally:
        shutil.rmtree(environment, ignore_errors=True)


def passed(row: Row) -> bool:
    return all(row[check] == "ok" for check in CHECKS)


def table(rows: list[Row]) -> str:
    """Markdown, as in docs/start.md."""
    header = ("torch", "Python", *CHECKS)
    lines = [header, ("---",) * len(header)]
    lines += [(row["torch"] or row["version"], row["python"] or "-", *(row[check] for check in CHECKS)) for row in rows]
    return "\n".join("| " + " | ".join(x.replace("\n", " ")[:60] for x in line) + " |" for line in lines)


def order(row: Row) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", row["version"])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="try_torches.py", description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of torch, such as 2.10.0")
    parser.add_argument("--wheel", type=Path, required=True, help="of cce_ext, by packaging/build_wheels.sh")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "torch_versions.json")
    parser.add_argument("--add", action="store_true", help="keep the rows in --out of versions that are not tried now")
    parser.add_argument("--work", type=Path, help="folder for environments and logs (default: a temporary one)")
    args = parser.parse_args()
    for version in args.versions:
        if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", version):
            parser.error(f"VERSION must be like 2.10.0, but is {version!r}")
    if not args.wheel.is_file() or args.wheel.suffix != ".whl":
        parser.error(f"--wheel: {args.wheel} is no wheel")
    if args.out.suffix != ".json":
        parser.error(f"--out: expected a .json file, got {args.out}")
    wheel, work = args.wheel.resolve(), args.work or Path(tempfile.mkdtemp(prefix="torches-"))
    work.mkdir(parents=True, exist_ok=True)

    kept: list[Row] = []
    if args.add and args.out.exists():
        old = json.loads(args.out.read_text())
        if files.check(old) != "torch":
            parser.error(f"--out: {args.out} is a results file of something else")
        kept = [row for row in old["rows"] if row["version"] not in args.versions]
    # One machine, commit and wheel for each run; --add brings rows of several together, so that each row has its own.
    machine = origin.machine("cpu", "", origin.git_commit())
    command = " ".join(["python", "packaging/try_torches.py", *sys.argv[1:]])
    source = {
        "wheel": wheel.name,
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        **{name: machine[name] for name in ("device", "commit", "date")},
        "command": command,
    }

    rows: list[Row] = []
    with tqdm(total=len(args.versions) * len(STAGES), unit="stage") as bar:
        for i, version in enumerate(args.versions):
            bar.set_description(f"torch {version}: {STAGES[0]}")

            def tick(stage: str, version: str = version) -> None:
                following = STAGES[STAGES.index(stage) + 1 :]
                bar.set_description(f"torch {version}: {following[0] if following else 'done'}")
                bar.update()

            free = shutil.disk_usage(work).free / 2**30
            if free < GIGABYTES:
                sys.exit(
                    f"torch {version} may need {GIGABYTES} GB in {work}, which has {free:.0f}: give another --work"
                )
            rows.append(try_version(version, wheel, args.python, work, tick) | source)
            bar.update((i + 1) * len(STAGES) - bar.n)
            result = sorted(kept + rows, key=order)
            meta = {**machine, "torch": ", ".join(row["torch"] or row["version"] for row in result), "command": command}
            files.save(args.out, meta, result)
            if not passed(rows[-1]):
                tqdm.write(f"torch {version}: not all right, see {work / f'torch-{version}.log'}")
    print(table(result))
    print(f"saved {args.out}")
    if all(passed(row) for row in rows):
        if args.work is None:
            shutil.rmtree(work)
    else:
        sys.exit(1)


if __name__ == "__main__":
    main()
