"""Ten seconds on two CPU cores: a small Llama of random weights learns this repository's documents by the Trainer.

    pip install ".[transformers]"
    python examples/hf_trainer.py

Nothing is downloaded. The line to look for is `cce_patch(model, ..)`: all the rest is an ordinary run of the Trainer,
which logs the tokens' accuracy too. At the end the model is unpatched, and the loss that it computes itself, from
logits, is printed beside ours.
examples/train_hf.py is the same with everything: pretrained models, instructions, checkpoints, several GPUs.
"""

import re
import sys
import tempfile
from pathlib import Path

try:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    from cce_ext.transformers import cce_patch, cce_unpatch
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed: pip install ".[transformers]"')

CONTEXT = 128


def load_text() -> tuple[torch.Tensor, int]:
    """This repository's documents as rows of CONTEXT tokens, and the size of the vocabulary: their words and signs."""
    root = Path(__file__).resolve().parents[1]
    files = sorted([*root.glob("*.md"), *root.glob("docs/*.md")])
    words = re.findall(r"\w+|\W", "\n".join(file.read_text(encoding="utf-8") for file in files))
    numbers = {word: number for number, word in enumerate(sorted(set(words)))}
    tokens = torch.tensor([numbers[word] for word in words])
    return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT), len(numbers)


class AccuracyTrainer(Trainer):
    """The Trainer, which logs the accuracy and the entropy of the tokens too."""

    def log(self, logs: dict[str, float], *args: object) -> None:
        stats = getattr(self.model, "cce_stats", None)  # unpatched it has none
        if stats is not None:
            stats.add_to_logs(logs)
        super().log(logs, *args)


def main() -> None:
    set_seed(0)
    windows, vocab = load_text()
    rows = [{"input_ids": window, "labels": window} for window in windows]
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=CONTEXT, **sizes))

    # Where it is given labels, its loss is linear_cross_entropy's from here on. stats: for AccuracyTrainer.
    cce_patch(model, stats=True)

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=60, learning_rate=3e-3, logging_steps=20)
        arguments.set_save("no").set_dataloader(train_batch_size=8, pin_memory=on_gpu)
        arguments.bf16, arguments.disable_tqdm, arguments.report_to = on_gpu, True, []
        trainer = AccuracyTrainer(model, arguments, train_dataset=rows[8:], eval_dataset=rows[:8])
        trainer.train()
        ours = trainer.evaluate()["eval_loss"]
        cce_unpatch(model)
        own = trainer.evaluate()["eval_loss"]
    print(f"{vocab} words; held-out loss {ours:.4f}, by the model's own logits {own:.4f}")


if __name__ == "__main__":
    main()
