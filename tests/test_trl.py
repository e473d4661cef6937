"""cce_ext.trl: with TRL's own trainers where TRL is installed, and with a stand-in for what it looks at in TRL."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support import trainers
from support.scripts import exit_of
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from support import models  # noqa: E402

from cce_ext.transformers import cce_patch, cce_unpatch  # noqa: E402

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason='TRL is not installed: pip install "trl==1.16.*"'
)


@pytest.fixture
def stub(monkeypatch):
    """cce_ext.trl on the stand-in."""
    trainers.install_stub(monkeypatch)
    return trainers.fresh_import(monkeypatch)


@pytest.fixture
def ours(accelerate, monkeypatch):
    """cce_ext.trl on TRL itself, which is left as it was."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # TrainingArguments of Transformers 4.57 leave bf16 there
    module = importlib.import_module("cce_ext.trl")
    own = module.ChunkedLogProbFunction
    assert module.utils._ChunkedLogProbFunction is own
    yield module
    module.utils._ChunkedLogProbFunction = own


# ---- TRL's function ----


def inputs(n: int, dtype=torch.float32, bias: bool = True, v: int = 301, d: int = 24):
    torch.manual_seed(n)
    leaves = [torch.randn(n, d), torch.randn(v, d), *([torch.randn(v)] if bias else [])]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    return leaves, torch.randint(v, (n,))


def outcome(function, leaves, targets, *rest):
    """The five outputs, and gradients of log-probabilities and, where it is there, entropy together."""
    found = function.apply(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, targets, *rest)
    torch.manual_seed(9)
    loss = sum((x * torch.randn(len(targets))).sum() for x in found[:2] if x is not None)
    return found, torch.autograd.grad(loss, leaves)


@needs_trl
@pytest.mark.parametrize(
    ("n", "bias", "rest"),
    [
        (37, False, (1.0, 32768)),
        (37, True, (0.7, 100, None, 1.0)),
        (1, True, (1.3, 100, 2.0, 0.25)),
        (5, False, (0.7, 100, 2.0, 1.5, ("log_probs",))),
        (5, True, (0.7, 100, None, 3.0, ("log_probs", "is_top1", "entropy"))),
        (5, True, (0.7, 100, None, 1.0, ("log_sum_sq_probs", "mean_logits"))),
        (0, True, (0.7, 100, None, 1.0)),
    ],
    ids=["plain", "temperature", "one_token_softcap", "log_probs", "scale", "statistics", "no_token"],
)
def test_the_function(ours, n, bias, rest):
    """TRL's, of positional arguments as its trainers give them."""
    leaves, targets = inputs(n, bias=bias)
    if n:
        with torch.no_grad():
            targets[0] = nn.functional.linear(*leaves)[0].argmax()  # one that is_top1 finds
    function = ours.LinearLogProbFunction("cce_exact", "auto")
    found, gradients = outcome(function, leaves, targets, *rest)
    expected, expected_gradients = outcome(ours.ChunkedLogProbFunction, leaves, targets, *rest)
    for x, of in zip(found, expected, strict=True):
        assert (x is None) == (of is None)
        if of is not None:
            assert x.dtype == of.dtype and x.requires_grad == of.requires_grad
            torch.testing.assert_close(x, of, rtol=1e-5, atol=2e-5)
    assert n == 0 or found[4] is None or bool(found[4][0])
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


@needs_trl
def test_dtypes(ours):
    """Autocast's, an fp32 head over bf16 weights (cast_lm_head_to_fp32), and bf16 hidden states over an fp32 head."""
    function = ours.LinearLogProbFunction("cce_exact", "auto")
    (e, c, bias), targets = inputs(9)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradients = outcome(function, (e, c, bias), targets, 0.8, 100)
        expected, expected_gradients = outcome(ours.ChunkedLogProbFunction, (e, c, bias), targets, 0.8, 100)
    assert all(g.dtype == torch.float32 for g in gradients)
    # TRL rounds logits to bf16.
    torch.testing.assert_close(found[0], expected[0], rtol=0.02, atol=0.15)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0.1, atol=0.2)
    for of_hidden, of_head in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        leaves = [x.detach().to(of_head).requires_grad_() for x in (c, bias)]
        hidden = e.detach().to(of_hidden).requires_grad_()
        found, gradients = outcome(function, (hidden, *leaves), targets, 0.8, 100)
        computed = [x.detach().to(of_hidden).requires_grad_() for x in (hidden, *leaves)]
        expected, expected_gradients = outcome(function, computed, targets, 0.8, 100)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert [g.dtype for g in gradients] == [of_hidden, of_head, of_head]
        torch.testing.assert_close([g.to(of_hidden) for g in gradients], list(expected_gradients), rtol=0.01, atol=0.01)


