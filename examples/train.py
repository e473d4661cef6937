"""Train a small decoder-only language model on real text, with the loss of your choice.

    python examples/train.py                       # cce_ext's default loss, on the sources of Python itself
    python examples/train.py --text book.txt --steps 500
    python examples/train.py --impl all            # every implementation from one seed: table, plot, JSON
    python examples/train.py --impl cce baseline   # or these two

The line to look for is in `training_loss`: the model's forward ends at the hidden states, and the loss takes
them together with the classifier's weight. All the rest is an ordinary training loop.

What is measured:
- held-out loss: nats a token on a fixed piece of text that is not trained on, from dense float32 logits
  whatever the loss that trains, so that the curves can be compared;
- tokens a second: of the training steps alone (forward, backward, optimizer), after the first 3, which
  compile and warm up;
- peak memory: on CUDA torch.cuda.max_memory_allocated; on the CPU the process's peak resident size, which
  includes Python, torch, inductor where it compiles, and the tokenizer's training if this run did that.
  A comparison prepares the text first and gives each implementation a process of its own.

Written to --out: {impl}.json, and by a comparison also comparison.json and comparison.png. Kept in --cache:
vocabulary and tokens. Ctrl-C ends the training and saves what there is.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any, Literal

try:
    import torch
    import torch.nn.functional as F
    from arguments import IMPLS, INTERRUPTED, SCAN_HELP, SCANS, at_least, check_scan, positive
    from model import Decoder
    from report import print_table, save_plot
    from text import MIN_VOCAB, Corpus, batches, load_corpus, spread_windows
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
        write_json,
    )

    from cce_ext import compute_z_loss, linear_cross_entropy
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; in the root of the repository: pip install ".[train]"')

WARMUP_STEPS = 3  # not counted in tokens a second


def training_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    impl: str,
    softcap: float | None,
    z_loss: float | None,
    scan: Literal["fp8"] | None = None,
) -> Tensor:
    """Mean loss of hidden [batch, context, width], each position's a prediction of the next token.

    weight: [vocab, width]; tokens: [batch, context]. A z-loss needs the log-sum-exp beside the loss.
    """
    if impl == "baseline":
        return baseline_loss(hidden, weight, tokens, softcap, z_loss)
    if z_loss is None:
        return linear_cross_entropy(hidden, weight, tokens, shift=1, softcap=softcap, impl=impl, scan=scan)
    loss, lse = linear_cross_entropy(
        hidden, weight, tokens, shift=1, softcap=softcap, impl=impl, scan=scan, return_lse=True
    )
    return loss + z_loss * compute_z_loss(lse, tokens, shift=1)


def baseline_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, softcap: float | None, z_loss: float | None
) -> Tensor:
    """The same without cce_ext: every token's logits in memory, and their gradient as well."""
    logits = dense_logits(hidden[:, :-1].flatten(0, 1), weight, softcap)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    return loss if z_loss is None else loss + z_loss * logits.logsumexp(-1).square().mean()


def train(args: argparse.Namespace, impl: str, corpus: Corpus) -> dict[str, Any]:
    """Train one model from scratch; gives its curves and figures, also when Ctrl-C ends it early."""
    # Initial weights and batches have generators of their own, which a loss that draws samples cannot reach.
    model = Decoder(corpus.vocab, args.width, args.layers, args.heads, args.context, args.tie, args.seed)
    model.to(args.device)
    stream = batches(corpus.train, args.batch, args.context, args.seed)
    torch.manual_seed(args.seed)
    held_out = spread_windows(corpus.held_out, args.context, args.eval_tokens)
    optimizer = make_optimizer(model, args.lr)

    train_losses: list[float] = []
    held_out_losses: dict[int, float] = {}  # by step
    step_seconds: list[float] = []
    interrupted = False
    started = time.perf_counter()
    try:
        bar = tqdm(range(1, args.steps + 1), desc=f"{impl:13}", unit="step")
        for step in bar:
            step_started = time.perf_counter()
            tokens = next(stream).to(args.device)
            with autocast(args.device, args.dtype):
                hidden = model(tokens)
                loss = training_loss(
                    hidden, model.classifier.weight, tokens, impl, args.softcap, args.z_loss, args.scan
                )
            loss.backward()
            optimizer_step(model, optimizer, learning_rate(step, args.steps, args.lr))
            train_losses.append(loss.item())  # waits for a GPU to finish the step: the clock may be read
            step_seconds.append(time.perf_counter() - step_started)

            if not math.isfinite(train_losses[-1]):
                sys.exit(f"error: {impl}: the loss is {train_losses[-1]} at step {step}; try a lower --lr")
            if step % args.eval_every == 0 or step == args.steps:
                held_out_losses[step] = held_out_loss(
                    model, held_out, held_out, args.batch, args.device, args.dtype, args.softcap
                )
            last = [f"{value:.3f}" for value in held_out_losses.values()][-1:] or ["-"]
            bar.set_postfix({"loss": f"{train_losses[-1]:.3f}", "held-out": last[0]})
    except KeyboardInterrupt:
        if not train_losses:
            raise
        interrupted = True

    counted = step_seconds[WARMUP_STEPS:]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": train_losses,
        "held_out_step": list(held_out_losses),
        "held_out_loss": list(held_out_losses.values()),
        "tokens_per_second": args.batch * args.context * len(counted) / sum(counted) if counted else None,
        "peak_memory_bytes": peak_memory(args.device),
        "seconds": time.perf_counter() - started,
        "interrupted": interrupted,
    }


