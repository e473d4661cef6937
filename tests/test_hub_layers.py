"""cce_ext.layers: the layers that `kernels` puts in the place of a model's own."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cce_ext

LIGERS = (  # kernels-community/liger-kernels at 40d4194, LigerForCausalLMLossLayer.forward
    *("self", "logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"),
    *("hidden_states", "lm_head_weight", "lm_head_bias", "kwargs"),
)
BATCH, TOKENS, WIDTH, VOCAB = 2, 9, 16, 300


def layer() -> nn.Module:
    return cce_ext.layers.CCEForCausalLMLoss()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (BATCH, TOKENS))
    labels[0, :4] = -100
    return {
        "labels": labels,
        "hidden_states": torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True),
        "lm_head_weight": torch.randn(VOCAB, WIDTH, requires_grad=True),
        "lm_head_bias": torch.randn(VOCAB, requires_grad=True),
    }


def dense(x: dict, num_items=None, shift_labels=None, ignore_index=-100, softcap=None, **more) -> Tensor:
    """Transformers' ForCausalLMLoss, written out."""
    logits = F.linear(x["hidden_states"], x["lm_head_weight"], x["lm_head_bias"])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if shift_labels is None:
        logits, shift_labels = logits[:, :-1], x["labels"][:, 1:]
    nll = F.cross_entropy(
        logits.flatten(0, 1),
        shift_labels.flatten(),
        ignore_index=ignore_index,
        reduction="mean" if not num_items else "sum",
        **more,
    )
    return nll if num_items is None else nll / num_items


def assert_same(x: dict, loss: Tensor, expected: Tensor) -> None:
    leaves = [x[name] for name in ("hidden_states", "lm_head_weight", "lm_head_bias")]
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, wanted)


def test_kernels_would_take_it():
    """Its rules (kernels 0.17, layer.py): no constructor, no more members, the signature of what is replaced."""
    cls = cce_ext.layers.CCEForCausalLMLoss
    assert cls.__init__ is nn.Module.__init__
    assert {name for name in dir(cls) if name not in dir(nn.Module)} == {"has_backward", "can_torch_compile"}
    assert tuple(inspect.signature(cls.forward).parameters) == LIGERS
    assert cls.can_torch_compile and cls.has_backward


@pytest.mark.parametrize("num_items", [None, 7])
def test_label_smoothing_and_class_weights(inputs, num_items):
    weight = torch.rand(VOCAB)
    loss = layer()(
        None, impl="cce_exact", num_items_in_batch=num_items, label_smoothing=0.1, ce_weight=weight, **inputs
    )
    assert_same(inputs, loss, dense(inputs, num_items, weight=weight, label_smoothing=0.1))


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_loss(inputs, num_items):
    loss = layer()(None, vocab_size=VOCAB, num_items_in_batch=num_items, impl="cce_exact", hidden_size=WIDTH, **inputs)
    assert_same(inputs, loss, dense(inputs, num_items))


def test_shift_labels_ignore_index_and_softcap(inputs):
    shift_labels = torch.randint(VOCAB, (BATCH, TOKENS)).masked_fill(torch.rand(BATCH, TOKENS) < 0.3, 5)
    more = {"ignore_index": 5, "shift_labels": shift_labels}
    loss = layer()(None, impl="cce_exact", final_logit_softcapping=3.0, **more, **inputs | {"labels": None})
    assert_same(inputs, loss, dense(inputs, softcap=3.0, **more))


def test_the_sampled_gradient_is_the_default(inputs):
    """And its options are linear_cross_entropy's; what a model passes along for others changes nothing."""
    seen, x = [], inputs | {"labels": torch.randint(VOCAB, (BATCH, TOKENS))}
    for options in ({}, {"filter_eps": None}, {"impl": "cce_exact", "cache_position": None, "label_smoothing": 0.0}):
        torch.manual_seed(1)
        loss = layer()(None, **options, **x)
        seen.append(torch.autograd.grad(loss, x["hidden_states"])[0])
    torch.testing.assert_close(seen[1], seen[2])
    torch.manual_seed(1)
    again = cce_ext.linear_cross_entropy(
        x["hidden_states"], x["lm_head_weight"], x["labels"], x["lm_head_bias"], reduction="mean", shift=1
    )
    torch.testing.assert_close(torch.autograd.grad(again, x["hidden_states"])[0], seen[0], rtol=0, atol=0)


