"""Train a causal LM of Hugging Face Transformers by its Trainer, with the loss of your choice.

    python examples/train_hf.py                        # a small Llama from scratch, on the sources of Python itself
    python examples/train_hf.py --scratch gemma2       # a small Gemma 2, whose logits have a softcap
    python examples/train_hf.py --scratch config.json  # any causal LM's config, with a vocabulary of its own
    python examples/train_hf.py --model Qwen/Qwen3-0.6B --lr 1e-5 --instructions pairs.jsonl
    torchrun --nproc-per-node 4 examples/train_hf.py   # or accelerate launch; --batch is each GPU's

The line to look for is `cce_patch` in `main`: all the rest is an ordinary run of the Trainer, and `--impl baseline`
is the same run without it.

--text as in examples/train.py. --instructions: JSON Lines, {"prompt": "..", "response": ".."} each; the loss is that of
the responses. One part in twenty is held out, and measured every --eval-every steps and at the end.

Written to --out: checkpoints, from the last of which --resume goes on, and at the end model and tokenizer.
"""

import argparse
import functools
import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import torch
    import transformers
    from arguments import IMPLS, INTERRUPTED, SCAN_HELP, SCANS, at_least, check_scan, positive
    from text import (
        END_OF_DOCUMENT,
        HELD_OUT_SHARE,
        MIN_VOCAB,
        encode,
        load_corpus,
        read_file,
        read_text,
        spread_windows,
        train_tokenizer,
        windows,
    )
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.trainer_utils import get_last_checkpoint

    from cce_ext.transformers import cce_patch
except ModuleNotFoundError as error:
    sys.exit(
        f'error: {error.name} is not installed; in the root of the repository: pip install ".[train,transformers]"'
    )

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
PRESETS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "gemma2": {"model_type": "gemma2", **SMALL, "query_pre_attn_scalar": 32, "sliding_window": 128},
}

Rows = list[dict[str, list[int]]]  # input_ids and labels, each of its own length


def scratch_config(preset: str, tokenizer: PreTrainedTokenizerFast, context: int) -> transformers.PretrainedConfig:
    """A preset's config, or that of a JSON file, for this tokenizer's vocabulary."""
    if preset in PRESETS:
        settings = dict(PRESETS[preset])
    else:
        try:
            settings = json.loads(Path(preset).read_text(encoding="utf-8"))
        except OSError as error:
            sys.exit(f"error: --scratch {preset}: neither {' nor '.join(PRESETS)}, nor a file: {error.strerror}")
        except ValueError as error:
            sys.exit(f"error: --scratch {preset} is not JSON: {error}")
        if not isinstance(settings, dict) or "model_type" not in settings:
            sys.exit(f"error: --scratch {preset} has no model_type")
    end = tokenizer.eos_token_id
    settings |= {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    settings["max_position_embeddings"] = max(context, settings.get("max_position_embeddings", 0))
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except ValueError as error:
        sys.exit(f"error: --scratch {preset}: {error}")


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_DOCUMENT,
        pad_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,
    )


def read_instructions(path: Path) -> list[tuple[str, str]]:
    """Prompts and responses."""
    pairs = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            sys.exit(f"error: {path}, line {number}, is not JSON: {error}")
        pair = [entry.get(key) if isinstance(entry, dict) else None for key in ("prompt", "response")]
        if not all(isinstance(text, str) for text in pair):
            sys.exit(f'error: {path}, line {number}: expected {{"prompt": "..", "response": ".."}}')
        pairs.append((pair[0], pair[1]))
    if len(pairs) < 2:
        sys.exit(f"error: {path} has {len(pairs)} instructions: one to train on and one to hold out are the least")
    return pairs


def instruction_rows(pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, context: int) -> Rows:
    """The prompt's labels are -100. What is beyond the context is cut off; a row with no response left is left out."""
    rows = []
    for prompt, response in pairs:
        before = tokenizer(prompt, add_special_tokens=True)["input_ids"]
        after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = ([-100] * len(before) + after)[:context]
        if any(label != -100 for label in labels[1:]):  # the first token is no prediction
            rows.append({"input_ids": [*before, *after][:context], "labels": labels})
    return rows