@needs_trl
@pytest.mark.parametrize(
    ("family", "on_gpu", "nothing_counts"),
    [
        *((family, False, False) for family in ("llama", "gemma2", "cohere", "granite", "phi")),
        ("llama", True, False),
        ("llama", True, True),
        ("llama", False, True),
    ],
    ids=["llama", "gemma2", "cohere", "granite", "phi", "as_on_a_gpu", "none_as_on_a_gpu", "none"],
)
def test_a_fused_head(ours, monkeypatch, family, on_gpu, nothing_counts):
    """add_fused_lm_head's own forward: softcaps, scales, a bias, ignored tokens and a row that has no others.

    On a GPU it leaves out the tokens that are ignored, elsewhere it masks what is found of them.
    """
    outputs = ("log_probs", *trainers.OUTPUTS)
    model, batch = models.tiny(family), models.batch(rows=3)
    batch["labels"][0 if nothing_counts else 2 :] = -100
    monkeypatch.setattr(ours.utils, "_use_triton", lambda device: on_gpu)
    ours.utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)

    def scored():
        model.zero_grad()
        out = model(**batch, fused_lm_head=True)
        (out.loss + out.entropy.sum()).backward()
        return {name: out[name] for name in ("loss", *outputs)}, {n: p.grad for n, p in model.named_parameters()}

    expected, expected_gradients = scored()
    calls = trainers.counted(monkeypatch, ours)
    ours.patch("cce_exact")
    found, gradients = scored()
    assert len(calls) == 1 and calls[0]["temperature"] == 0.7
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-4)
    assert bool((found["log_probs"][2] == 0).all())


@needs_trl
@pytest.mark.parametrize("seed", [0, 1])
def test_compiled(ours, seed):
    """A compiled model takes ours, whichever it was compiled with first."""
    torch._dynamo.reset()
    model, batch = models.tiny(), models.batch()
    ours.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(**batch, fused_lm_head=True) if seed else model(**batch, fused_lm_head=True)
    ours.patch("cce_exact")
    found = compiled(**batch, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    torch.testing.assert_close(found.entropy, expected.entropy)
    assert "LinearLogProb" not in str(expected.log_probs.grad_fn)
    found.loss.backward()


# ---- its trainers ----


def both(ours, monkeypatch, tmp_path: Path, name: str, *, late: bool = False, evaluate: bool = False, **options):
    """What is logged with TRL's own function, and with ours; and our calls."""
    expected = trainers.metrics(trainers.trainer(name, tmp_path / "own", **options), evaluate)
    calls = trainers.counted(monkeypatch, ours)
    if not late:
        ours.patch("cce_exact")
    made = trainers.trainer(name, tmp_path / "ours", **options)
    if late:
        ours.patch("cce_exact")
    return trainers.metrics(made, evaluate), expected, calls


@needs_trl
@pytest.mark.parametrize(
    ("name", "options", "asked"),
    [
        ("sft", {"gradient_accumulation_steps": 2}, {"entropy", "is_top1"}),
        ("sft", {"loss_type": "dft", "max_steps": 1}, {"entropy", "is_top1"}),
        ("dpo", {}, {"entropy", "mean_logits", "is_top1"}),
        ("dpo", {"use_weighting": True, "max_steps": 1}, {"entropy", "mean_logits", "is_top1", "log_sum_sq_probs"}),
        ("kto", {}, {"entropy", "mean_logits"}),
        ("grpo", {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "num_iterations": 2}, {"entropy"}),
        ("grpo", {"cast_lm_head_to_fp32": True, "max_steps": 1, "beta": 0.0}, {"entropy"}),
        ("rloo", {}, {"entropy"}),
    ],
    ids=["sft", "sft_dft", "dpo", "dpo_weighted", "kto", "grpo", "grpo_fp32_head", "rloo"],
)
def test_a_trainer(ours, monkeypatch, tmp_path, name, options, asked):
    """Losses, gradients' norms and metrics are TRL's own to 4 digits, in training and in evaluation."""
    evaluate = name in ("sft", "dpo", "kto")
    found, expected, calls = both(ours, monkeypatch, tmp_path, name, evaluate=evaluate, **options)
    trainers.compare(found, expected)
    assert found[0]["grad_norm"] > (1e-4 if "use_weighting" in options else 0.1)
    assert set().union(*(call["outputs"] for call in calls)) == asked
    assert {call["temperature"] for call in calls} == {0.8 if name in ("grpo", "rloo") else 1.0}
    if name in ("dpo", "kto", "rloo"):  # the reference model asks for no more
        assert any(call["outputs"] == () for call in calls)


@needs_trl
def test_patched_after_the_trainer_was_made(ours, monkeypatch, tmp_path):
    found, expected, calls = both(ours, monkeypatch, tmp_path, "sft", late=True)
    trainers.compare(found, expected)
    assert len(calls) == 2
    ours.unpatch()
    made = trainers.trainer("sft", tmp_path / "again")
    trainers.compare(trainers.metrics(made), expected)
    assert len(calls) == 2


@needs_trl
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_peft_checkpointing_and_bf16(ours, monkeypatch, tmp_path, name):
    """LoRA, without lm_head's gradient; TRL's own rounds its logits, by which they differ."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 1}
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    found, expected, calls = both(ours, monkeypatch, tmp_path, name, peft_config=lora, **options)
    assert calls and found[0]["grad_norm"] > 0
    for entry, of in zip(found, expected, strict=True):
        assert entry.keys() == of.keys()
        for metric in {"loss", "entropy", "kl"} & entry.keys():
            assert entry[metric] == pytest.approx(of[metric], rel=0.02, abs=0.02)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=0.05)


@needs_trl
def test_the_sampled_gradient(ours, monkeypatch, tmp_path):
    """The first loss is exact, and so are its metrics; the gradient is TRL's in the mean."""
    policies = [trainers.model(vocab_size=3000) for _ in range(2)]
    made = trainers.trainer("sft", tmp_path / "own", policies[0], max_steps=1)
    expected = trainers.metrics(made)[0]
    calls = trainers.counted(monkeypatch, ours)
    ours.patch(filter_eps=0.25)
    found = trainers.metrics(trainers.trainer("sft", tmp_path / "ours", policies[1], max_steps=1))[0]
    assert calls[0]["impl"] == "cce" and calls[0]["filter_eps"] == 0.25
    for metric in ("loss", "entropy", "mean_token_accuracy"):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.5)
    assert found["grad_norm"] != pytest.approx(expected["grad_norm"], rel=1e-4)


