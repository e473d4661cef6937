"""cce_ext.verl, against dense torch. verl itself is not part of it: a stand-in calls the function as its models do."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cce_ext.verl import linear_cross_entropy

VOCAB, WIDTH = 301, 24
# In verl's order, which its models rely on.
PARAMETERS = ["hidden", "weight", "labels", "temperature", "reduction", "dist_process_group"]


def problem(*shape: int, dtype=torch.float64):
    torch.manual_seed(len(shape))
    hidden, weight = torch.randn(*shape, WIDTH, dtype=dtype), torch.randn(VOCAB, WIDTH, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCAB, shape)


def dense(hidden, weight, labels, temperature=1.0):
    logp = F.log_softmax(hidden.flatten(0, -2) @ weight.T / temperature, -1)
    return logp.gather(-1, labels.reshape(-1, 1))[:, 0], -(logp.exp() * logp).sum(-1)


def assert_same(found, expected, *leaves):
    """Values, and the gradients of both outputs together."""
    torch.testing.assert_close(found, expected)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x) for x in found]
    gradients = [torch.autograd.grad(outputs, leaves, weights, retain_graph=True) for outputs in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_signature():
    parameters = inspect.signature(linear_cross_entropy).parameters
    assert [name for name, x in parameters.items() if x.kind is x.POSITIONAL_OR_KEYWORD] == PARAMETERS
    assert [parameters[name].default for name in PARAMETERS[3:]] == [1.0, "none", None]


@pytest.mark.parametrize("shape", [(7,), (1, 9), (3, 5), (1,)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens(shape, temperature):
    """Flat whatever the shape was, as verl's are."""
    hidden, weight, labels = problem(*shape)
    found = linear_cross_entropy(hidden, weight, labels, temperature, "none", impl="cce_exact")
    assert [x.shape for x in found] == [(labels.numel(),)] * 2
    assert_same(found, dense(hidden, weight, labels, temperature), hidden, weight)


def test_megatrons_layout():
    """hidden is [T, 1, D], labels are [1, T]."""
    hidden, weight, labels = problem(9)
    found = linear_cross_entropy(hidden[:, None], weight, labels[None], 1.3, impl="cce_exact")
    assert_same(found, dense(hidden, weight, labels, 1.3), hidden, weight)


@pytest.mark.parametrize("reduction", ["sum", "mean", "Mean"])
def test_reductions(reduction):
    """Of the log-probabilities alone."""
    hidden, weight, labels = problem(2, 6)
    found = linear_cross_entropy(hidden, weight, labels, 0.9, reduction, impl="cce_exact")
    logprobs, entropy = dense(hidden, weight, labels, 0.9)
    expected = getattr(logprobs, reduction.lower())(), entropy
    assert_same(found, expected, hidden, weight)


def test_none_is_the_default():
    hidden, weight, labels = problem(6)
    found = linear_cross_entropy(hidden, weight, labels, None, None, None)
    torch.testing.assert_close(found, dense(hidden, weight, labels))


def test_a_temperature_of_each_token():
    hidden, weight, labels = problem(2, 6)
    temperature = 0.5 + torch.rand(2, 6, dtype=torch.float64)
    found = linear_cross_entropy(hidden, weight, labels, temperature, impl="cce_exact")
    assert_same(found, dense(hidden, weight, labels, temperature.reshape(-1, 1)), hidden, weight)


def test_an_ignored_token():
    """-100, whose hidden state may hold anything."""
    hidden, weight, labels = problem(6)
    with torch.no_grad():
        hidden[2], labels[2] = torch.nan, -100
    for outputs in linear_cross_entropy(hidden, weight, labels, 0.8):
        assert outputs[2] == 0
        gradients = torch.autograd.grad(outputs.sum(), (hidden, weight), retain_graph=True)
        assert all(bool(g.isfinite().all()) for g in gradients) and bool((gradients[0][2] == 0).all())


def test_autocast_and_the_options(monkeypatch):
    hidden, weight, labels = problem(4, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = linear_cross_entropy(hidden, weight, labels, 0.8)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprobs, entropy), dense(hidden, weight, labels, 0.8), rtol=0.02, atol=0.1)
    (logprobs + entropy).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.norm() > 0
    with pytest.raises(ValueError, match="filter_eps"):
        linear_cross_entropy(hidden, weight, labels, filter_eps=0.9)
    with pytest.raises(ValueError, match="impl"):
        linear_cross_entropy(hidden, weight, labels, impl="triton")


def test_mistakes():
    hidden, weight, labels = problem(2, 6)
    with pytest.raises(ValueError, match="reduction: expected one of none, sum, mean, got 'batch'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "batch")
    with pytest.raises(ValueError, match=r"labels: expected 12 of them for hidden of shape \[2, 6, 24\], got \[2, 5\]"):
        linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        linear_cross_entropy(hidden, weight, labels, 0)


# ---- in verl's place ----

KERNEL = "verl.utils.kernel.linear_cross_entropy"


class Model(nn.Module):
    """What verl's forward_with_triton_backend does with a causal LM: the function is looked up at each call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids, temperature):
        linear_cross_entropy = sys.modules[KERNEL].linear_cross_entropy
        rolled = torch.roll(input_ids, shifts=-1, dims=-1)
        return linear_cross_entropy(self.embed(input_ids), self.lm_head.weight, rolled, temperature, "none")


def test_the_recipe_of_the_docs(monkeypatch):
    """docs/integrations.md, with a stand-in for verl's module."""

    def triton_only(*args):
        raise RuntimeError("verl's kernels need a GPU")

    for name in ("verl", "verl.utils", "verl.utils.kernel", KERNEL):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, sys.modules[name])
    sys.modules[KERNEL].linear_cross_entropy = triton_only
    model, ids = Model(), torch.randint(VOCAB, (1, 16))
    with pytest.raises(RuntimeError, match="need a GPU"):
        model(ids, 0.7)
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    exec(text.split("## verl\n", 1)[1].split("```python\n", 1)[1].split("```", 1)[0], {})
    logprobs, entropy = model(ids, 0.7)
    expected = dense(model.embed(ids), model.lm_head.weight, ids.roll(-1, -1), 0.7)
    torch.testing.assert_close((logprobs, entropy), expected)
    (logprobs.sum() - 0.01 * entropy.sum()).backward()
    assert model.lm_head.weight.grad.norm() > 0
