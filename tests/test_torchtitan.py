"""cce_ext.torchtitan: with torchtitan itself where it is installed, and with a stand-in for what its trainer calls.

torchtitan's Trainer needs a GPU, so that its steps are written out here (support/titan.py), as of torchtitan 0.3.0.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.titan import ChunkedLossWrapper, compile_config, forward_backward, fresh_import, install_stub
from torch import nn
from torch.nn import functional as F

WIDTH, VOCAB = 16, 300
needs_torchtitan = pytest.mark.skipif(
    importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed: pip install torchtitan"
)


@pytest.fixture(params=["stub", pytest.param("torchtitan", marks=needs_torchtitan)])
def titan(request, monkeypatch):
    """cce_ext.torchtitan on either."""
    if request.param == "stub":
        install_stub(monkeypatch)
    return fresh_import(monkeypatch)


class Model(nn.Module):
    """As torchtitan's Decoder: no lm_head in the forward once the trainer has given it to the loss."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._skip_lm_head = False
        self.tok_embeddings, self.norm = nn.Embedding(VOCAB, WIDTH), nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=not tied)
        if tied:
            self.tok_embeddings.weight = self.lm_head.weight

    def forward(self, tokens):
        h = self.norm(torch.tanh(self.tok_embeddings(tokens)))
        return h if self._skip_lm_head else self.lm_head(h)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(VOCAB, (2, 2, 8))
    labels[0, :3] = -100
    return tokens, labels


def given_to(loss_fn, model: nn.Module) -> nn.Module:
    """What the trainer does at its start."""
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    return model


def dense(pred, labels, valid, **_):
    return F.cross_entropy(pred.flatten(0, 1), labels.flatten(), reduction="sum") / valid, {}


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_step(titan, tied):
    """Loss and gradients of CrossEntropyLoss's, and what the trainer logs of it: a sum of shares, and no metrics."""
    own, model, (tokens, labels) = Model(tied), Model(tied), batch()
    valid = torch.tensor(2 * int((labels != -100).sum()))  # another rank has as many
    loss_fn = titan.CCELoss.Config(impl="cce_exact").build(compile_config=None)
    given_to(loss_fn, model)
    loss, metrics = forward_backward(model, loss_fn, tokens, labels, valid)
    expected, _ = forward_backward(own, dense, tokens, labels, valid)
    assert metrics == {} and type(loss) is torch.Tensor
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads(model), grads(own))
    assert "forward" not in model.lm_head.__dict__ and model.lm_head(torch.zeros(1, WIDTH)).shape == (1, VOCAB)


def test_validation(titan):
    """Without gradients, and without a number of tokens: the sum."""
    model, (tokens, labels) = Model(), batch()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    loss_fn = titan.CCELoss.Config().build()
    given_to(loss_fn, model)
    with torch.no_grad():
        loss, metrics = loss_fn(model(tokens), labels)
    torch.testing.assert_close(loss, expected.detach())
    assert metrics == {} and not loss.requires_grad


