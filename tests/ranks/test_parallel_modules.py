"""Modules that own the classifier: parallelize_module, fully_shard, ZeRO-3."""

from __future__ import annotations

import pytest
import torch
from support.sharded import DEVICE, VOCAB, WIDTH, R, S, problem, sequences, two_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from cce_ext import linear_cross_entropy
from cce_ext.distributed import LossParallel


class Head(nn.Linear):
    """A classifier that computes its loss."""

    def __init__(self, options=None) -> None:
        torch.manual_seed(3)
        super().__init__(WIDTH, VOCAB)
        self.to(DEVICE)
        self.options = {"impl": "cce_exact", **(options or {})}

    def forward(self, e, targets):
        return linear_cross_entropy(e, self.weight, targets, self.bias, **self.options)


class Model(nn.Module):
    def __init__(self, options=None) -> None:
        super().__init__()
        self.head = Head(options)
        self.body = nn.Linear(WIDTH, WIDTH).to(DEVICE)

    def forward(self, x, targets):
        return self.head(torch.tanh(self.body(x)), targets)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    p = sequences(problem(torch.float32))
    return p.e, p.targets


def whole_model() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the model in one process."""
    model = Model({"impl": "reference"})
    loss = model(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_model(model: nn.Module, loss: torch.Tensor) -> None:
    expected, grads = whole_model()
    torch.testing.assert_close(loss.detach(), expected)
    for name, p in model.named_parameters():
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(got, grads[name], rtol=1e-4, atol=1e-6)


def check_parallel_model(mesh, layout, compiler=lambda head: head):
    model = Model()
    parallelize_module(model, mesh, {"head": LossParallel(e_layout=layout)})
    x, targets = batch()
    h = torch.tanh(model.body(x))
    h = DTensor.from_local(h, mesh, [R]).redistribute(placements=[layout]).to_local()
    loss = compiler(model.head)(h, targets)
    loss.backward()
    assert_model(model, loss)


@pytest.mark.parametrize("layout", [R, S(1)], ids=["whole_e", "sequence_parallel"])
def test_parallelize_module(mesh, layout):
    check_parallel_model(mesh, layout)


@two_ranks
def test_compiled_parallel_module(mesh, compiles):
    check_parallel_model(mesh, S(1), lambda head: torch.compile(head, backend="aot_eager", fullgraph=True))


def test_loss_parallel_wants_two_arguments(mesh):
    head = parallelize_module(Head(), mesh, LossParallel())
    with pytest.raises(ValueError, match=r"LossParallel: expected forward\(e, targets\), got 1 positional"):
        head(batch()[0], targets=batch()[1])


def test_fully_shard(mesh):
    """c is whole in the forward of the module that owns it, and a stray shard outside of it."""
    model = Model({"mean_group": mesh.get_group()})
    fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x, targets = (t.tensor_split(mesh.size())[mesh.get_local_rank()] for t in batch())
    loss = model(x, targets)
    loss.backward()
    mean = loss.detach() / mesh.size()
    dist.all_reduce(mean)
    assert_model(model, mean)
    model.head.reshard()
    with pytest.raises(ValueError, match="fully_shard has sharded c"):
        linear_cross_entropy(x, model.head.weight, targets)


def test_fully_shard_of_a_parallel_module(mesh_2d):
    """TorchTitan's order: tensor parallel, then FSDP over the data-parallel dimension."""
    tp, dp = mesh_2d["tp"], mesh_2d["dp"]
    model = Model({"mean_group": dp.get_group()})
    parallelize_module(model, tp, {"head": LossParallel()})
    fully_shard(model.head, mesh=dp)
    x, targets = (t.tensor_split(2)[dp.get_local_rank()] for t in batch())
    loss = model(x, targets)
    # As who adds a z-loss may write it: autograd refuses it of a DTensor's view.
    loss += 0.0
    loss.backward()
    for p in model.body.parameters():
        dist.all_reduce(p.grad, group=dp.get_group())
        p.grad /= 2
    mean = loss.detach() / 2
    dist.all_reduce(mean, group=dp.get_group())
    assert_model(model, mean)
    model.head.reshard()
    weight = model.head.weight
    e, targets = (distribute_tensor(t, weight.device_mesh, [R, R]) for t in batch())
    with pytest.raises(ValueError, match=r"c: expected Shard\(0\) over one mesh dimension at most.*fully_shard"):
        linear_cross_entropy(e, weight, targets)


def test_a_classifier_that_is_gathered_for_a_while():
    """As DeepSpeed ZeRO-3 does it: the parameter is empty but in its module's forward and backward."""
    head = Head()
    whole = head.weight.data

    def gather(*_):
        head.weight.data = whole

    def release(*_):
        head.weight.data = whole.new_empty(0)

    release()
    e, targets = batch()
    with pytest.raises(ValueError, match=r"c: expected \[V, 16\] .* got \[0\].*ZeRO-3"):
        head(e, targets)
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    e.requires_grad_()
    loss = head(e, targets)
    gather()
    loss.backward()
    d_c = torch.autograd.grad(linear_cross_entropy(e, head.weight, targets, head.bias, impl="reference"), head.weight)[
        0
    ]
    torch.testing.assert_close(head.weight.grad, d_c, rtol=1e-4, atol=1e-6)
