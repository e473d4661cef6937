"""Does it train as well? The same pretraining and fine-tuning with every gradient of the loss, on one machine.

    python research/study.py prepare --text FOLDER.. --out runs/study_data     # real text -> tokens
    python research/study.py run --data runs/study_data --out runs/study.json  # trains; goes on where it was ended
    python research/study.py plot runs/study.json                              # plot and table
    python research/study.py merge runs/a.json runs/b.json --out runs/study.json   # runs of separate commands
    python research/study.py run .. --phases pretrain --impls cce --seeds 0 --save-problem runs/problem.pt

Three phases, each with every --impls and --seeds; a run is one of them:
- pretrain: from scratch, in large batches;
- small_batch: from scratch, in small ones, where a gradient that leaves out what is small has no other token to make up
  for it;
- finetune: small batches at a low learning rate, from the model that pretrain, cce_exact and seed 0 ended with, on
  text it has not seen, prompts masked (the first quarter to three quarters of a window have the label -100);
- policy, where --phases names it: reinforcement learning, from that model as well. Completions of prompts are sampled,
  and what is counted in them is the reward of a policy gradient with an entropy bonus (study_policy.py).
A seed is that of the initial weights, of the batches' order, of the prompts' lengths and of all sampling; runs of one
phase and seed differ in the loss's implementation alone.

--impls: baseline (dense torch, fp32 softmax), apple (the package cut_cross_entropy with its default options; on CUDA),
an impl of cce_ext, or cce_fp8 (cce with the 8-bit scan; on Hopper, in bfloat16, and left out elsewhere). An impl of
cce_ext takes @EPS for another filter_eps than its default: cce@2^-6, cce_fp8@2^-6.

What is measured, of each run:
- held-out loss: nats a token from dense float32 logits, whatever the loss that trains; ten times on a part of the
  held-out text and at the end on a larger one (final_eval_tokens), whose windows' losses are kept too. For finetune it
  is of the tokens after held-out prompts. Of policy it is the reward that is measured, and the entropy;
- tokens a second: of the training steps alone, after the first 5. All runs share the compiled blocks of the model
  (--compile, the default on CUDA);
- peak memory: torch.cuda.max_memory_allocated over the training steps, in a process that holds nothing else; none on
  a CPU.
The table has each figure less --reference's of the same seed, the mean over the seeds with its standard error, and the
standard error that the held-out text gives that mean (study_paired.py).

--save-problem writes what the loss of one run's model is given on held-out text (e, c and targets, in bf16): a real
problem for `python -m bench --data saved:FILE`.

FILE is written after every run, and what is in it is not run again: Ctrl-C or a time limit lose the run they end, no
more. A run that fails is reported and left out, and the exit status is 1.
"""

import argparse
import itertools
import shlex
import sys
from pathlib import Path

# The model, the text and the training loop are those of the examples.
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

try:
    import torch
    from arguments import INTERRUPTED, at_least, positive
    from study_data import load, prepare
    from study_problem import ProblemFile
    from study_run import ALL_PHASES, PHASES, POLICY, REAL_SETTINGS, SETTINGS, Study, make_loss
    from text import MIN_VOCAB
    from training import write_json
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; in the root of the repository: pip install ".[train]"')

IMPLS = ("baseline", "cce_exact", "cce", "cce@2^-6", "cce@2^-7", "cce@2^-8", "cce_threshold", "apple")


def impl_name(text: str) -> str:
    try:
        make_loss(text)
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return text


