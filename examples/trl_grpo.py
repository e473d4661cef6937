"""Under a minute on two CPU cores: TRL's GRPOTrainer with linear_logprobs in the place of its fused lm_head.

    python examples/trl_grpo.py              # --steps 40, the sampled gradient
    python examples/trl_grpo.py --impl trl   # TRL's own

The line to look for is `cce_ext.trl.patch`: all the rest is an ordinary run of TRL 1.16. A tiny Llama is rewarded for
even numbers; reward, entropy and loss are TRL's metrics, and the entropy is in the loss as well. Nothing is downloaded.
"""

import argparse
import random
import sys
import tempfile

try:
    import torch
    from arguments import at_least
    from datasets import Dataset
    from tiny_llama import NUMBERS, Lines, llama, tokenizer
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    import cce_ext.trl
    from cce_ext import IMPLS
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed: pip install ".[transformers]" "trl==1.16.*"')


def even_share(completions: list[str], **unused) -> list[float]:
    numbers = [[int(word) for word in text.split() if word.isdigit()] for text in completions]
    return [sum(x % 2 == 0 for x in found) / max(1, len(found)) for found in numbers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", choices=(*IMPLS, "trl"), default="cce")
    parser.add_argument("--steps", type=at_least(1), default=40)
    args = parser.parse_args()
    if args.impl != "trl":
        cce_ext.trl.patch(args.impl)
    words, draw = tokenizer(), random.Random(0)
    prompts = Dataset.from_list([{"prompt": f"{draw.randrange(NUMBERS)} +"} for _ in range(1024)])
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            temperature=0.9,
            entropy_coef=0.01,
            learning_rate=2e-3,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            llama(words),
            even_share,
            config,
            train_dataset=prompts,
            processing_class=words,
            callbacks=[Lines("reward", "entropy", "loss", "grad_norm")],
        )
        trainer.remove_callback(PrinterCallback)  # it prints all of them
        trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
