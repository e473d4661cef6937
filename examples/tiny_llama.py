"""What the TRL examples share: a tokenizer of numbers and a Llama of half a million parameters, neither downloaded."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

NUMBERS = 1000


def tokenizer() -> PreTrainedTokenizerFast:
    """Each number below NUMBERS is a token, and so are "+" and "=". Text is split at spaces."""
    special = ["<unk>", "<pad>", "<end>", "+", "="]
    vocab = {word: i for i, word in enumerate([*special, *map(str, range(NUMBERS))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def llama(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=words.pad_token_id,
            bos_token_id=None,
            eos_token_id=words.eos_token_id,
        )
    )


class Lines(TrainerCallback):
    """One line each time that the trainer logs, of these of its metrics."""

    def __init__(self, *metrics: str) -> None:
        self.metrics = metrics

    def on_log(self, args, state, control, logs=None, **unused) -> None:
        found = [f"{name} {logs[name]:.3f}" for name in self.metrics if name in logs]
        if found:
            print(f"step {state.global_step:4}: {', '.join(found)}", flush=True)
