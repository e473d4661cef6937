"""cce_ext.transformers: patched models against the same ones unpatched, on tiny random configs of the real classes."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.models import VOCAB, assert_same, batch, compare, loss_and_gradients, tiny  # noqa: E402

from cce_ext import linear_cross_entropy  # noqa: E402
from cce_ext.transformers import cce_patch, cce_unpatch, supported  # noqa: E402
from cce_ext.transformers.families import TESTED  # noqa: E402

# ---- families ----


@pytest.mark.parametrize("model_type", [x for x in TESTED if x in supported()])
def test_family(model_type):
    model, inputs = tiny(model_type), batch()
    without_labels = {"input_ids": inputs["input_ids"]}
    logits = model(**without_labels).logits
    compare(model, **inputs)
    assert model(**inputs).logits is None
    assert torch.equal(model(**without_labels).logits, logits)


def test_supported():
    wanted = "llama phi3 mistral gemma2 qwen2 qwen3 qwen3_moe gemma3_text mixtral olmo2 cohere cohere2 granite smollm3 "
    wanted += "starcoder2 gpt2 gpt_neox deepseek_v3"
    assert set(wanted.split()) <= set(cce_patch.supported())
    assert cce_patch.supported() == tuple(sorted(set(supported())))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "phi", "cohere", "gemma2", "granite"])
def test_tied_embeddings(model_type, tie):
    model = tiny(model_type, tie_word_embeddings=tie)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tie
    assert (head.bias is not None) == (model_type == "phi")
    compare(model)


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_router_loss(model_type):
    """What the forward adds to the loss stays."""
    model = tiny(model_type, output_router_logits=False)
    plain = model(**batch()).loss
    routed = model(**batch(), output_router_logits=True)
    assert routed.loss > plain + 1e-4
    compare(model, **batch(), output_router_logits=True)
    cce_patch(model, reduction="none")
    with pytest.raises(ValueError, match="output_router_logits: .* reduction='none'"):
        model(**batch(), output_router_logits=True)


class Odd(transformers.LlamaForCausalLM):
    """A forward that does something with its logits."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.between(self.lm_head(self.model(input_ids).last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def odd(between) -> Odd:
    model = Odd(tiny().config)
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))  # which a scale must reach as well
    model.between = between
    return model


@pytest.mark.parametrize(
    "between",
    [
        lambda z: 3.0 * torch.tanh(z / 5.0),
        lambda z: F.tanh(z * 2) * 7 / 2,
        lambda z: (z.float() * 0.5).contiguous() / 3,
        lambda z: (
            z.to(torch.float32).to(z.device).to(torch.empty(z.shape, device="cpu")).to(dtype=torch.float32, copy=True)
        ),
    ],
    ids=["softcap", "scaled softcap", "scales", "to"],
)
def test_what_is_known_between_head_and_loss(between):
    compare(odd(between))


@pytest.mark.parametrize(
    "between",
    [
        lambda z: z[..., :100],
        lambda z: z + 1.0,
        lambda z: 1.0 - z,
        lambda z: -z,
        lambda z: z**2,
        lambda z: z * torch.ones(()),
        lambda z: torch.ones(()) * z,
        lambda z: z / torch.ones(()),
        lambda z: z.clamp(max=1.0),
        lambda z: torch.sigmoid(z),
        lambda z: torch.where(z > 0, z, z),
        lambda z: z * (z == 0),
        lambda z: z.tanh().tanh(),
        lambda z: F.dropout(z, 0.5),
        lambda z: z.to(torch.float64),
        lambda z: z.to("meta"),
    ],
)
def test_what_is_not_known_is_refused(between):
    model = cce_patch(odd(between))
    with pytest.raises(NotImplementedError, match="Odd cannot be served by cce_patch: between lm_head and the loss"):
        model(**batch())


