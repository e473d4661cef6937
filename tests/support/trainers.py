"""TRL's own trainers on tiny models, and a stand-in for what cce_ext.trl and cce_patch see of it."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

VOCAB = 120
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")
# Of a log's entries, what differs between equal runs.
TIMES = ("runtime", "per_second", "step_time")


# ---- a stand-in ----


class ChunkedLogProbFunction(torch.autograd.Function):
    """TRL 1.16's, in the parameters of its forward alone."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=OUTPUTS,
    ):
        logp = F.log_softmax(F.linear(hidden, weight, bias) * logit_scale / temperature, -1)
        return logp.gather(-1, targets[:, None])[:, 0], None, None, None, None


def install_stub(monkeypatch: pytest.MonkeyPatch, **replaced: Any) -> ModuleType:
    """Has `import trl` give a stand-in with what cce_ext.trl imports, and returns its trl.trainer.utils.

    replaced: function, outputs, add_fused_lm_head or version, None for one that is not there.
    """

    def add_fused_lm_head(model, temperature=1.0, outputs=("log_probs",)):
        original = model.forward

        def fused_forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
            if not fused_lm_head:
                return original(*args, **kwargs)
            hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
            head = self.get_output_embeddings()
            scored = _ChunkedLogProbFunction.apply(  # noqa: F821
                *(hidden.flatten(0, 1), head.weight, head.bias, labels[:, 1:].flatten()),
                *(temperature, 1024, None, 1.0, outputs),
            )
            return scored[0].view(len(labels), -1)

        model.forward = types.MethodType(fused_forward, model)

    given = {"function": ChunkedLogProbFunction, "outputs": OUTPUTS, "add_fused_lm_head": add_fused_lm_head}
    given = {**given, "version": "1.16.0", **replaced}
    utils = {"add_fused_lm_head": given["add_fused_lm_head"], "_ChunkedLogProbFunction": given["function"]}
    contents: dict[str, dict[str, Any]] = {
        "trl": {"__version__": given["version"]},
        "trl.kernels": {},
        "trl.kernels.chunked_logprob": {
            "OPTIONAL_OUTPUTS": given["outputs"],
            "ChunkedLogProbFunction": given["function"],
        },
        "trl.trainer": {},
        "trl.trainer.utils": utils,
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update({key: value for key, value in attributes.items() if value is not None})
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    module = sys.modules["trl.trainer.utils"]
    if given["add_fused_lm_head"] is add_fused_lm_head:  # its globals are to be that module's, as TRL's own are
        code = add_fused_lm_head.__code__
        module.add_fused_lm_head = types.FunctionType(code, vars(module), None, add_fused_lm_head.__defaults__)
    vars(module)["types"] = types
    return module


def fresh_import(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """cce_ext.trl, imported anew with what sys.modules has."""
    import cce_ext

    monkeypatch.delitem(sys.modules, "cce_ext.trl", raising=False)
    monkeypatch.setattr(cce_ext, "trl", None, raising=False)
    module = importlib.import_module("cce_ext.trl")
    del sys.modules["cce_ext.trl"]
    monkeypatch.setitem(sys.modules, "cce_ext.trl", module)  # and gone with the test
    return module


# ---- TRL's trainers ----


def tokenizer():
    """Of numbers as words, with nothing to download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="1", eos_token="2")


def model(seed: int = 0, vocab_size: int = VOCAB):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 2}
    found = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **width, **ids))
    with torch.no_grad():
        found.lm_head.weight *= 20  # no softmax that is all but uniform
    return found


def rows(name: str):
    """Examples of different lengths, so that there is padding."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(3)

    def words(n: int) -> str:
        return " ".join(map(str, torch.randint(3, VOCAB, (n,), generator=draw).tolist()))

    of = {
        "sft": lambda i: {"prompt": words(3), "completion": " " + words(2 + i)},
        "dpo": lambda i: {"prompt": words(3), "chosen": " " + words(2 + i), "rejected": " " + words(9 - i)},
        "kto": lambda i: {"prompt": words(3), "completion": " " + words(2 + i), "label": i % 2 == 0},
        "grpo": lambda i: {"prompt": words(3 + i)},
        "rloo": lambda i: {"prompt": words(3 + i)},
    }
    return Dataset.from_list([of[name](i) for i in range(8)])


def even_share(completion_ids, **_) -> list[float]:
    """A reward that differs within a group."""
    return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


def trainer(name: str, folder: Path, policy=None, peft_config=None, **options):
    """One of TRL's trainers on the CPU, of two steps, with a reference model where it takes one (not with PEFT)."""
    import trl

    trainer_of, config_of = (getattr(trl, f"{name.upper()}{kind}") for kind in ("Trainer", "Config"))
    of_config: dict[str, Any] = dict(
        output_dir=str(folder),
        **dict(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, seed=5, logging_steps=1),
        **dict(use_cpu=True, bf16=False, gradient_checkpointing=False),
        optim="sgd",  # Adam makes a step of the rounding where a gradient is all but zero
        **dict(report_to=[], save_strategy="no", disable_tqdm=True),
    )
    more: dict[str, Any] = {}
    policy = model() if policy is None else policy
    if name in ("grpo", "rloo"):
        of_config |= {"num_generations": 4, "max_completion_length": 6, "temperature": 0.8, "beta": 0.1}
        more["reward_funcs"] = even_share
        if peft_config is None:  # they load the reference model from where the policy came from
            policy.save_pretrained(folder / "policy")
            policy = type(policy).from_pretrained(folder / "policy")
    else:
        more["eval_dataset"] = rows(name)
        if name != "sft" and peft_config is None:
            more["ref_model"] = model(seed=1)
    return trainer_of(
        policy,
        args=config_of(**of_config | options),
        train_dataset=rows(name),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **more,
    )


def metrics(made, evaluate: bool = False) -> list[dict[str, float]]:
    """Trains, and what was logged, without times."""
    made.train()
    if evaluate:
        made.evaluate()
    return [
        {name: x for name, x in entry.items() if not any(time in name for time in TIMES)}
        for entry in made.state.log_history
    ]


def compare(found, expected, rel: float = 1e-4) -> None:
    """To 4 digits: the same entries with the same values. What is below 2e-7 is rounding, of losses that are zero."""
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for entry, of in zip(found, expected, strict=True):
        assert entry == pytest.approx(of, rel=rel, abs=2e-7, nan_ok=True)


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[dict[str, Any]]:
    """The options of each call of linear_logprobs by cce_ext.trl, as they come."""
    calls: list[dict[str, Any]] = []
    original = module.linear_logprobs

    def called(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(module, "linear_logprobs", called)
    return calls
