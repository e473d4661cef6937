"""Less than a minute on two CPU cores: TRL's SFTTrainer with linear_logprobs in the place of its fused lm_head.

    python examples/trl_sft.py              # --steps 200, the sampled gradient
    python examples/trl_sft.py --impl trl   # TRL's own

The line to look for is `cce_ext.trl.patch`: all the rest is an ordinary run of TRL 1.16. A tiny Llama learns sums of
two numbers; loss, entropy and accuracy are TRL's metrics. Nothing is downloaded.
"""

import argparse
import random
import sys
import tempfile

try:
    import torch
    from arguments import at_least
    from datasets import Dataset
    from tiny_llama import Lines, llama, tokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    import cce_ext.trl
    from cce_ext import IMPLS
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed: pip install ".[transformers]" "trl==1.16.*"')


def sums(n: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randrange(30), draw.randrange(30)) for _ in range(n)]
    return Dataset.from_list([{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in pairs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", choices=(*IMPLS, "trl"), default="cce")
    parser.add_argument("--steps", type=at_least(1), default=200)
    args = parser.parse_args()
    if args.impl != "trl":
        cce_ext.trl.patch(args.impl)
    words = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = {"train_dataset": sums(8192, seed=0), "eval_dataset": sums(256, seed=1)}
        lines = Lines("loss", "entropy", "mean_token_accuracy", "eval_loss", "eval_mean_token_accuracy")
        trainer = SFTTrainer(llama(words), config, **data, processing_class=words, callbacks=[lines])
        trainer.remove_callback(PrinterCallback)  # it prints all of them
        trainer.train()
        trainer.evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