def test_families_that_are_refused():
    with pytest.raises(ValueError, match="XLMWithLMHeadModel cannot be served: .* by self.loss_function"):
        cce_patch("xlm")
    bert = cce_patch(tiny("bert", is_decoder=True))
    with pytest.raises(NotImplementedError, match="BertLMHeadModel cannot be served .* do not come from lm_head"):
        bert(**batch())
    headless = cce_patch(transformers.LlamaForSequenceClassification(tiny().config))
    with pytest.raises(NotImplementedError, match="LlamaForSequenceClassification cannot be served .* no lm_head"):
        headless(input_ids=batch()["input_ids"], labels=torch.zeros(2, dtype=torch.long))
    other_loss = cce_patch(tiny())
    other_loss.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with pytest.raises(NotImplementedError, match="its loss_function is not"):
        other_loss(**batch())

    class Child(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            assert self.loss_function
            return super().forward(input_ids, labels=labels, **kwargs)

    with pytest.raises(ValueError, match="Child cannot be served: its forward calls its parent's"):
        cce_patch(Child(tiny().config))


class LinearOfAnotherKind(nn.Linear):
    pass


class TensorOfAnotherKind(torch.Tensor):
    pass


def with_hook(head):
    head.register_forward_pre_hook(lambda module, args: None)


def with_forward(head):
    head.forward = head.forward


def with_class(head):
    head.__class__ = LinearOfAnotherKind


def with_weight(head):
    head.weight = nn.Parameter(head.weight.detach().as_subclass(TensorOfAnotherKind))


@pytest.mark.parametrize(
    "change, message",
    [
        (with_hook, "lm_head: it has hooks"),
        (with_forward, "lm_head: it has hooks"),
        (with_class, "lm_head: expected torch.nn.Linear, got .*LinearOfAnotherKind"),
        (with_weight, "lm_head.weight: expected a plain tensor, got TensorOfAnotherKind"),
    ],
)
def test_heads_that_are_more_than_a_linear_layer_are_refused(change, message):
    model = cce_patch(tiny())
    change(model.lm_head)
    with pytest.raises(NotImplementedError, match=message):
        model(**batch())


# ---- arguments of the forward ----


@pytest.mark.parametrize(
    "inputs",
    [
        {"shift_labels": torch.arange(18).view(2, 9)},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"labels": torch.full((2, 9), -100)},
        {"labels": torch.full((2, 9), -100), "num_items_in_batch": 7},
        {"ignore_index": 5, "labels": torch.full((2, 9), 5).index_fill(1, torch.tensor([3]), 8)},
        batch(length=1),
        {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])},
    ],
    ids=lambda x: ", ".join(x),
)
def test_arguments(inputs):
    compare(tiny(), **{**batch(), **inputs})


def test_labels_by_position_and_tuples():
    model, inputs = tiny(), batch()
    unpatched = model(**inputs, return_dict=False)
    cce_patch(model, impl="cce_exact")
    patched = model(inputs["input_ids"], None, None, None, None, inputs["labels"], return_dict=False)
    torch.testing.assert_close(patched[0], unpatched[0])
    assert len(patched) == len(unpatched) - 1  # no logits


def test_int32_labels():
    model, inputs = cce_patch(tiny()), batch()
    same = {**inputs, "labels": inputs["labels"].int()}
    assert torch.equal(model(**inputs).loss, model(**same).loss)


def test_reductions():
    model, inputs = tiny(), batch()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="none").view(2, 8)
    losses = cce_patch(model, reduction="none")(**inputs).loss
    torch.testing.assert_close(losses, expected)
    assert model(**inputs, num_items_in_batch=7, shift_labels=inputs["labels"]).loss.shape == (2, 9)
    total = cce_patch(model, reduction="sum")(**inputs, num_items_in_batch=7).loss
    torch.testing.assert_close(total, expected.sum())


def test_readme_perplexity():
    """The lines of docs/transformers.md."""
    page = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "perplexity =" in code]
    model, inputs = tiny(), batch()
    logits = model(input_ids=inputs["input_ids"]).logits
    expected = [F.cross_entropy(z[:-1], y[1:]).exp() for z, y in zip(logits, inputs["labels"], strict=True)]
    names = {
        "torch": torch,
        "cce_patch": cce_patch,
        "model": model,
        "input_ids": inputs["input_ids"],
        "labels": inputs["labels"],
    }
    exec(example, names)
    torch.testing.assert_close(names["perplexity"], torch.stack(expected))


