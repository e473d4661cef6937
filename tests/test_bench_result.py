"""`python -m bench result`: the picture for readers, docs/result.png."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import bench.__main__ as cli

RESULTS = Path(__file__).parents[1] / "bench" / "results"
FILE = RESULTS / "bench_h200.json"
# As in bench/README.md.
METHODS = ("mm", "cce", "cce_fp8", "cce_exact", "baseline", "compiled_baseline", "apple_cce", "liger")


def test_labels(tmp_path, monkeypatch):
    """Each stands inside its panel, on no point and on no other label."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: drawn.append(self))
    out = tmp_path / "result.png"
    assert cli.main(["result", str(FILE), "--shape", "gemma2", "llama3", "--methods", *METHODS, "--out", str(out)]) == 0
    (figure,) = drawn
    assert "NVIDIA H200" in figure.get_suptitle()
    assert "bench_h200.json" in figure.get_supxlabel()
    FigureCanvasAgg(figure).draw()
    texts = [[x for x in axes.texts if "products" not in x.get_text()] for axes in figure.axes]
    assert [len(x) for x in texts] == [7, 7]
    assert {x.get_text() for x in texts[1]} >= {"cce: 0.015, 0.012", "PyTorch: 0.011, 0.013", "Liger: 0.011, 0.015"}
    for axes, labels in zip(figure.axes, texts, strict=True):
        assert len(axes.lines) == 1  # the products
        boxes = [label.get_window_extent() for label in labels]
        points = [axes.transData.transform(dots.get_offsets()[0]) for dots in axes.collections]
        frame = axes.get_window_extent()
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert not any(box.contains(*at) for at in points)
            assert frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)


def test_whatever_is_in_a_file(tmp_path):
    """All of it, also where labels find no room, or have no errors to show."""
    out = tmp_path / "all.png"
    assert cli.main(["result", str(FILE), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["result", str(RESULTS / "bench_h200_tokens.json"), "--out", str(out)]) == 0


def test_mistakes(tmp_path, capsys):
    result = json.loads((RESULTS / "bench_h200_v0.1.json").read_text())  # which has rows that were not
    unmeasured = tmp_path / "unmeasured.json"
    result["rows"] = [row for row in result["rows"] if row["runtime_ms"] is None]
    unmeasured.write_text(json.dumps(result))
    for args, message in (
        ((str(FILE), "--shape", "bert"), "has no shape bert, but 8192,1024,131072, gemma2, gpt2, llama3"),
        ((str(FILE), "--methods", "cce", "magic"), "has no method magic"),
        ((str(FILE), "--out", "a.svg"), "expected a .png file, got 'a.svg'"),
        ((str(unmeasured),), "there is nothing to draw"),
        ((str(tmp_path / "none.json"),), "none.json"),
        ((str(RESULTS / "portable_cpu.json"),), "a results file of another benchmark (portable)"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["result", *args])
        assert message in capsys.readouterr().err


def test_the_picture_of_the_idea():
    """docs/idea.svg is well-formed, has its text as text, is for light and for dark, and says what the file says."""
    text = (RESULTS.parents[1] / "docs" / "idea.svg").read_text(encoding="utf-8")
    svg = ElementTree.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    texts = [x.text for x in svg.iter("{http://www.w3.org/2000/svg}text")]
    rows = json.loads((RESULTS / "bench_h200_eps.json").read_text())["rows"]
    gemma2 = {(r["method"], r["kind"]): r for r in rows if r["shape"] == "gemma2"}
    dense = f"{gemma2['baseline', 'loss-bw']['runtime_ms']:.1f} ms"
    ours = f"{gemma2['cce', 'loss-bw']['runtime_ms']:.1f} ms"
    gigabytes = f"{gemma2['baseline', 'loss-fw-bw']['op_mem_mb'] / 1000:.0f} GB"
    assert ours in texts and f"{dense}, with a peak of {gigabytes}" in texts
    widths = [float(x) for x in re.findall(r'<rect class="(?:drawn|dense)" x="92" y="\d+" width="(\d+)"', text)]
    assert widths[0] / widths[1] == pytest.approx(float(ours.split()[0]) / float(dense.split()[0]), rel=0.03)
