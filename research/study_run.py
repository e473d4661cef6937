"""The runs of the study: which loss, one training, and the file that remembers what is done."""

import contextlib
import copy
import functools
import gc
import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import Decoder
from study_data import IGNORED, Data, HeldOut, held_out, mask_prompts
from study_meter import Meter
from study_policy import POLICY, POLICY_SETTINGS, LogProbs, make_logprobs, train_policy
from study_problem import ProblemFile
from text import batches
from torch import Tensor
from tqdm import tqdm
from training import (
    autocast,
    dense_logits,
    held_out_loss,
    learning_rate,
    make_optimizer,
    optimizer_step,
    provenance,
    window_losses,
    write_json,
)

from cce_ext import LinearCrossEntropy

PHASES = ("pretrain", "small_batch", "finetune")  # those that are run where none is named
ALL_PHASES = (*PHASES, POLICY)
SETTINGS: dict[str, int | float] = {
    "layers": 12,
    "width": 512,
    "heads": 8,
    "context": 512,
    "eval_tokens": 16384,
    "final_eval_tokens": 131072,
    # batch: sequences a step; lr: the schedule's peak
    "pretrain.batch": 32,
    "pretrain.steps": 400,
    "pretrain.lr": 2e-3,
    "small_batch.batch": 4,
    "small_batch.steps": 600,
    "small_batch.lr": 1e-3,
    "finetune.batch": 4,
    "finetune.steps": 300,
    "finetune.lr": 1e-4,
    **POLICY_SETTINGS,
}
# Those that are not whole numbers.
REAL_SETTINGS = {name for name, value in SETTINGS.items() if isinstance(value, float)}
SCANNED = "cce_fp8"  # impl "cce" with scan="fp8"
EVALUATIONS = 10  # of a run
WARMUP_STEPS = 5  # not counted in tokens a second
CHECKPOINT = ("pretrain", "cce_exact", 0)  # the run whose model is fine-tuned

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden [n, context, width], weight [vocab, width], labels


def baseline_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = dense_logits(hidden[:, :-1].flatten(0, 1), weight, None)
    return F.cross_entropy(logits, labels[:, 1:].flatten())


def apple_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Its kernels are for 16 bits and its release on PyPI does not look at autocast.
    e, c = hidden.bfloat16(), weight.bfloat16()
    return linear_cross_entropy(e, c, labels, shift=True, impl="cce")


def options_of(impl: str) -> dict[str, Any]:
    """Of the functions of cce_ext. Raises ValueError for an eps that is no number."""
    name, at, eps = impl.partition("@")
    options: dict[str, Any] = {"impl": name} if name != SCANNED else {"impl": "cce", "scan": "fp8"}
    if at:
        base, power, exponent = eps.partition("^")
        options["filter_eps"] = float(base) ** float(exponent) if power else float(base)
    return options


def make_loss(impl: str) -> Loss:
    """Raises ValueError for a name that stands for none."""
    if impl in ("baseline", "apple"):
        return baseline_loss if impl == "baseline" else apple_loss
    return LinearCrossEntropy(shift=1, **options_of(impl))


def logprobs_of(impl: str) -> LogProbs:
    options = {"impl": None} if impl == "baseline" else options_of(impl)
    return make_logprobs(options.pop("impl"), options)


def why_not(impl: str, device: str, dtype: str) -> str | None:
    """Why it cannot run here, or None."""
    if impl.partition("@")[0] == SCANNED:
        hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
        return None if hopper and dtype == "bfloat16" else "its 8-bit scan takes a Hopper GPU and bfloat16"
    if impl != "apple":
        return None
    if device != "cuda":
        return "its kernels are for CUDA"
    try:
        import cut_cross_entropy  # noqa: F401
    except ImportError as error:
        return f"cannot import cut_cross_entropy ({error}): pip install cut-cross-entropy"
    return None


def why_no_policy(impl: str) -> str | None:
    """Why it has no log-probabilities and entropies to train, or None."""
    has = impl != "apple" and impl.partition("@")[0] != SCANNED
    return None if has else "it has no log-probabilities with entropies"


@functools.lru_cache(maxsize=1)  # drawing 100 M weights takes seconds, and the runs of one seed come one after another
def initial_model(vocab: int, width: int, layers: int, heads: int, context: int, seed: int) -> Decoder:
    return Decoder(vocab, width, layers, heads, context, tie=True, seed=seed)