def test_train_only():
    model = cce_patch(tiny(), train_only=True)
    assert model(**batch()).logits.shape == (2, 9, VOCAB)
    assert model.train()(**batch()).logits is None


def test_generation():
    model, tokens = tiny(), batch()["input_ids"]
    unpatched = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(cce_patch(model).generate(tokens, max_new_tokens=5, do_sample=False), unpatched)


def test_defaults_are_those_of_the_loss():
    parameters = inspect.signature(cce_patch).parameters
    options = inspect.signature(linear_cross_entropy).parameters
    assert parameters.keys() - options.keys() == {"model_or_model_type", "train_only", "stats"}
    assert all(parameters[name].default == options[name].default for name in parameters.keys() & options.keys())


@pytest.mark.parametrize("divided", [{}, {"num_items_in_batch": 7}], ids=["", "divided"])
def test_options_reach_the_loss(monkeypatch, divided):
    seen = {}

    def loss(*args, **options):
        seen.update(options)
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr("cce_ext.transformers.logits.module_loss", loss)
    wanted = {
        "impl": "cce_kahan",
        "reduction": "mean",
        "filter_eps": 2.0**-5,
        "accum_e_fp32": True,
        "accum_c_fp32": True,
        "filter_e_grad": False,
        "filter_c_grad": False,
        "label_smoothing": 0.1,
        "scan": None,
    }
    cce_patch(tiny("gemma2"), **wanted)(**batch(), **divided)
    assert seen == {**wanted, "reduction": "sum" if divided else "mean", "ignore_index": -100, "softcap": 0.7}


def test_sampled_gradient():
    """The default: the same loss, a gradient that draws."""
    model = tiny(vocab_size=2000)
    exact, _ = loss_and_gradients(model, **batch())
    cce_patch(model, filter_eps=2.0**-6)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss, gradients = loss_and_gradients(model, **batch())
        torch.testing.assert_close(loss, exact)
        draws.append(gradients["lm_head.weight"].clone())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---- what is patched, and undoing it ----


def is_patched(model: nn.Module) -> bool:
    return model(**batch()).logits is None


def test_an_instance():
    model, other = tiny(), tiny()
    assert cce_patch(model) is model
    assert is_patched(model) and not is_patched(other)
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, transformers.LlamaForCausalLM)
    cce_unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM and not is_patched(model)


@pytest.mark.parametrize("of", ["model type", "config"])
def test_a_class(of):
    existing = tiny()
    which = "llama" if of == "model type" else existing.config
    original = transformers.LlamaForCausalLM.forward
    assert cce_patch(which) is None
    try:
        assert is_patched(existing) and is_patched(tiny()) and not is_patched(tiny("mistral"))
        cce_patch(which, train_only=True)
        assert not is_patched(existing)  # patched again: the options are the last ones
        cce_patch(existing)
        assert is_patched(existing) and not is_patched(tiny())
        cce_unpatch(existing)
        assert not is_patched(existing)
    finally:
        cce_unpatch(which)
    assert transformers.LlamaForCausalLM.forward is original


def test_a_class_that_inherits_its_forward(monkeypatch):
    class Child(transformers.LlamaForCausalLM):
        pass

    config = tiny().config
    monkeypatch.setattr(transformers, "LlamaForCausalLM", Child)
    cce_patch("llama")
    assert is_patched(Child(config))
    cce_unpatch("llama")
    assert "forward" not in vars(Child)


def test_patching_again_replaces_the_options():
    model = tiny()
    for reduction, shape in (("none", (2, 8)), ("mean", ())):
        assert cce_patch(model, reduction=reduction)(**batch()).loss.shape == shape
    cce_unpatch(model)
    assert type(model) is transformers.LlamaForCausalLM


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(again):
    model = cce_patch(tiny(), impl="cce_exact")
    copied = again(model)
    assert is_patched(copied)
    assert_same(loss_and_gradients(copied, **batch()), loss_and_gradients(model, **batch()))
    cce_unpatch(copied)
    assert is_patched(model) and not is_patched(copied)