def test_packed_tokens_and_options(titan):
    """[T, D] and [T], which newer models give, and a softcap."""
    torch.manual_seed(2)
    head, h = nn.Linear(WIDTH, VOCAB), torch.randn(9, WIDTH, requires_grad=True)
    labels = torch.randint(VOCAB, (9,))
    loss_fn = titan.CCELoss.Config(impl="cce_exact", softcap=3.0).build()
    loss_fn.set_lm_head(head)
    loss, _ = loss_fn(h, labels)
    expected = F.cross_entropy(3.0 * torch.tanh(head(h) / 3.0), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    leaves = (h, *head.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


def test_the_loss_is_compiled_where_it_is_asked_for(titan):
    torch._dynamo.reset()
    own, model, (tokens, labels) = Model(), Model(), batch()
    loss_fn = titan.CCELoss.Config(impl="cce_exact").build(compile_config=compile_config("model", "loss"))
    given_to(loss_fn, model)
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    loss, _ = forward_backward(model, loss_fn, tokens, labels, torch.tensor(13))
    assert torch._dynamo.utils.counters["frames"]["ok"] > compiled
    torch.testing.assert_close(loss, forward_backward(own, dense, tokens, labels, torch.tensor(13))[0])
    torch.testing.assert_close(grads(model), grads(own))


def test_the_trainer_takes_it_for_chunked(titan):
    """Which is how it knows that lm_head goes to the loss."""
    assert issubclass(titan.CCELoss, sys.modules["torchtitan.components.loss"].ChunkedLossWrapper)
    assert isinstance(titan.CCELoss.Config().build(), titan.CCELoss)
    assert "num_chunks" not in titan.CCELoss.Config.__dataclass_fields__


# ---- mistakes ----


class Softcapped(nn.Linear):
    def forward(self, input):
        return torch.tanh(super().forward(input))


def test_mistakes(titan):
    loss_fn = titan.CCELoss.Config().build()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="has no lm_head: call set_lm_head first"):
        loss_fn(torch.zeros(1, 4, WIDTH), tokens)
    with pytest.raises(NotImplementedError, match="got Softcapped with a forward of its own"):
        loss_fn.set_lm_head(Softcapped(WIDTH, VOCAB))
    replaced = nn.Linear(WIDTH, VOCAB)
    replaced.forward = copy.copy
    with pytest.raises(NotImplementedError, match="got Linear with a forward of its own"):
        loss_fn.set_lm_head(replaced)
    loss_fn.set_lm_head(nn.Linear(WIDTH, VOCAB))
    with pytest.raises(TypeError, match="another convention: the loss is given advantages"):
        loss_fn(torch.zeros(1, 4, WIDTH), tokens, advantages=tokens)
    with pytest.raises(ValueError, match="filter_eps"):
        titan.CCELoss.Config(filter_eps=0.9).build()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"backend": "full_dtensor"}, '"full_dtensor" is not supported; use ChunkedLossWrapper'),
        ({"tp": 2}, 'tensor parallelism needs spmd_backend "partial_dtensor", got "spmd_types"'),
        ({"types": True}, "leave type checking out"),
    ],
    ids=["full_dtensor", "tp", "type_checking"],
)
def test_backends(monkeypatch, more, message):
    install_stub(monkeypatch, **more)
    loss_fn = fresh_import(monkeypatch).CCELoss.Config().build()
    loss_fn.set_lm_head(nn.Linear(WIDTH, VOCAB))
    with pytest.raises(NotImplementedError, match=message):
        loss_fn(torch.zeros(1, 4, WIDTH), torch.zeros(1, 4, dtype=torch.int64))


class WithoutHead:
    def __call__(self, pred, labels, global_valid_tokens=None): ...


class OfOlderVersions(ChunkedLossWrapper):
    def __call__(self, pred, labels): ...


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (None, "torchtitan 0.3.0 has another convention: cannot import name 'ChunkedLossWrapper'"),
        (WithoutHead, r"another convention: ChunkedLossWrapper has no set_lm_head\(lm_head\)"),
        (OfOlderVersions, "is not called with pred, labels, global_valid_tokens"),
    ],
    ids=["no_wrapper", "no_set_lm_head", "another_call"],
)
def test_a_moved_convention(monkeypatch, wrapper, message):
    install_stub(monkeypatch)
    loss = sys.modules["torchtitan.components.loss"]
    del loss.ChunkedLossWrapper
    if wrapper is not None:
        loss.ChunkedLossWrapper = wrapper
    with pytest.raises(ImportError, match=message):
        fresh_import(monkeypatch)


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(ModuleNotFoundError, match="cce_ext.torchtitan needs torchtitan 0.3 or newer"):
        fresh_import(monkeypatch)


# ---- with torchtitan's own models ----


@needs_torchtitan
def test_llama(monkeypatch):
    """torchtitan's Llama 3 with its own losses: CrossEntropyLoss and, in 2 chunks, ChunkedLossWrapper.

    Its layers are left out: their attention has no backward on a CPU.
    """
    pytest.importorskip("triton", reason="triton is not installed: torchtitan's models import it")
    titan = fresh_import(monkeypatch)
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.models.llama3 import model_registry

    torch.manual_seed(0)
    config = model_registry("debugmodel").model
    config.layers = []
    model = config.build()
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
    tokens, labels = torch.randint(config.vocab_size, (2, 2, 16))
    labels[1, :5] = -100
    valid = (labels != -100).sum()
    seen = []
    for loss in (
        CrossEntropyLoss.Config(global_vocab_size=config.vocab_size),
        ChunkedLossWrapper.Config(num_chunks=2),
        titan.CCELoss.Config(impl="cce_exact"),
    ):
        loss_fn, copied = loss.build(compile_config=None), copy.deepcopy(model)
        if isinstance(loss_fn, ChunkedLossWrapper):
            given_to(loss_fn, copied)
        seen.append((forward_backward(copied, loss_fn, tokens, labels, valid), grads(copied)))
    for (loss, metrics), gradients in seen[:2]:
        torch.testing.assert_close(seen[2][0][0], loss)
        assert metrics == seen[2][0][1] == {}
        torch.testing.assert_close(seen[2][1], gradients, rtol=1e-4, atol=1e-6)


def test_the_recipe_of_the_docs(titan):
    """docs/integrations.md."""
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    names: dict = {}
    exec(text.split("## torchtitan\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0], names)
    assert isinstance(names["loss"].build(), titan.CCELoss)