@dataclass
class Study:
    """Runs, and the file they are kept in. open() comes before run().

    problem: where to save what the loss of one of the runs is given in the end, if anywhere.
    """

    data: Data
    file: Path
    settings: dict[str, Any]
    device: str
    dtype: str
    compiled: bool
    problem: ProblemFile | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(file: Path) -> dict[str, Any]:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            if result.get("kind") == "study":
                return result
        except (OSError, ValueError) as error:
            sys.exit(f"error: cannot read {file}: {error}")
        sys.exit(f"error: {file} is no results file of this study")

    @property
    def config(self) -> dict[str, Any]:
        """All that the figures depend on but the machine and the code."""
        return {**self.settings, "dtype": self.dtype, "compile": self.compiled, "data": self.data.meta}

    def open(self, command: str, commit: str | None, phases: Sequence[str]) -> None:
        """Go on with the file if there is one. Ends the program where it is of other settings or text."""
        context = self.settings["context"]
        if self.settings["width"] % (2 * self.settings["heads"]):
            sys.exit(
                f"error: width {self.settings['width']} must be a multiple of twice heads {self.settings['heads']}"
            )
        for part, tokens in vars(self.data).items():
            if part != "meta" and len(tokens) < context:
                sys.exit(f"error: the {part} text has {len(tokens)} tokens, fewer than a context of {context}")
        sampled = self.settings["policy.prompt"] + self.settings["policy.completion"]
        if POLICY in phases and sampled > context:
            sys.exit(
                f"error: policy.prompt and policy.completion are {sampled} tokens, more than a context of {context}"
            )
        self.result = {"kind": "study", "config": self.config, "sessions": [], "runs": []}
        if self.file.exists():
            self.result = self.read(self.file)
            differing = [k for k, v in self.config.items() if self.result["config"].get(k) != v]
            if differing:
                sys.exit(
                    f"error: {self.file} was made with other settings ({', '.join(differing)}): name another --out"
                )
        session = {"command": command, **provenance(self.device, commit), "left_out": {}}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            session["versions"]["cut_cross_entropy"] = importlib.metadata.version("cut-cross-entropy")
        self.result["sessions"].append(session)

    def run(self, phases: Sequence[str], impls: Sequence[str], seeds: Sequence[int], budget: float | None) -> int:
        """Run what is not in the file; gives the exit status."""
        started = time.perf_counter()
        session = self.result["sessions"][-1]
        session["left_out"] = {impl: why for impl in impls if (why := why_not(impl, self.device, self.dtype))}
        no_policy = {impl: why for impl in impls if POLICY in phases and (why := why_no_policy(impl))}
        session["left_out"] |= {f"{POLICY} {impl}": why for impl, why in no_policy.items()}
        for impl, why in session["left_out"].items():
            print(f"left out: {impl}: {why}", file=sys.stderr)
        done = self.done()
        # The seed comes first: where time ends, everything was run with one before anything with two.
        wanted = [
            (p, i, s) for s in seeds for p in phases for i in impls if not {i, f"{p} {i}"} & set(session["left_out"])
        ]
        wanted = [key for key in dict.fromkeys(wanted) if key not in done]
        status = 0
        for n, (phase, impl, seed) in enumerate(wanted):
            if budget and time.perf_counter() - started + self.expected_seconds(phase, impl) > budget:
                print(f"{len(wanted) - n} of {len(wanted)} runs do not fit in {budget:g} s; run the same command again")
                break
            try:
                figures = self.train(phase, impl, seed, f"{n + 1}/{len(wanted)} {phase} {impl} {seed}")
            except Exception:  # whatever it is, the others are worth their time
                traceback.print_exc()
                print(f"error: {phase} {impl} seed {seed} failed and is left out", file=sys.stderr)
                status = 1
                continue
            session_number = len(self.result["sessions"]) - 1
            self.result["runs"].append(
                {"phase": phase, "impl": impl, "seed": seed, "session": session_number, **figures}
            )
            write_json(self.result, self.file)
        return status

    def done(self) -> set[tuple[str, str, int]]:
        """Phase, impl and seed of the runs that the file holds."""
        return {(r["phase"], r["impl"], r["seed"]) for r in self.result["runs"]}

    def expected_seconds(self, phase: str, impl: str) -> float:
        """As the run's twin of another seed took, else as the longest of the phase; 0 where there is none."""
        runs = [r for r in self.result["runs"] if r["phase"] == phase]
        return max((r["seconds"] for r in [r for r in runs if r["impl"] == impl] or runs), default=0.0)

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights to fine-tune. They are beside the file; where they are not, or are others, they are trained."""
        path = self.file.with_suffix(".pt")
        saved = torch.load(path, map_location="cpu") if path.exists() else {}
        if saved.get("config") != self.config:
            print("training the model to fine-tune (in no figure)", file=sys.stderr)
            self.train(*CHECKPOINT, "model to fine-tune")
            saved = torch.load(path, map_location="cpu")
        return saved["model"]

    def make_model(self, phase: str, seed: int) -> Decoder:
        s = self.settings
        model = copy.deepcopy(
            initial_model(self.data.meta["vocab"], s["width"], s["layers"], s["heads"], s["context"], seed)
        )
        if phase in ("finetune", POLICY):
            model.load_state_dict(self.checkpoint())
        if self.compiled and phase != POLICY:  # whose sampler has every length
            for block in model.blocks:
                block.compile(dynamic=False)
        return model.to(self.device)

    def train(self, phase: str, impl: str, seed: int, title: str) -> dict[str, Any]:
        """One run; gives its curves and figures."""
        if phase == POLICY:
            return train_policy(self, logprobs_of(impl), seed, title)
        started = time.perf_counter()
        model = self.make_model(phase, seed)
        self.free_memory()
        batch, steps, lr = (self.settings[f"{phase}.{name}"] for name in ("batch", "steps", "lr"))
        context, masked = self.settings["context"], phase == "finetune"
        every = max(1, steps // EVALUATIONS)
        stream = batches(self.data.finetune if masked else self.data.pretrain, batch, context, seed)
        prompts = torch.Generator().manual_seed(seed)
        small, large = (
            held_out(self.data, context, self.settings[f"{name}eval_tokens"], masked) for name in ("", "final_")
        )
        optimizer = make_optimizer(model, lr)
        loss_of = make_loss(impl)
        torch.manual_seed(seed)  # of the sampling

        losses: list[Tensor] = []
        curve = {0: self.evaluate(model, small, batch)} if masked else {}
        meter = Meter(self.device)
        meter.start()
        bar = tqdm(range(1, steps + 1), desc=title, unit="step")
        for step in bar:
            tokens = next(stream)
            labels = mask_prompts(tokens, prompts) if masked else tokens
            with autocast(self.device, self.dtype):
                hidden = model(self.to_device(tokens))
                loss = loss_of(hidden, model.classifier.weight, self.to_device(labels))
            loss.backward()
            optimizer_step(model, optimizer, learning_rate(step, steps, lr))
            losses.append(loss.detach())  # on the device: to ask for its value would wait for the step
            del hidden, loss
            meter.pending += 1
            if step == WARMUP_STEPS:
                meter.stop(counts=False)
                meter.start()
            if step % every == 0 or step == steps:
                meter.stop(counts=step > WARMUP_STEPS)
                if not losses[-1].isfinite():
                    raise ValueError(f"the loss is {losses[-1].item()} at step {step}")
                curve[step] = self.evaluate(model, small, batch)
                bar.set_postfix({"loss": f"{losses[-1].item():.3f}", "held-out": f"{curve[step]:.3f}"})
                meter.start()
        sums = window_losses(model, large.windows, large.labels, batch, self.device, self.dtype)
        counts = (large.labels[:, 1:] != IGNORED).sum(1)
        if (phase, impl, seed) == CHECKPOINT:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"config": self.config, "model": model.state_dict()}, self.file.with_suffix(".pt"))
        if self.problem is not None and self.problem.run == (phase, impl, seed):
            self.save_problem(model, batch, self.problem)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_loss": [round(x, 5) for x in torch.stack(losses).tolist()],
            "held_out_step": list(curve),
            "held_out_loss": list(curve.values()),
            "final_held_out_loss": sums.sum().item() / int(counts.sum()),
            # Of each window, in the text's order: what a difference's standard error is made of.
            "final_window_loss": [round(x, 4) for x in sums.tolist()],
            "final_window_tokens": counts.tolist(),
            "tokens_per_second": batch * context * meter.steps / meter.seconds if meter.steps else None,
            "peak_memory_bytes": meter.peak or None,
            "seconds": time.perf_counter() - started,
        }

    def save_problem(self, model: Decoder, batch: int, problem: ProblemFile) -> None:
        phase, impl, seed = problem.run
        context = self.settings["context"]
        part = held_out(self.data, context, problem.held_out_tokens(context), phase == "finetune")
        session = {key: self.result["sessions"][-1][key] for key in ("device", "commit", "versions")}
        origin = {"phase": phase, "impl": impl, "seed": seed, "config": self.config, **session}
        tokens = len(problem.save(model, part, batch, self.device, self.dtype, origin)["e"])
        fewer = "" if tokens == problem.tokens else ", all that the held-out text has"
        print(f"saved the loss's inputs on {tokens:,} held-out tokens{fewer}: {problem.file}")

    def free_memory(self) -> None:
        """That of the run before, which must not count in this one's."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def evaluate(self, model: Decoder, part: HeldOut, batch: int) -> float:
        return held_out_loss(model, part.windows, part.labels, batch, self.device, self.dtype)

    def to_device(self, tokens: Tensor) -> Tensor:
        # From pinned memory, or the copy would wait for the steps before it.
        return tokens.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tokens