def test_saving(tmp_path):
    model = tiny()
    unpatched = {name: x.clone() for name, x in model.state_dict().items()}
    cce_patch(model).save_pretrained(tmp_path)
    assert model.state_dict().keys() == unpatched.keys()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, unpatched[name])


def test_mistakes():
    for bad, message in (({"impl": "magic"}, "impl: .* 'magic'"), ({"reduction": "max"}, "reduction: .* 'max'")):
        with pytest.raises(ValueError, match=message):
            cce_patch(tiny(), **bad)
    with pytest.raises(ValueError, match="model_or_model_type: transformers .* 'lama'"):
        cce_patch("lama")
    with pytest.raises(TypeError, match="model_or_model_type: .* got int"):
        cce_patch(3)
    with pytest.raises(TypeError, match="model_or_model_type: .* got DataParallel .*before it is wrapped"):
        cce_patch(nn.DataParallel(tiny()))
    wrapped = tiny()
    wrapped.forward = wrapped.forward
    with pytest.raises(ValueError, match="forward has been replaced already"):
        cce_patch(wrapped)
    with pytest.raises(ValueError, match="LlamaForCausalLM was not patched"):
        cce_unpatch(tiny())
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
        cce_unpatch("llama")


def test_without_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "cce_ext.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cce_ext\[transformers\]"'):
        importlib.import_module("cce_ext.transformers")


# ---- training ----


def test_gradient_checkpointing():
    model = tiny().train()
    model.gradient_checkpointing_enable()
    compare(model)


def test_compile():
    """One graph, of a family with a softcap; test_operators.py has the loss under other backends."""
    torch._dynamo.reset()
    model = tiny("gemma2", num_hidden_layers=1, use_cache=False)
    unpatched = loss_and_gradients(model, **batch())
    cce_patch(model, impl="cce_exact")
    model.compile(fullgraph=True, backend="eager")
    assert_same(loss_and_gradients(model, **batch()), unpatched)
    assert is_patched(model)


def test_accelerate_bf16(accelerate):
    model = tiny("gemma2")
    expected = loss_and_gradients(model, **batch())
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(cce_patch(model, impl="cce_exact"))
    loss, gradients = loss_and_gradients(prepared, **batch())
    assert loss.dtype == torch.float32
    assert_same((loss, gradients), expected, rtol=0.02)
    with pytest.raises(ValueError, match="forward has been replaced already"):
        cce_patch(model)
    with pytest.raises(ValueError, match="forward has been replaced since, .*unwrap_model.*`del model.forward`"):
        cce_unpatch(model)
    assert is_patched(model)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    del unwrapped.forward
    cce_unpatch(unwrapped)
    assert unwrapped is model and not is_patched(model)
    assert_same(loss_and_gradients(model, **batch()), expected)


def test_a_class_is_unpatched_for_a_wrapped_model_too(accelerate):
    cce_patch("llama")
    try:
        model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny())
        assert "forward" in vars(model) and is_patched(model)
    finally:
        cce_unpatch("llama")
    assert not is_patched(model)


def mean_square(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().square().mean()


@pytest.mark.parametrize("label_smoothing, loss", [(0.1, None), (0.0, mean_square)], ids=["smoothing", "own loss"])
def test_training_without_labels_is_told_once(accelerate, tmp_path, label_smoothing, loss):
    """The Trainer then takes the labels away, and its own loss of the logits."""
    model = cce_patch(tiny())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, label_smoothing_factor=label_smoothing, report_to=[]
    )
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM is in training and was given no labels.*label_smoothing instead.*leave"
    ) as seen:
        transformers.Trainer(model, arguments, train_dataset=Rows(), compute_loss_func=loss).train()
    assert len([w for w in seen if "cce_patch" in str(w.message)]) == 1


def test_nothing_is_told_where_there_is_nothing_to_train():
    model = cce_patch(tiny())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=batch()["input_ids"])
        model.train()
        with torch.no_grad():
            model(input_ids=batch()["input_ids"])
        model(**batch())


class Rows(torch.utils.data.Dataset):
    """Eight sequences with an uneven number of labels; three have none."""

    def __init__(self) -> None:
        self.rows = batch(8)
        self.rows["labels"][1, :6] = -100
        self.rows["labels"][4:7] = -100

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: x[i] for name, x in self.rows.items()}


