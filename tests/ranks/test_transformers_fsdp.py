"""A patched model under fully_shard trains as the unpatched one does in one process."""

from __future__ import annotations

import math

import pytest
import torch
from support.sharded import two_ranks
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.models import VOCAB, tiny  # noqa: E402

from cce_ext.transformers import cce_patch  # noqa: E402

STEPS, TOKENS = 3, 8


def whole_model(model, mesh):
    """One unit."""
    fully_shard(model, mesh=mesh)


def head_alone(model, mesh):
    """lm_head's weight is there in its own call alone."""
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)


def by_accelerate(model, mesh):
    """What the Trainer does with fsdp=True: units of layers, and one of the last norm and lm_head.

    accelerate itself leaves FSDP to GPUs, so that it is given here what it would have there.
    """
    accelerate = pytest.importorskip("accelerate", "1.15", reason="accelerate 1.15 is not installed")
    from accelerate.utils import fsdp_utils

    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    plugin.set_auto_wrap_policy(model)

    class Accelerator:
        state = type("State", (), {"fsdp_plugin": plugin})
        device, mixed_precision, torch_device_mesh, parallelism_config = torch.device("cpu"), "no", None, None
        is_main_process = True

    fsdp_utils.fsdp2_prepare_model(Accelerator(), model)
    assert isinstance(model.lm_head, FSDPModule)


def batches(ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of rows that count for very different numbers of tokens."""
    torch.manual_seed(1)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(VOCAB, (2 * ranks, TOKENS))
        labels = ids.clone()
        labels[0, 1:] = -100
        labels[-1, :3] = -100
        found.append((ids, labels))
    return found


def train(model, ranks: int, rank: int | None = None) -> list[float]:
    """As the Trainer: the sum over the step's tokens, times the ranks, whose gradients FSDP takes the mean of."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids, labels in batches(ranks):
        items = (labels[:, 1:] != -100).sum()
        if rank is not None:
            ids, labels = (x.tensor_split(ranks)[rank] for x in (ids, labels))
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=items).loss
        (loss if rank is None else loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if rank is not None:
            dist.all_reduce(whole)
        losses.append(float(whole))
    return losses


# FSDP2 takes a tied weight in one unit only, so that the head has none of its own.
@pytest.mark.parametrize(
    ("shard", "tied"),
    [(whole_model, True), (whole_model, False), (head_alone, False), (by_accelerate, True), (by_accelerate, False)],
    ids=["whole-tied", "whole-untied", "head_alone-untied", "accelerate-tied", "accelerate-untied"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@two_ranks
def test_trains_as_one_process(mesh, ranks, family, shard, tied):
    torch.manual_seed(0)
    model = tiny(family, tie_word_embeddings=tied)
    own = tiny(family, tie_word_embeddings=tied)
    own.load_state_dict(model.state_dict())
    cce_patch(model, impl="cce_exact", stats=True)
    shard(model, mesh)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    losses = train(model, ranks, mesh.get_local_rank())
    assert losses == pytest.approx(train(own, ranks), rel=1e-5)
    means = model.cce_stats.take(training=False, group=mesh.get_group())
    assert means.tokens == sum((labels[:, 1:] != -100).sum() for _, labels in batches(ranks))
    assert 0 < means.entropy < math.log(VOCAB)
    for (name, p), wanted in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_other_hooks_of_the_head_are_refused(mesh):
    model = cce_patch(tiny("llama", tie_word_embeddings=False))
    fully_shard(model.lm_head, mesh=mesh)
    model.lm_head.register_forward_hook(lambda *_: None)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="hooks besides FSDP2's"):
        model(input_ids=ids, labels=ids)
