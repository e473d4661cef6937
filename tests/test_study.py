"""research/study.py from text to plot, at tiny settings."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders

ROOT = Path(__file__).parents[1]
DOCUMENTS = 60
TINY = (
    *("layers=1", "width=16", "heads=2", "context=32", "eval_tokens=128", "final_eval_tokens=256"),
    *("pretrain.batch=4", "pretrain.steps=12", "small_batch.batch=2", "small_batch.steps=7"),
    *("finetune.batch=2", "finetune.steps=6"),
    *("policy.prompts=4", "policy.group=4", "policy.prompt=8", "policy.completion=8", "policy.steps=20"),
    *("policy.lr=0.1", "policy.eval_batches=2"),
)


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "research")
        import study

        yield study


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents, and of what is left out of them."""
    folder = tmp_path_factory.mktemp("study") / "text"
    (folder / "inside").mkdir(parents=True)
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    size = len(source) // DOCUMENTS
    for i in range(DOCUMENTS):
        (folder / "inside" / f"{i}.md").write_text(source[i * size : (i + 1) * size], encoding="utf-8")
    (folder / "tests").mkdir()
    (folder / "tests" / "skipped.py").write_text("skipped")
    (folder / "table.bin").write_text("skipped")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture(scope="module")
def data(study: ModuleType, text: Path) -> Path:
    folder = text.parent / "data"
    command = ["prepare", "--text", str(text), "--vocab", "700", "--note", "ours", "--out", str(folder)]
    assert study.main(command) == 0
    return folder


def run(study: ModuleType, data: Path, file: Path, *args: str) -> dict:
    command = ["run", "--data", str(data), "--out", str(file), "--device", "cpu", *args, "--set", *TINY]
    assert study.main(command) == 0
    return json.loads(file.read_text())


def keys(result: dict) -> list[tuple[str, str, int]]:
    return [(r["phase"], r["impl"], r["seed"]) for r in result["runs"]]


def test_help() -> None:
    """As a program, from the root of a clone."""
    command = [sys.executable, "research/study.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "{prepare,run,plot,merge}" in done.stdout


def test_prepare(study: ModuleType, text: Path, data: Path) -> None:
    meta = json.loads((data / "meta.json").read_text())
    assert meta["vocab"] == 700 and meta["note"] == "ours"
    source = meta["sources"]["text"]
    assert source["files"] == DOCUMENTS and source["not_utf8"] == 1
    from text import END_OF_DOCUMENT

    loaded = study.load(data)
    assert len(loaded.pretrain) + len(loaded.finetune) == meta["train_tokens"]
    assert len(loaded.held_out) == meta["held_out_tokens"]

    # What was encoded can be read again, and no document is in both parts.
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    tokenizer.decoder = decoders.ByteLevel()
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    train = np.concatenate([loaded.pretrain, loaded.finetune])
    parts = [
        [tokenizer.decode(ids[ids != end]) for ids in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]]
        for tokens in (train, loaded.held_out)
    ]
    written = sorted(path.read_text(encoding="utf-8") for path in text.glob("inside/*"))
    assert sorted(parts[0] + parts[1]) == written and parts[0] and parts[1]

    again = text.parent / "again"
    command = ["prepare", "--text", str(text), "--vocab", "700", "--out", str(again)]
    assert study.main([*command, "--max-megabytes", "0.05"]) == 0
    less = json.loads((again / "meta.json").read_text())["sources"]["text"]
    assert 45_000 < less["bytes"] <= 50_000 and less["files"] < DOCUMENTS
    np.save(again / "train.npy", loaded.pretrain)
    with pytest.raises(SystemExit, match="train.npy is not the one"):
        study.load(again)