def trained(model: nn.Module, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of two optimizer steps, of four micro-batches each, some without any label."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.state_dict(), [*losses, trainer.evaluate()["eval_loss"]]


def test_trainer(accelerate, tmp_path):
    """Gradient accumulation weighs the tokens, and not the micro-batches, as in the unpatched Trainer."""
    before = tiny().state_dict()
    weights, losses = trained(cce_patch(tiny(), impl="cce_exact"), tmp_path / "patched")
    expected, expected_losses = trained(tiny(), tmp_path / "unpatched")
    assert losses == pytest.approx(expected_losses, rel=1e-5) and all(map(math.isfinite, losses))
    for name, x in expected.items():
        torch.testing.assert_close(weights[name] - before[name], x - before[name], rtol=1e-3, atol=1e-6)
    assert not torch.equal(expected["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.parametrize("divided", [False, True])
def test_label_smoothing(accelerate, tmp_path, divided):
    """The Trainer's own, of an unpatched model's logits. It has no notice of num_items_in_batch."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1, report_to=[]
    )
    unpatched = tiny()
    expected = transformers.Trainer(unpatched, arguments).compute_loss(unpatched, batch())
    more = {"num_items_in_batch": (batch()["labels"][:, 1:] != -100).sum()} if divided else {}
    model = cce_patch(tiny(), impl="cce_exact", label_smoothing=0.1)
    loss = model(**batch(), **more).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, x), y in zip(model.named_parameters(), unpatched.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_label_smoothing_of_a_model_with_a_softcap():
    model = cce_patch(tiny("gemma2"), label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 with softcap="):
        model(**batch())
    with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 1\), got 2"):
        cce_patch(tiny(), label_smoothing=2)


# ---- PEFT ----


def with_lora(model: nn.Module | None = None, **options) -> nn.Module:
    """Of a PEFT model: adapters are random, for B begins at zero and A's gradient then is."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
    model = peft.get_peft_model(model or tiny(), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


LORA = [
    {"target_modules": ["q_proj", "fc2"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["lm_head"], "lora_dropout": 0.4},
    {"target_modules": ["lm_head"], "bias": "all", "lora_bias": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("options", LORA, ids=str)
def test_lora(options):
    """On a head with a bias."""
    model = with_lora(tiny("phi"), **options).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in options:
            module.p = 0.0
    compare(model)
    named = dict(model.named_parameters())
    assert all((named[name].grad is not None) == named[name].requires_grad for name in named)
    cce_unpatch(model)
    assert not is_patched(model)


def test_patched_before_lora():
    model = with_lora(cce_patch(tiny(), impl="cce_exact"), target_modules=["q_proj", "lm_head"])
    assert is_patched(model)
    patched = loss_and_gradients(model, **batch())
    cce_unpatch(model)
    assert_same(patched, loss_and_gradients(model, **batch()))


@pytest.mark.parametrize("options", LORA[1::3], ids=str)
def test_two_adapters_merged_and_disabled(options):
    model = with_lora(**options)
    model.add_adapter("other", model.peft_config["default"])
    for adapters in (["other"], ["default"], ["default", "other"][: 1 if "modules_to_save" in options else 2]):
        model.base_model.set_adapter(adapters)
        compare(model)
        cce_unpatch(model)
    with model.disable_adapter():
        unpatched = model(**batch()).loss
        torch.testing.assert_close(cce_patch(model, impl="cce_exact")(**batch()).loss, unpatched)
    enabled = model(**batch()).loss
    assert not torch.isclose(enabled, unpatched)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch()).loss, enabled)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, unpatched)


def test_adapters_of_lm_head_that_are_refused():
    model = cce_patch(with_lora(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(NotImplementedError, match="lm_head: LoRA's Dora.* cannot be served"):
        model(**batch())
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    model = cce_patch(peft.get_peft_model(tiny(), config))
    with pytest.raises(NotImplementedError, match="lm_head: PEFT's peft.tuners.ia3.* cannot be served"):
        model(**batch())