@needs_trl
def test_the_stand_in_is_like_trl(ours):
    """What the other tests run on, where TRL is not installed."""
    import inspect

    for function in (ours.ChunkedLogProbFunction, trainers.ChunkedLogProbFunction):
        assert tuple(inspect.signature(function.forward).parameters)[1:] == ours._CALL
    assert tuple(ours.OPTIONAL_OUTPUTS) == trainers.OUTPUTS


@needs_trl
@pytest.mark.parametrize(
    ("script", "metrics"),
    [("trl_sft.py", ("loss", "entropy", "mean_token_accuracy")), ("trl_grpo.py", ("reward", "entropy", "grad_norm"))],
)
def test_an_example(ours, monkeypatch, capsys, script, metrics):
    """It prints TRL's metrics, which are the same with TRL's own function."""
    printed: dict[str, dict[str, float]] = {}
    calls = trainers.counted(monkeypatch, ours)
    for impl in ("trl", "cce_exact"):
        assert exit_of(script, ("--impl", impl, "--steps", "1"), monkeypatch) == 0
        found = re.findall(r"(\w+) (-?[\d.]+)(?:,|$)", capsys.readouterr().out, re.MULTILINE)
        printed[impl] = {metric: float(x) for metric, x in found}
        assert bool(calls) == (impl == "cce_exact")
    assert {*metrics} <= printed["trl"].keys()
    assert printed["cce_exact"] == pytest.approx(printed["trl"], rel=1e-4, abs=0.0011)


# ---- a patched model in a trainer ----


def fused(utils, model):
    """As a trainer's constructor does."""
    utils.add_fused_lm_head(model)
    return model


@pytest.fixture(params=["stub", pytest.param("trl", marks=needs_trl)])
def either(request):
    return request.getfixturevalue("stub" if request.param == "stub" else "ours")


NOT_IN_USE = r"cce_patch is not in use: this LlamaForCausalLM .* call cce_ext.trl.patch\(\) instead"


def test_a_patched_model_says_that_it_is_not_in_use(either):
    model = cce_patch(models.tiny())
    with pytest.warns(UserWarning, match=NOT_IN_USE) as warned:
        fused(either.utils, model)
    assert len(warned) == 1
    model = cce_patch(models.tiny())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward = nn.Identity()  # another has another's say
        either.patch()
        fused(either.utils, cce_patch(models.tiny()))  # it is linear_logprobs that scores