def test_run_resume_plot(
    study: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.json"
    first = run(study, data, file, "--impls", "cce_exact", "apple", "--seeds", "0", "--phases", "pretrain")
    assert "left out: apple" in capsys.readouterr().err
    assert keys(first) == [("pretrain", "cce_exact", 0)]
    assert first["sessions"][0]["left_out"] == {"apple": "its kernels are for CUDA"}
    assert first["config"]["data"]["note"] == "ours"

    impls = ("cce_exact", "baseline", "cce@2^-1")
    result = run(study, data, file, "--impls", *impls, "--seeds", "0", "1", "--commit", "abc")
    wanted = [(p, i, s) for s in (0, 1) for p in study.PHASES for i in impls]
    assert keys(result) == wanted
    assert result["runs"][0] == first["runs"][0] and len(result["sessions"]) == 2
    assert {r["session"] for r in result["runs"][1:]} == {1} and result["sessions"][1]["commit"] == "abc"

    by_key = dict(zip(keys(result), result["runs"], strict=True))
    for phase, steps in (("pretrain", 12), ("small_batch", 7), ("finetune", 6)):
        exact, dense, sampled = (by_key[phase, impl, 0] for impl in impls)
        assert len(exact["train_loss"]) == steps and exact["held_out_step"][-1] == steps
        assert exact["tokens_per_second"] > 0
        # Same weights, same batches, same labels; the sampled gradient is another one from the second step on.
        assert exact["train_loss"] == pytest.approx(dense["train_loss"], abs=1e-3)
        assert exact["final_held_out_loss"] == pytest.approx(dense["final_held_out_loss"], abs=1e-3)
        assert sampled["train_loss"][0] == pytest.approx(exact["train_loss"][0], abs=1e-4)
        assert sampled["train_loss"] != exact["train_loss"]
        assert by_key[phase, "cce_exact", 1]["train_loss"] != pytest.approx(exact["train_loss"], abs=1e-3)
    # Fine-tuning begins where one pretraining ended, whatever the seed.
    begin = by_key["finetune", "baseline", 0]["held_out_loss"][0]
    assert begin == by_key["finetune", "cce_exact", 1]["held_out_loss"][0]
    from model import Decoder
    from study_data import held_out
    from training import held_out_loss

    model = Decoder(700, 16, 1, 2, 32, tie=True, seed=5)
    model.load_state_dict(torch.load(file.with_suffix(".pt"))["model"])
    part = held_out(study.load(data), 32, 128, masked=True)
    expected = held_out_loss(model, part.windows, part.labels, 2, "cpu", "float32")
    assert begin == pytest.approx(expected, rel=1e-5)
    part = held_out(study.load(data), 32, 256, masked=False)
    expected = held_out_loss(model, part.windows, part.labels, 4, "cpu", "float32")
    assert by_key["pretrain", "cce_exact", 0]["final_held_out_loss"] == pytest.approx(expected, rel=1e-5)

    # All is done: nothing is trained again. Without the checkpoint a fine-tuning trains the same one once more.
    monkeypatch.setattr(study.Study, "train", None)
    assert run(study, data, file, "--impls", *impls) == result
    monkeypatch.undo()
    file.with_suffix(".pt").unlink()
    result["runs"] = [r for r in result["runs"] if (r["phase"], r["impl"]) != ("finetune", "baseline")]
    file.write_text(json.dumps(result))
    repeated = run(study, data, file, "--impls", "baseline", "--seeds", "0", "--phases", "finetune")
    assert repeated["runs"][-1]["train_loss"] == pytest.approx(by_key["finetune", "baseline", 0]["train_loss"])

    study.main(["plot", str(file)])
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    from study_report import table

    assert file.with_suffix(".md").read_text() == table(json.loads(file.read_text()))
    for reference in ("cce_exact", "baseline"):
        row = next(line for line in table(result, reference).splitlines() if line.startswith("| `cce@2^-1`"))
        ours, theirs = ([by_key["pretrain", impl, seed] for seed in (0, 1)] for impl in ("cce@2^-1", reference))
        runs = [run["final_held_out_loss"] for run in ours]
        less = [x - run["final_held_out_loss"] for x, run in zip(runs, theirs, strict=True)]
        # Two seeds' standard error is half their distance. The held-out text has eight windows of 31 predictions.
        windows = np.mean(
            [np.subtract(a["final_window_loss"], b["final_window_loss"]) for a, b in zip(ours, theirs, strict=True)], 0
        )
        assert ours[0]["final_window_tokens"] == [31] * 8 and sum(windows) / 248 == pytest.approx(
            np.mean(less), abs=1e-5
        )
        assert (
            f"| {runs[0]:.4f}, {runs[1]:.4f} | {less[0]:+.4f}, {less[1]:+.4f} "
            f"| {np.mean(less):+.4f} ± {abs(less[0] - less[1]) / 2:.4f} "
            f"| {np.std(windows / 31, ddof=1) / 8**0.5:.4f} |"
        ) in row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_problem_of_a_run(
    study: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    """It is what the benchmark reads, and its loss is the held-out loss of the run."""
    from bench.problems import inputs

    file, problem = tmp_path / "study.json", tmp_path / "in" / "problem.pt"
    one = ("--impls", "cce", "--seeds", "1", "--dtype", dtype, "--save-problem", str(problem))
    result = run(study, data, file, *one, "--phases", "pretrain", "--problem-tokens", "248")
    p = inputs.saved(problem)
    assert p.e.shape == (248, 16) and p.c.shape == (700, 16) and p.e.dtype == p.c.dtype == torch.bfloat16
    assert "248 held-out tokens: " in capsys.readouterr().out
    # final_eval_tokens=256 are the same eight windows, of 31 predictions each.
    loss = torch.nn.functional.cross_entropy(p.e.float() @ p.c.float().T, p.targets).item()
    assert loss == pytest.approx(result["runs"][0]["final_held_out_loss"], abs=2e-3)
    assert p.origin is not None and p.origin["impl"] == "cce" and p.origin["seed"] == 1
    assert p.origin["config"] == result["config"] and p.origin["device"].startswith("CPU")

    # Part of a window, and not the rest of it either; more than the text has.
    second = tmp_path / "second.json"
    run(study, data, second, *one, "--phases", "pretrain", "--problem-tokens", "40")
    assert torch.load(problem)["e"].untyped_storage().nbytes() == 40 * 16 * 2
    third = tmp_path / "third.json"
    run(study, data, third, *one, "--phases", "pretrain")
    windows = len(study.load(data).held_out) // 32
    assert len(inputs.saved(problem).e) == 31 * windows < 8192
    assert f"{31 * windows:,} held-out tokens, all that the held-out text has" in capsys.readouterr().out

    # Of a fine-tuning, whose checkpoint is another run: prompts are masked.
    result = run(study, data, file, *one, "--phases", "finetune", "--problem-tokens", "248")
    assert capsys.readouterr().out.count("saved the loss's inputs") == 1
    p = inputs.saved(problem)
    assert p.origin is not None and p.origin["phase"] == "finetune"
    assert 8 * 7 <= (p.targets == -100).sum() <= 8 * 24
    loss = torch.nn.functional.cross_entropy(p.e.float() @ p.c.float().T, p.targets).item()
    assert loss == pytest.approx(result["runs"][1]["final_held_out_loss"], abs=2e-3)


def test_a_problem_that_cannot_be_saved(
    study: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, problem = tmp_path / "study.json", tmp_path / "problem.pt"
    command = ["run", "--data", str(data), "--out", str(file), "--device", "cpu", "--save-problem", str(problem)]
    with pytest.raises(SystemExit, match="2"):
        study.main([*command, "--impls", "cce", "--phases", "pretrain"])
    assert "of one run, not of 2: choose by" in capsys.readouterr().err
    one = ("--phases", "pretrain", "--seeds", "0", "--impls")
    assert study.main([*command, *one, "apple", "--set", *TINY]) == 1
    assert "the run was not made, nor" in capsys.readouterr().err and not problem.exists()
    monkeypatch.setattr(study.Study, "train", lambda *_: {"seconds": 0.0})
    run(study, data, file, *one, "cce")
    with pytest.raises(SystemExit, match="holds this run, which is not run again: name another --out"):
        study.main([*command, *one, "cce", "--set", *TINY])


def test_plot_at_the_end(study: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a machine without matplotlib trains all the same."""
    file = tmp_path / "study.json"
    one = ("--phases", "small_batch", "--seeds", "0", "--impls")
    run(study, data, file, *one, "cce_exact", "--plot")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    passes = 7 * 64 / len(study.load(data).pretrain)
    table = file.with_suffix(".md").read_text()
    assert f"small batches: 64 tokens a step, 7 steps: {passes:.2g} passes over the text" in table
    for name in ("study_report", "report", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="is not installed; in the root of the repository"):
        run(study, data, file, *one, "baseline", "--plot")
    assert keys(json.loads(file.read_text()))[1] == ("small_batch", "baseline", 0)


def test_each_phase_has_its_weights_and_labels(
    study: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import study_run
    from text import windows

    seen: list[tuple[float, torch.Tensor]] = []  # the classifier's sum and the labels of each step

    def make_loss(impl: str) -> Callable[..., torch.Tensor]:
        def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append((weight.sum().item(), labels))
            return study_run.baseline_loss(hidden, weight, labels)

        return loss

    monkeypatch.setattr(study_run, "make_loss", make_loss)
    run(study, data, tmp_path / "study.json", "--impls", "cce_exact", "--seeds", "0", "1")
    steps = (12, 7, 6)
    first = [seen[at][0] for at in np.cumsum([0, *steps, *steps])[:-1]]
    assert first[0] == first[1] != first[3] == first[4]  # both pretrainings of a seed begin with its weights
    assert first[2] == first[5] != first[0]  # fine-tuning with those that one of them has ended with
    texts = study.load(data)
    for phase, step_labels in enumerate(np.split(np.array(seen, dtype=object)[:, 1], np.cumsum([*steps, *steps])[:-1])):
        labels = torch.cat(list(step_labels))
        assert labels.shape == ((4, 2, 2)[phase % 3] * steps[phase % 3], 32)
        finetunes = phase % 3 == 2
        ends = windows(texts.finetune if finetunes else texts.pretrain, 32)[:, -8:].tolist()
        assert all(end in ends for end in labels[:, -8:].tolist())
        masked = (labels == -100).sum(1)
        assert masked.min() >= 8 and masked.max() <= 24 if finetunes else not masked.any()


def test_eps_of_an_impl(study: ModuleType) -> None:
    for impl, name, eps in (
        ("cce", "cce", "auto"),
        ("cce@2^-6", "cce", 2**-6),
        ("cce_threshold@0.01", "cce_threshold", 0.01),
        ("cce_fp8", "cce", "auto"),
        ("cce_fp8@2^-6", "cce", 2**-6),
    ):
        options = study.make_loss(impl).options
        assert options["impl"] == name and options["filter_eps"] == eps and options["shift"] == 1
        assert options["scan"] == ("fp8" if "fp8" in impl else None)


def test_budget_failure_and_interruption(
    study: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.json"
    figures = {"seconds": 60.0}

    def train(self, phase: str, impl: str, seed: int, title: str) -> dict:
        if impl == "cce_threshold":
            raise RuntimeError("of this impl")
        if impl == "baseline":
            raise KeyboardInterrupt
        return figures

    monkeypatch.setattr(study.Study, "train", train)
    common = ("--phases", "pretrain", "--seeds", "0")
    result = run(study, data, file, *common, "--impls", "cce", "cce_exact", "--budget-seconds", "30")
    assert keys(result) == [("pretrain", "cce", 0)]
    assert "1 of 2 runs do not fit in 30 s" in capsys.readouterr().out

    command = ["run", "--data", str(data), "--out", str(file), "--device", "cpu", *common, "--set", *TINY, "--impls"]
    assert study.main([*command, "cce_threshold", "cce@0.1"]) == 1
    errors = capsys.readouterr().err
    assert "of this impl" in errors and "pretrain cce_threshold seed 0 failed" in errors
    with pytest.raises(KeyboardInterrupt):
        study.main([*command, "cce@0.2", "baseline", "cce_exact"])
    wanted = [("pretrain", impl, 0) for impl in ("cce", "cce@0.1", "cce@0.2")]
    assert keys(json.loads(file.read_text())) == wanted


def test_mask_prompts(study: ModuleType) -> None:
    from study_data import mask_prompts

    tokens = torch.arange(64 * 40).view(64, 40)
    labels = mask_prompts(tokens, torch.Generator().manual_seed(3))
    masked = labels == -100
    assert torch.equal(labels[~masked], tokens[~masked])
    lengths = masked.sum(1)
    assert torch.equal(masked, torch.arange(40) < lengths[:, None])  # a prompt, and nothing after it
    assert lengths.min() >= 10 and lengths.max() <= 30 and len(lengths.unique()) > 10
    assert torch.equal(labels, mask_prompts(tokens, torch.Generator().manual_seed(3)))
    assert not torch.equal(labels, mask_prompts(tokens, torch.Generator().manual_seed(4)))


def test_held_out_loss_leaves_prompts_out(study: ModuleType) -> None:
    from model import Decoder
    from training import held_out_loss

    model = Decoder(50, 16, 1, 2, 8, tie=True, seed=0)
    tokens = torch.randint(0, 50, (5, 8), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        logits = model(tokens)[:, 3:-1] @ model.classifier.weight.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 4:].flatten())
    assert held_out_loss(model, tokens, labels, 2, "cpu", "float32") == pytest.approx(expected.item(), rel=1e-5)


def test_mistakes(
    study: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.json"
    command = ["run", "--data", str(data), "--out", str(file), "--device", "cpu"]
    for args, message in (
        ((*command, "--impls", "magic"), "magic: impl: expected one of"),
        ((*command, "--impls", "cce@2^-x"), "cce@2^-x"),
        ((*command, "--impls", "cce@2^99999"), "cce@2^99999"),
        ((*command, "--impls", "cce@0.7"), "must be in (0, 0.5]"),
        ((*command, "--set", "depth=3"), "no setting 'depth'; there are layers"),
        ((*command, "--set", "layers=0"), "must be 1 or more"),
        ((*command, "--set", "policy.entropy=0"), "must be above 0"),
        ((*command, "--set", "pretrain.lr=-1"), "must be above 0"),
        (("prepare", "--text", "x", "--vocab", "5", "--out", "y"), "must be 257 or more"),
    ):
        with pytest.raises(SystemExit, match="2"):
            study.main(list(args))
        assert message in capsys.readouterr().err

    def fails(message: str, *args: str) -> None:
        with pytest.raises(SystemExit, match=message):
            study.main(list(args))

    fails("width 20 must be a multiple", *command, "--set", "width=20", "heads=4")
    fails("fewer than a context of 1000000", *command, "--set", "context=1000000")
    fails("are 64 tokens, more than a context of 32", *command, "--phases", "policy", "--set", "context=32")
    missing = str(tmp_path / "missing")
    fails("missing.*study.py prepare", "run", "--data", missing, "--out", str(file))
    fails("no such file or folder", "prepare", "--text", missing, "--out", str(file))
    fails("cannot read", "plot", missing)
    (tmp_path / "other.json").write_text("{}")
    fails("no results file", "plot", str(tmp_path / "other.json"))
    (tmp_path / "one.txt").write_text("one two")
    fails("too few files", "prepare", "--text", str(tmp_path / "one.txt"), "--out", str(tmp_path))

    monkeypatch.setattr(study.Study, "train", lambda *_: {"seconds": 0.0})
    run(study, data, file, "--phases", "pretrain", "--impls", "cce", "--seeds", "0")
    fails(r"other settings \(layers, ", *command)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    from study_run import why_not

    assert "pip install cut-cross-entropy" in str(why_not("apple", "cuda", "bfloat16"))


def test_the_error_of_a_difference(study: ModuleType) -> None:
    """Of held-out text whose windows count differently: what other texts of this kind would give."""
    from study_paired import BLOCKS, error_of_mean, error_of_text

    rng = np.random.default_rng(0)
    counts = rng.integers(1, 100, 4 * BLOCKS)

    def run(offset: float) -> tuple[list[dict], list[dict]]:
        """Of two seeds, whose differences in a stretch of four windows are one number and a mean of `offset`."""
        blocks = np.repeat(rng.normal(size=BLOCKS), 4)
        shared = rng.normal(5, 1, len(counts)) * counts
        runs = [
            {"seed": s, "final_window_loss": shared + more * counts, "final_window_tokens": counts}
            for s, more in ((0, 0.0), (1, 0.0), (0, offset + blocks), (1, offset + blocks))
        ]
        return runs[2:], runs[:2]

    means, errors = [], []
    for _ in range(400):
        ours, reference = run(3.0)
        errors.append(error_of_text(ours, reference))
        means.append((ours[0]["final_window_loss"] - reference[0]["final_window_loss"]).sum() / counts.sum())
    assert np.mean(means) == pytest.approx(3.0, abs=0.03)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)  # half the windows' own, of sixteen tokens or so

    assert error_of_text(*run(0.0)) and error_of_text([], []) is None
    ours, reference = run(0.0)
    del reference[0]["final_window_loss"]  # a file of before
    assert error_of_text(ours, reference) is None
    assert error_of_mean([1.0]) is None and error_of_mean([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)


def test_policy(study: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy learns the reward; dense torch's gradients and the exact ones give one policy."""
    from study_policy import advantages, rewards

    # Different multiples of four: 0, 4; none; 8 once.
    assert rewards(torch.tensor([[0, 4, 0, 1], [1, 2, 3, 5], [8, 8, 8, 8]])).tolist() == [0.5, 0.0, 0.25]
    assert advantages(torch.tensor([0.0, 1.0, 0.5, 0.5]), 2).tolist() == pytest.approx(
        [-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-3
    )

    file, second = tmp_path / "study.json", tmp_path / "second.json"
    common = ("--phases", "policy", "--seeds", "0", "1")
    result = run(study, data, file, *common, "--impls", "cce_exact", "cce@2^-1", "apple")
    assert "--out study.json" in result["sessions"][0]["command"] and str(tmp_path) not in json.dumps(result)
    assert result["sessions"][0]["left_out"]["policy apple"] == "it has no log-probabilities with entropies"
    file.with_suffix(".pt").rename(second.with_suffix(".pt"))
    dense = run(study, data, second, *common, "--impls", "baseline")
    of = {(r["impl"], r["seed"]): r for r in (*result["runs"], *dense["runs"])}
    for seed in (0, 1):
        exact = of["cce_exact", seed]
        assert of["baseline", seed]["reward"][:3] == exact["reward"][:3]  # until rounding turns a sample
        assert of["baseline", seed]["entropy"][:3] == pytest.approx(exact["entropy"][:3], abs=1e-3)
        assert of["cce@2^-1", seed]["reward"][0] == exact["reward"][0]
        assert of["cce@2^-1", seed]["entropy"][1] != exact["entropy"][1]
        assert len(exact["reward"]) == 20 and all(r["final_reward"] > r["reward"][0] + 0.1 for r in of.values())
    assert of["cce_exact", 0]["reward"] != of["cce_exact", 1]["reward"]

    both = tmp_path / "both.json"
    assert study.main(["merge", str(file), str(second), "--out", str(both)]) == 0
    merged = json.loads(both.read_text())
    assert [r["session"] for r in merged["runs"]] == [0] * 4 + [1] * 2 and len(merged["sessions"]) == 2
    study.main(["plot", str(both), "--reference", "baseline"])
    row = next(line for line in both.with_suffix(".md").read_text().splitlines() if line.startswith("| `cce_exact`"))
    less = [of["cce_exact", seed]["final_reward"] - of["baseline", seed]["final_reward"] for seed in (0, 1)]
    assert f"| {less[0]:+.4f}, {less[1]:+.4f} | {np.mean(less):+.4f} ± {abs(less[0] - less[1]) / 2:.4f} |" in row
    with pytest.raises(SystemExit, match="policy baseline 0 is in an earlier file as well"):
        study.main(["merge", str(second), str(second), "--out", str(both)])
    dense["config"]["layers"] = 7
    second.write_text(json.dumps(dense))
    with pytest.raises(SystemExit, match=r"other settings \(layers\) than"):
        study.main(["merge", str(file), str(second), "--out", str(both)])


def test_the_8_bit_scan_is_left_out_without_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from study_run import why_not

    said = "its 8-bit scan takes a Hopper GPU and bfloat16"
    assert why_not("cce_fp8", "cpu", "bfloat16") == why_not("cce_fp8@2^-6", "cpu", "float32") == said
    for capability, dtype, why in (((9, 0), "bfloat16", None), ((9, 0), "float32", said), ((8, 0), "bfloat16", said)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert why_not("cce_fp8", "cuda", dtype) == why
        assert why_not("cce", "cuda", dtype) is None
