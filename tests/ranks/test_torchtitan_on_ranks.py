"""cce_ext.torchtitan with torchtitan's own model, FSDP2 and tensor parallelism."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.sharded import two_ranks
from support.titan import forward_backward
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

for _name in ("torchtitan", "triton"):  # torchtitan's models import triton
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"{_name} is not installed: pip install {_name}", allow_module_level=True)

TOKENS = 16


def llama(tied: bool):
    """Llama 3 without layers: their attention has no backward on a CPU."""
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel").model
    config.layers, config.enable_weight_tying = [], tied
    return config


def built(config):
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
    return model


def batch(vocab: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(vocab, (2, rows, TOKENS))
    labels[0, :5] = -100
    return tokens, labels


def whole(config, tokens, labels, valid):
    """torchtitan's own loss of all tokens in one process."""
    from torchtitan.components.loss import CrossEntropyLoss

    model = built(config)
    loss, _ = forward_backward(model, CrossEntropyLoss.Config().build(compile_config=None), tokens, labels, valid)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def our_loss(model):
    """As the trainer starts with it."""
    from torchtitan.components.loss import ChunkedLossWrapper

    from cce_ext.torchtitan import CCELoss

    loss_fn = CCELoss.Config(impl="cce_exact").build(compile_config=None)
    assert isinstance(loss_fn, ChunkedLossWrapper)
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    return loss_fn


def assert_grads(model, expected) -> None:
    for name, p in model.named_parameters():
        got = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tied", "alone"), [(True, False), (False, False), (False, True)], ids=["tied", "untied", "head_alone"]
)
def test_fsdp(mesh, ranks, tied, alone):
    """Two steps, and a validation after them: each rank its rows, and the sum of what they give.

    torchtitan has lm_head in one unit with the norm, whose call gathers the weight too; alone only its own call does.
    """
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder, disable_fsdp_gradient_division

    config = llama(tied)
    tokens, labels = batch(config.vocab_size, 2 * ranks)
    valid = (labels != -100).sum()
    expected, grads = whole(config, tokens, labels, valid)
    model = built(config)
    float32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    if alone:
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        disable_fsdp_gradient_division(model)
    else:
        apply_fsdp_to_decoder(model, mesh, pp_enabled=False, **float32)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # torchtitan asks for a sum of 1.0 times, which gloo has not
    loss_fn = our_loss(model)
    rows = [x.tensor_split(ranks)[mesh.get_local_rank()] for x in (tokens, labels)]
    for _ in range(2):
        model.zero_grad()
        loss, metrics = forward_backward(model, loss_fn, *rows, valid)
        assert_grads(model, grads)
    with torch.no_grad():
        held_out, _ = loss_fn(model(rows[0]), rows[1])
    for x in (loss, held_out):
        dist.all_reduce(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(held_out, expected * valid)
    assert metrics == {}


@two_ranks
@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence_parallel", "whole_sequence"])
def test_tensor_parallel(monkeypatch, ranks, sequence_parallel):
    from torchtitan.distributed import parallel_dims, utils
    from torchtitan.models.common import decoder_sharding

    config = llama(False)
    tokens, labels = batch(config.vocab_size, 2)
    valid = (labels != -100).sum()
    expected, grads = whole(config, tokens, labels, valid)
    monkeypatch.setattr(parallel_dims, "device_type", "cpu")
    monkeypatch.setattr(utils, "_spmd_backend", "partial_dtensor")
    decoder_sharding.set_decoder_sharding_config(config, enable_sp=sequence_parallel)
    dims = parallel_dims.ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=ranks, pp=1, ep=1, world_size=ranks, spmd_backend="partial_dtensor"
    )
    model = built(config)
    model.parallelize(dims)
    loss, _ = forward_backward(model, our_loss(model), tokens, labels, valid)
    assert type(loss) is torch.Tensor
    torch.testing.assert_close(loss, expected)
    assert_grads(model, grads)


def default_dims(monkeypatch, ranks: int, tp: int):
    """The trainer's meshes on gloo, with its default backend."""
    from torchtitan.distributed import parallel_dims, utils

    monkeypatch.setattr(parallel_dims, "device_type", "cpu")
    monkeypatch.setattr(utils, "_spmd_backend", "spmd_types")
    return parallel_dims.ParallelDims(
        dp_replicate=1, dp_shard=ranks // tp, cp=1, tp=tp, pp=1, ep=1, world_size=ranks, spmd_backend="spmd_types"
    )


@two_ranks
def test_the_default_backend(monkeypatch, mesh, ranks):
    """spmd_types, in which torchtitan wraps lm_head's forward; then FSDP2.

    FSDP2 is given the data-parallel mesh alone. torchtitan gives it all dimensions, which PyTorch 2.13 takes for
    DTensors only.
    """
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
    from torchtitan.distributed.utils import get_spmd_context
    from torchtitan.models.common import decoder_sharding

    config = llama(False)
    tokens, labels = batch(config.vocab_size, 2 * ranks)
    valid = (labels != -100).sum()
    expected, grads = whole(config, tokens, labels, valid)
    decoder_sharding.set_decoder_sharding_config(config, enable_sp=False)
    dims = default_dims(monkeypatch, ranks, tp=1)
    model = built(config)
    model.parallelize(dims)
    float32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    apply_fsdp_to_decoder(model, mesh, pp_enabled=False, **float32)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    rows = [x.tensor_split(ranks)[dist.get_rank()] for x in (tokens, labels)]
    wrapped = model.lm_head.forward
    with get_spmd_context(parallel_dims=dims)():
        loss, _ = forward_backward(model, our_loss(model), *rows, valid)
    assert model.lm_head.forward is wrapped
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, expected)
    assert_grads(model, grads)


@two_ranks
def test_tensor_parallel_of_the_default_backend_is_refused(monkeypatch, ranks):
    from torchtitan.distributed.utils import get_spmd_context

    dims = default_dims(monkeypatch, ranks, tp=ranks)
    model = built(llama(False))
    loss_fn = our_loss(model)
    with (
        get_spmd_context(parallel_dims=dims)(),
        pytest.raises(NotImplementedError, match='tensor parallelism needs spmd_backend "partial_dtensor"'),
    ):
        loss_fn(torch.zeros(1, 4, 256), torch.zeros(1, 4, dtype=torch.int64))