def text_rows(cut: Tensor) -> Rows:
    """[n, context] windows of a text."""
    return [{"input_ids": row, "labels": row} for row in cut.tolist()]


def fill_up(rows: Rows, arguments: transformers.TrainingArguments, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """As many rows as make whole batches on all processes: the others have no labels. The Trainer would repeat rows."""
    missing = -len(rows) % (arguments.eval_batch_size * arguments.world_size)
    return rows + [{"input_ids": [tokenizer.eos_token_id], "labels": [-100]}] * missing


def pretrained(auto: Any, name: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: --model {name}: {error}")


def load_data(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Rows, Rows]:
    """The tokenizer, the rows to train on and the held-out ones. A vocabulary is trained on the former alone."""
    tokenizer = pretrained(AutoTokenizer, args.model) if args.model else None
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.instructions:
        pairs = read_instructions(args.instructions)
        train, held_out = [p for i, p in enumerate(pairs) if i % HELD_OUT_SHARE], pairs[::HELD_OUT_SHARE]
        if tokenizer is None:
            tokenizer = wrap(train_tokenizer([text for pair in train for text in pair], args.vocab))
        train_rows, held_out_rows = (instruction_rows(part, tokenizer, args.context) for part in (train, held_out))
        left_out = len(pairs) - len(train_rows) - len(held_out_rows)
        if left_out:
            print(f"note: {left_out} instructions have no response within --context {args.context}: left out")
        if not train_rows or not held_out_rows:
            sys.exit(f"error: {args.instructions}: nothing is left to train on, or nothing to hold out")
        return tokenizer, train_rows, held_out_rows

    if tokenizer is None:
        corpus = load_corpus(args.text, args.vocab, args.cache)
        tokenizer, parts = wrap(Tokenizer.from_file(str(corpus.tokenizer))), (corpus.train, corpus.held_out)
    else:
        end = tokenizer.eos_token_id
        parts = tuple(encode(tokenizer.backend_tokenizer, split, end) for split in read_text(args.text))
    for name, tokens in zip(("train", "held-out"), parts, strict=True):
        if len(tokens) < args.context:
            sys.exit(f"error: the {name} text has {len(tokens)} tokens, fewer than --context {args.context}")
    held_out = spread_windows(parts[1], args.context, args.eval_tokens)
    return tokenizer, text_rows(windows(parts[0], args.context)), text_rows(held_out)


def load_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> transformers.PreTrainedModel:
    if args.model:
        return pretrained(AutoModelForCausalLM, args.model, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(scratch_config(args.scratch, tokenizer, args.context))


def training_arguments(args: argparse.Namespace) -> transformers.TrainingArguments:
    cuda = args.device == "cuda"
    return transformers.TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        weight_decay=0.1,
        bf16=cuda,
        use_cpu=not cuda,
        torch_compile=args.compile,
        seed=args.seed,
        logging_steps=args.log_every,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        save_total_limit=2,
        prediction_loss_only=True,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
        report_to=[],
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a causal LM of Hugging Face Transformers by its Trainer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--impl", choices=IMPLS, default="cce", help="the loss; baseline: the model as it is")
    add("--scan", choices=SCANS, help=f"{SCAN_HELP}; the held-out loss is that of the 16-bit forward")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--scratch", metavar="|".join((*PRESETS, "FILE.json")), help="a new model; llama if not --model")
    which.add_argument("--model", metavar="NAME", help="a pretrained model's name or folder")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--text", type=Path, nargs="+", metavar="FILE", default=[], help="UTF-8 text to train on")
    data.add_argument("--instructions", type=Path, metavar="FILE", help="JSON Lines with prompt and response")
    add("--vocab", type=at_least(MIN_VOCAB), default=32768, help="vocabulary entries of a new model")
    add("--context", type=at_least(2), default=256, help="tokens of a sequence")
    add("--batch", type=at_least(1), default=8, help="sequences of a device and micro-batch")
    add("--accumulate", type=at_least(1), default=1, help="micro-batches a step")
    add("--steps", type=at_least(1), default=100, help="optimizer steps")
    add("--lr", type=positive, default=3e-3, help="peak learning rate; a pretrained model wants a lower one")
    add("--seed", type=int, default=0, help="of initial weights, batches and sampling")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--checkpointing", action="store_true", help="gradient checkpointing: less memory, more time")
    add("--log-every", type=at_least(1), default=10, help="steps between two logged losses")
    add("--eval-every", type=at_least(1), default=50, help="steps between two held-out losses")
    add("--eval-tokens", type=at_least(1), default=8192, help="held-out tokens to measure on, of a text")
    add("--save-every", type=at_least(1), default=100, help="steps between two checkpoints")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is a GPU")
    add("--out", type=Path, default=Path("runs/train_hf"), help="folder for checkpoints and the model")
    add("--cache", type=Path, default=Path("runs/cache"), help="folder for vocabulary and tokens")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA GPU")
    if args.model is None and args.scratch is None:
        args.scratch = "llama"
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_scan(parser, args.scan, [args.impl], args.device)
    args.last_checkpoint = get_last_checkpoint(args.out) if args.resume and args.out.is_dir() else None
    if args.resume and args.last_checkpoint is None:
        parser.error(f"--resume: there is no checkpoint in {args.out}")
    return args


class TokenMeanTrainer(transformers.Trainer):
    """The Trainer, but for its held-out loss: the mean over the tokens that count. Logs their accuracy and entropy.

    The Trainer's own is a mean of the batches' means, which moves with --batch where prompts have no loss.
    """

    def log(self, logs: dict[str, float], *args: object) -> None:
        stats = getattr(self.model, "cce_stats", None)  # the baseline has none
        if stats is not None:
            stats.add_to_logs(logs, torch.distributed.group.WORLD if torch.distributed.is_initialized() else None)
        super().log(logs, *args)

    @functools.cached_property
    def tokens_a_row(self) -> float:
        counted = [sum(label != -100 for label in row["labels"][1:]) for row in self.eval_dataset]
        return sum(counted) / len(counted)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # In evaluation too the Trainer counts the tokens of all processes; here, each batch has the mean over its own.
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            # The Trainer takes the mean over all rows of what each batch gives, here its sum over a mean row's tokens.
            labels = inputs["labels"]
            counted = (labels[:, 1:] != -100).sum()
            loss = torch.where(counted > 0, loss * counted, 0.0) / (len(labels) * self.tokens_a_row)
        return loss, *rest


def train(args: argparse.Namespace) -> None:
    arguments = training_arguments(args)  # joins the other processes, where there are any
    transformers.set_seed(args.seed)
    with arguments.main_process_first(desc="the text"):
        tokenizer, train_rows, held_out_rows = load_data(args)
    model = load_model(args, tokenizer)
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    if args.impl != "baseline":
        cce_patch(model, impl=args.impl, scan=args.scan, stats=args.scan is None)
    trainer = TokenMeanTrainer(
        model,
        arguments,
        train_dataset=train_rows,
        eval_dataset=fill_up(held_out_rows, arguments, tokenizer),
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train(resume_from_checkpoint=args.last_checkpoint)
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"held-out loss {loss:.4f} after {trainer.state.global_step} steps; saved in {args.out}")


def main() -> int:
    train(parse_args())
    if torch.distributed.is_initialized():
        # Gloo's threads want the interpreter to let go of the last collective's tensors. On the way out it would wait
        # for them, or abort: here they get it. The wrapped model, which holds the group as well, must be gone before.
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the last checkpoint is there for --resume
        sys.exit(INTERRUPTED)
