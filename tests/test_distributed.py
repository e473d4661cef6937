"""The benchmark of the distributed loss. The loss itself is tested in tests/ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

pytest.importorskip("tqdm", reason="the benchmark needs tqdm")

from bench.report import files
from bench.studies import distributed

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch has no gloo"
)


def torchrun(ranks: int, *arguments: str) -> str:
    """What `python arguments` prints on so many ranks without a GPU, a thread each."""
    folders = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        },
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
def test_benchmark(tmp_path, monkeypatch, capsys):
    file = tmp_path / "distributed.json"
    arguments = ["--shape", "64,64,300", "--repeats", "2", "--warmup", "1", "--commit", "abc", "--out", str(file)]
    printed = torchrun(2, "-m", "bench.studies.distributed", *arguments)
    assert printed.count("one_rank") == 1 and "% communication" in printed
    result = json.loads(file.read_text())
    assert files.check(result) == "distributed"
    assert result["meta"]["command"].startswith(
        "torchrun --nproc-per-node 2 -m bench.studies.distributed --shape 64,64,300"
    )
    assert {(r["method"], r["kind"]) for r in result["rows"]} >= {("vocab_parallel", "loss-fw"), ("latency", "loss-bw")}

    monkeypatch.setattr(sys, "argv", ["bench.studies.distributed", "predict", str(file), "--network", "50"])
    distributed.main()
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("64,64,300: ") and len(table) == 2 + 2 * 4


def made_up(fixed: float, row: float, latency: float, bandwidth: float, n: int, d: int, v: int, ranks: int) -> list:
    """Rows that the prediction's formulas would give."""
    gather, reduce = latency, distributed.all_reduce_bytes(n, d, ranks) / bandwidth
    forward_backward = {
        "one_rank": (0.0, fixed + row * v),
        "vocab_parallel": (gather, fixed + row * v / ranks + reduce),
        "collectives": (gather, reduce),
        "latency": (latency, 2 * latency),
    }
    shape = {"shape": "made up", "n": n, "d": d, "v": v, "ranks": ranks}
    return [
        {**shape, "method": name, "kind": kind, "runtime_ms": ms}
        for name, (forward, backward) in forward_backward.items()
        for kind, ms in (("loss-fw", forward), ("loss-bw", backward), ("loss-fw-bw", forward + backward))
    ]


def test_prediction():
    rows = made_up(fixed=2.0, row=1e-4, latency=0.01, bandwidth=1e8, n=1000, d=100, v=100000, ranks=2)
    model = distributed.Model.fit(rows)
    assert (model.fixed, model.row, model.bandwidth) == pytest.approx((2.0, 1e-4, 1e8))
    p = model.predict(200000, 8, 1e8)
    assert (p["one"], p["compute"]) == pytest.approx((22.0, 4.5))
    # 7 ranks' 8 bytes a token; 7/8 of 2 * 2 bytes a number of e's gradient; three steps of latency.
    assert p["gather"] == pytest.approx(0.03 + 7 * 8 * 1000 / 1e8)
    assert p["reduce"] == pytest.approx(0.06 + 3.5 * 1000 * 100 / 1e8)
    assert p["total"] == pytest.approx(p["compute"] + p["gather"] + p["reduce"])
    assert p["share"] == pytest.approx(1 - p["compute"] / p["total"])
    assert model.predict(200000, 8, 1e7)["reduce"] > p["reduce"]


@pytest.mark.parametrize("name", ["distributed_h200.json", "distributed_4_h200.json"])
def test_the_memory_is_what_was_measured(name):
    """To 1 %, but for c and e, which were there before."""
    rows = json.loads((TESTS.parent / "bench/results" / name).read_text())["rows"]
    measured = [r for r in rows if r["kind"] == "loss-fw-bw" and r["op_mem_mb"] is not None]
    assert len(measured) == 4
    for row in measured:
        ranks = row["ranks"] if row["method"] == "vocab_parallel" else 1
        shard = row["v"] // ranks
        given = 2 * row["d"] * (shard + row["n"])
        memory = distributed.memory_bytes(row["n"], row["d"], shard, ranks) - given
        assert memory / 2**20 == pytest.approx(row["op_mem_mb"], rel=0.01)


def test_mistakes_of_the_benchmark(monkeypatch, capsys, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((TESTS.parent / "bench/results/overhead_cpu.json").read_text())
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for arguments, message in (
        (["--shape", "64,64,300"], "run it by torchrun"),
        (["predict", str(other)], "not a results file of bench.studies.distributed"),
    ):
        monkeypatch.setattr(sys, "argv", ["bench.studies.distributed", *arguments])
        with pytest.raises(SystemExit):
            distributed.main()
        assert message in capsys.readouterr().err