def test_compiles_whole(inputs):
    torch._dynamo.reset()
    compiled = torch.compile(layer(), backend="aot_eager", fullgraph=True)
    loss = compiled(None, num_items_in_batch=torch.tensor(7), impl="cce_exact", **inputs)
    assert_same(inputs, loss, dense(inputs, 7))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(1)}, "logits: expected None, got Tensor.*version of transformers.*cce_patch"),
        ({"hidden_states": None}, "hidden_states: expected a tensor, got None.*version of transformers"),
        ({"lm_head_weight": None}, "lm_head_weight: expected a tensor, got None"),
        ({"labels": None}, "expected labels or shift_labels"),
        ({"vocab_size": 7}, "vocab_size: expected the tensors' 300, got 7"),
        ({"hidden_size": 7}, "hidden_size: expected the tensors' 16, got 7"),
        ({"return_token_accuracy": True}, "return_token_accuracy: CCEForCausalLMLoss has no such option"),
        ({"softcap": 3.0}, "softcap: CCEForCausalLMLoss has no such option"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number in"),
        ({"ce_weight": torch.ones(7)}, "weight: "),
        ({"impl": "magic"}, "impl: "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes(inputs, changed, message):
    with pytest.raises(ValueError, match=message):
        layer()(**{"logits": None, **inputs, **changed})


# ---- kernelize ----


class InPlace:
    """The repository of an installed cce_ext: a LayerRepository without a download."""

    def load(self) -> type[nn.Module]:
        return cce_ext.layers.CCEForCausalLMLoss


def marked_model(mark) -> nn.Module:
    """A model that calls a fused loss as LigerForCausalLMLossLayer is called. No model of transformers 5.24 does."""

    @mark("ForCausalLMLoss")
    class Loss(nn.Module):
        def forward(
            self,
            logits,
            labels,
            vocab_size,
            num_items_in_batch=None,
            ignore_index=-100,
            shift_labels=None,
            hidden_states=None,
            lm_head_weight=None,
            lm_head_bias=None,
            **kwargs,
        ):
            x = {"hidden_states": hidden_states, "lm_head_weight": lm_head_weight, "lm_head_bias": lm_head_bias}
            return dense(x | {"labels": labels}, num_items_in_batch)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head, self.loss = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB), Loss()

        def forward(self, hidden, labels, **kwargs):
            head = self.lm_head
            given = {"hidden_states": self.body(hidden), "lm_head_weight": head.weight, "lm_head_bias": head.bias}
            return self.loss(None, labels, VOCAB, **given, hidden_size=WIDTH, **kwargs)

    return Model()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernelize(inputs, compiled):
    """As transformers' kernelize calls it, for training and for torch.compile."""
    kernels = pytest.importorskip("kernels", reason="kernels is not installed: pip install '.[hub]'")
    model = marked_model(kernels.use_kernel_forward_from_hub)
    own = copy.deepcopy(model)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({"ForCausalLMLoss": {"cpu": {mode: InPlace()}}}):
        kernels.kernelize(model, device="cpu", mode=mode, use_fallback=kernels.KernelizeFallback.NONE)
    assert model.loss.forward.__func__ is cce_ext.layers.CCEForCausalLMLoss.forward
    x, labels = inputs["hidden_states"].detach(), inputs["labels"]
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager", fullgraph=True)
    loss, expected = model(x, labels, num_items_in_batch=11, impl="cce_exact"), own(x, labels, num_items_in_batch=11)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(own.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