def assignment(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise argparse.ArgumentTypeError(f"no setting {name!r}; there are {', '.join(SETTINGS)}")
    return name, positive(value) if name in REAL_SETTINGS else at_least(1)(value)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare trainings that differ in the loss's gradient alone.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}

    add = commands.add_parser("prepare", help="make tokens of text", **defaults).add_argument
    add("--text", type=Path, nargs="+", required=True, metavar="PATH", help="folders of .txt, .md, .rst, .py; files")
    add("--vocab", type=at_least(MIN_VOCAB), default=131072, help="vocabulary entries")
    add("--max-megabytes", type=positive, default=100.0, help="of text at most: a random choice of the files")
    add("--note", default="", help="kept with the results: where the text is from, its licence")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for tokens, tokenizer.json and meta.json")

    add = commands.add_parser("run", help="train", **defaults).add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="what prepare has written")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON; what it holds is not run again")
    add("--phases", choices=ALL_PHASES, nargs="+", default=PHASES, help="what to train")
    add(
        "--impls",
        type=impl_name,
        nargs="+",
        default=IMPLS,
        metavar="IMPL",
        help="baseline, apple, cce, cce_fp8, cce@2^-6..",
    )
    add("--seeds", type=at_least(0), nargs="+", default=(0, 1), metavar="SEED", help="runs of each")
    add("--set", type=assignment, nargs="+", default=[], metavar="NAME=VALUE", help=f"change {', '.join(SETTINGS)}")
    add("--budget-seconds", type=positive, help="begin no run that would, by the last one like it, end later")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model's blocks; default: on CUDA")
    add("--commit", help="the commit to name where there is no git to ask")
    add("--plot", action="store_true", help="at the end plot what the file holds, as the command plot does")
    add("--reference", type=impl_name, default="cce_exact", metavar="IMPL", help="of --plot: whose runs are taken off")
    add("--save-problem", type=Path, metavar="FILE", help="e, c, targets of the one run that is asked for")
    add("--problem-tokens", type=at_least(1), default=8192, help="held-out tokens of that problem, at most")

    add = commands.add_parser("plot", help="plot and table of a results file").add_argument
    add("file", type=Path, metavar="FILE", help="JSON that run has written")
    add("--out", type=Path, metavar="PNG", help="default: FILE with the suffix .png; the table is beside it, as .md")
    add("--reference", type=impl_name, default="cce_exact", metavar="IMPL", help="whose runs are taken off the others'")

    add = commands.add_parser("merge", help="one results file of several with the same settings").add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="JSON that run has written")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON")

    args = parser.parse_args(argv)
    if args.command == "run":
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA GPU")
        if args.device == "auto":
            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.dtype == "auto":
            args.dtype = "bfloat16" if args.device == "cuda" else "float32"
        if args.compile is None:
            args.compile = args.device == "cuda"
        asked = list(itertools.product(*map(dict.fromkeys, (args.phases, args.impls, args.seeds))))
        if args.save_problem and len(asked) > 1:
            parser.error(f"--save-problem: of one run, not of {len(asked)}: choose by --phases, --impls and --seeds")
        if args.save_problem and POLICY in args.phases:
            parser.error("--save-problem: a policy gradient's tokens are sampled ones: choose another phase")
        args.problem = ProblemFile(args.save_problem, args.problem_tokens, asked[0]) if args.save_problem else None
    return args


def prepare_text(args: argparse.Namespace) -> int:
    meta = prepare(args.text, args.vocab, int(args.max_megabytes * 1e6), args.note, args.out)
    print(
        f"{meta['train_tokens']:,} tokens to train on, {meta['held_out_tokens']:,} held out, "
        f"vocabulary {meta['vocab']:,}; saved in {args.out}"
    )
    if meta["vocab"] < args.vocab:
        print(f"note: the text is too small to fill a vocabulary of {args.vocab:,}")
    return 0


def without_folder(argument: str) -> str:
    """An absolute path as its name: a results file says nothing of the machine's folders."""
    return Path(argument).name if argument.startswith("/") else argument


def run(args: argparse.Namespace, argv: list[str]) -> int:
    study = Study(
        data=load(args.data),
        file=args.out,
        settings={**SETTINGS, **dict(args.set)},
        device=args.device,
        dtype=args.dtype,
        compiled=args.compile,
        problem=args.problem,
    )
    study.open(
        command=shlex.join(["python", "research/study.py", *map(without_folder, argv)]),
        commit=args.commit,
        phases=args.phases,
    )
    if args.problem and args.problem.run in study.done():
        sys.exit(f"error: --save-problem: {args.out} holds this run, which is not run again: name another --out")
    status = study.run(args.phases, args.impls, args.seeds, args.budget_seconds)
    if args.problem and args.problem.run not in study.done():
        print(f"error: --save-problem: the run was not made, nor {args.save_problem} written", file=sys.stderr)
        status = 1
    return plot(args.out, None, args.reference) or status if args.plot else status


def merge(files: list[Path], out: Path) -> int:
    """Runs of several commands, of which each says in its session what it ran on."""
    merged = Study.read(files[0])
    for file in files[1:]:
        result = Study.read(file)
        differing = [
            k for k in {**merged["config"], **result["config"]} if merged["config"].get(k) != result["config"].get(k)
        ]
        if differing:
            sys.exit(f"error: {file} was made with other settings ({', '.join(differing)}) than {files[0]}")
        there = {(r["phase"], r["impl"], r["seed"]) for r in merged["runs"]}
        for run in result["runs"]:
            key = (run["phase"], run["impl"], run["seed"])
            if key in there:
                sys.exit(f"error: {file}: {' '.join(map(str, key))} is in an earlier file as well")
            merged["runs"].append({**run, "session": run["session"] + len(merged["sessions"])})
        merged["sessions"] += result["sessions"]
    write_json(merged, out)
    print(f"{len(merged['runs'])} runs saved in {out}")
    return 0


def plot(file: Path, png: Path | None, reference: str) -> int:
    try:
        from study_report import save_plot, table  # what trains can do without matplotlib
    except ModuleNotFoundError as error:
        sys.exit(f'error: {error.name} is not installed; in the root of the repository: pip install ".[train]"')
    result = Study.read(file)
    if not result["runs"]:
        sys.exit(f"error: {file} holds no run")
    png = png or file.with_suffix(".png")
    save_plot(result, png, reference)
    text = table(result, reference)
    png.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"saved {png} and {png.with_suffix('.md')}")
    return 0


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    if args.command == "prepare":
        return prepare_text(args)
    if args.command == "merge":
        return merge(args.files, args.out)
    return plot(args.file, args.out, args.reference) if args.command == "plot" else run(args, argv)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