def peak_memory(device: str) -> int | None:
    """Bytes; None on a system that does not tell its processes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage's figure is never below that of the parent process
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_one(args: argparse.Namespace, impl: str, corpus: Corpus) -> dict[str, Any]:
    """Train with one implementation and write {impl}.json."""
    not_settings = {"impl", "text", "out", "cache"}
    result = {
        "settings": {key: value for key, value in vars(args).items() if key not in not_settings},
        "text": [path.name for path in args.text] or "standard library",
        "train_tokens": len(corpus.train),
        "held_out_tokens": len(corpus.held_out),
        "vocabulary": corpus.vocab,
        "unigram_loss": corpus.unigram_loss(),
        **provenance(args.device),
        "command": "python " + " ".join(sys.argv),
        "runs": {impl: train(args, impl, corpus)},
    }
    write_json(result, args.out / f"{impl}.json")
    return result


def run_in_process(args: argparse.Namespace, impl: str, corpus: Corpus) -> None:
    if run_one(args, impl, corpus)["runs"][impl]["interrupted"]:
        sys.exit(INTERRUPTED)


def compare(args: argparse.Namespace, corpus: Corpus) -> int:
    """Train with each implementation in a process of its own; a table, plot and JSON. Gives the exit status."""
    spawn = multiprocessing.get_context("spawn")
    results = []
    status = 0
    for impl in args.impl:
        written = args.out / f"{impl}.json"
        written.unlink(missing_ok=True)
        process = spawn.Process(target=run_in_process, args=(args, impl, corpus))
        process.start()
        try:
            process.join()
        except KeyboardInterrupt:  # which the other process got as well: it is saving
            process.join()
            status = INTERRUPTED
        if written.exists():
            results.append(json.loads(written.read_text()))
        if INTERRUPTED in (status, process.exitcode):
            status = INTERRUPTED
            break
        if process.exitcode:
            print(f"error: {impl} failed with status {process.exitcode}", file=sys.stderr)
            status = 1
    if results:
        runs = {impl: run for result in results for impl, run in result["runs"].items()}
        together = {**results[0], "runs": runs}
        write_json(together, args.out / "comparison.json")
        save_plot(together, args.out / "comparison.png")
        print_table(runs)
        print(f"saved {args.out / 'comparison.json'} and {args.out / 'comparison.png'}")
    return status


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small decoder-only language model on real text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--impl", choices=(*IMPLS, "all"), nargs="+", default=["cce"], help="the loss; baseline: plain torch")
    add("--scan", choices=SCANS, help=SCAN_HELP)
    add("--text", type=Path, nargs="+", metavar="FILE", default=[], help="UTF-8 text to train on")
    add("--vocab", type=at_least(MIN_VOCAB), default=32768, help="vocabulary entries")
    add("--layers", type=at_least(1), default=4, help="transformer blocks")
    add("--width", type=at_least(2), default=128, help="hidden width")
    add("--heads", type=at_least(1), default=4, help="attention heads")
    # Untied reaches the lower loss at the default size (5.56 for 5.69 after 100 steps).
    add("--tie", action=argparse.BooleanOptionalAction, default=False, help="classifier = embedding")
    add("--context", type=at_least(2), default=256, help="tokens of a sequence")
    add("--batch", type=at_least(1), default=8, help="sequences a step")
    add("--steps", type=at_least(1), default=100, help="optimizer steps")
    add("--lr", type=positive, default=6e-3, help="peak learning rate")
    add("--softcap", type=positive, help="logits become softcap * tanh(logits / softcap)")
    add("--z-loss", type=positive, help="weight of the mean squared log-sum-exp in the loss")
    add("--seed", type=int, default=0, help="of initial weights, batches and sampling")
    add("--eval-every", type=at_least(1), default=20, help="steps between two held-out losses")
    add("--eval-tokens", type=at_least(1), default=8192, help="held-out tokens to measure on")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA")
    add("--out", type=Path, default=Path("runs/train"), help="folder for JSON and plot")
    add("--cache", type=Path, default=Path("runs/cache"), help="folder for vocabulary and tokens")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        parser.error(f"--width {args.width} must be a multiple of twice --heads {args.heads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA GPU")
    if "all" in args.impl:
        args.impl = IMPLS
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    check_scan(parser, args.scan, args.impl, args.device)
    return args


def main() -> int:
    args = parse_args()
    corpus = load_corpus(args.text, args.vocab, args.cache)
    print(
        f"{len(corpus.train):,} tokens to train on, {len(corpus.held_out):,} held out; "
        f"vocabulary {corpus.vocab:,}; loss from token frequencies alone {corpus.unigram_loss():.3f}"
    )
    if corpus.vocab < args.vocab:
        print(f"note: the text is too small to fill a vocabulary of {args.vocab:,}")
    for part, tokens in (("train", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) < args.context:
            sys.exit(f"error: the {part} text has {len(tokens)} tokens, fewer than --context {args.context}")
    if len(args.impl) > 1:
        return compare(args, corpus)
    impl = args.impl[0]
    runs = run_one(args, impl, corpus)["runs"]
    print_table(runs)
    print(f"saved {args.out / impl}.json")
    return INTERRUPTED if runs[impl]["interrupted"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside the training, which saves first
        sys.exit(INTERRUPTED)