def test_a_patched_class_says_so_as_well(either):
    cls = transformers.LlamaForCausalLM
    before = dict(vars(cls))
    cce_patch("llama")
    cce_patch("llama", impl="cce_exact")
    with pytest.warns(UserWarning, match=NOT_IN_USE) as warned:
        fused(either.utils, models.tiny())
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=NOT_IN_USE) as warned:
        fused(either.utils, cce_patch(models.tiny()))  # patched by itself too
    assert len(warned) == 1
    cce_unpatch("llama")
    assert dict(vars(cls)) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(either.utils, models.tiny())


def test_a_model_of_a_trainer_is_refused(either, accelerate):
    model = fused(either.utils, models.tiny())
    for _ in range(2):
        with pytest.raises(ValueError, match="has the fused lm_head of TRL.* call cce_ext.trl.patch"):
            cce_patch(model)
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


@needs_trl
def test_a_patched_model_in_a_trainer(ours, monkeypatch, tmp_path):
    """It trains as an unpatched one, and has said so."""
    expected = trainers.metrics(trainers.trainer("sft", tmp_path / "own", max_steps=1))
    with pytest.warns(UserWarning, match=NOT_IN_USE):
        made = trainers.trainer("sft", tmp_path / "ours", cce_patch(trainers.model()), max_steps=1)
    trainers.compare(trainers.metrics(made), expected)


# ---- mistakes, and another TRL ----


def test_patch_and_unpatch(stub):
    utils, own = stub.utils, stub.ChunkedLogProbFunction
    with pytest.raises(ValueError, match="TRL is not patched"):
        stub.unpatch()
    stub.patch()
    stub.patch("cce_exact", filter_eps=None)
    assert utils._ChunkedLogProbFunction.impl == "cce_exact" and utils._ChunkedLogProbFunction.filter_eps is None
    stub.unpatch()
    assert utils._ChunkedLogProbFunction is own
    utils._ChunkedLogProbFunction = dict
    for call in (stub.patch, stub.unpatch):
        with pytest.raises(RuntimeError, match="expected TRL's own or cce_ext.trl's, got <class 'dict'>"):
            call()


def test_the_recipe_of_the_docs(either):
    """docs/integrations.md."""
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    exec(text.split("## TRL\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0], {})
    assert isinstance(either.utils._ChunkedLogProbFunction, either.LinearLogProbFunction)


def test_mistakes(stub):
    for options in ({"impl": "liger"}, {"filter_eps": 0.9}):
        with pytest.raises(ValueError, match=next(iter(options))):
            stub.patch(**options)
    assert stub.utils._ChunkedLogProbFunction is stub.ChunkedLogProbFunction
    leaves, targets = inputs(3)
    function = stub.LinearLogProbFunction("cce", "auto")
    with pytest.raises(NotImplementedError, match="not find it in TRL 1.16.0 .*add_fused_lm_head asks for varentropy"):
        function.apply(*leaves, targets, 1.0, 100, None, 1.0, ("log_probs", "varentropy"))
    leaves[1].ds_id = 4  # as DeepSpeed's ZeRO-3 marks a parameter
    with pytest.raises(NotImplementedError, match="ZeRO-3 frees its weight"):
        function.apply(*leaves, targets, 1.0, 100)
    with torch.no_grad():
        assert function.apply(*leaves, targets, 1.0, 100)[0].shape == (3,)


class OfOlderVersions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, last_hidden, weight, targets, temperature, chunk_size): ...


def other_head(model, temperature=1.0): ...


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"add_fused_lm_head": None, "version": "1.6.0"},
            "not find it in TRL 1.6.0 .*cannot import name 'add_fused",
        ),
        ({"function": OfOlderVersions}, "is not called with hidden, .*, but last_hidden, weight, targets"),
        ({"outputs": (*trainers.OUTPUTS, "varentropy")}, "its outputs are not .*, but .*, varentropy"),
        ({"outputs": trainers.OUTPUTS[::-1]}, "its outputs are not entropy, .*, but is_top1"),
        ({"add_fused_lm_head": other_head}, "does not call trl.trainer.utils._ChunkedLogProbFunction"),
    ],
    ids=["no_fused_head", "another_call", "another_output", "another_order", "another_hook"],
)
def test_another_trl(monkeypatch, replaced, message):
    trainers.install_stub(monkeypatch, **replaced)
    with pytest.raises(ImportError, match=message) as raised:
        trainers.fresh_import(monkeypatch)
    assert 'pip install "trl==1.16.*"' in str(raised.value)


def test_the_hook_is_gone(monkeypatch):
    utils = trainers.install_stub(monkeypatch)
    del utils._ChunkedLogProbFunction
    with pytest.raises(ImportError, match="does not call trl.trainer.utils._ChunkedLogProbFunction"):
        trainers.fresh_import(monkeypatch)


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs TRL 1.16.*pip install "trl==1.16'):
        trainers.fresh_import(monkeypatch)
