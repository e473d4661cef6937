"""The loss of DTensors, and a style for parallelize_module: docs/distributed.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .options import NAMES, Names, check_weight
from .vocab_parallel import VocabParallelOptions, VocabShard, even_rows

__all__ = ["LossParallel", "VocabParallelOptions"]


class LossParallel(ParallelStyle):
    """For parallelize_module: makes a module that owns a classifier and computes its loss vocabulary-parallel.

    The module's forward takes (e, targets) and gives cce_ext.linear_cross_entropy(e, self.weight, targets, self.bias)
    or a tuple of such results. Its own parameters become Shard(0) over the mesh's one dimension.

    Args:
        e_layout: what a plain e is a rank's part of: Replicate() or Shard(1), sequence parallel, of [batch, length, D].
        targets_layout: the same of plain targets.
        use_local_output: give plain tensors, not DTensors. They are the same on all ranks for a scalar loss.
    """

    def __init__(
        self,
        *,
        e_layout: Placement | None = None,
        targets_layout: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.layouts = (e_layout or Replicate(), targets_layout or Replicate())
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._cut, self._take, self._give)

    def _cut(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            rows = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            module.register_parameter(key, nn.Parameter(rows, requires_grad=parameter.requires_grad))

    def _take(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        if len(inputs) != 2:
            raise ValueError(f"LossParallel: expected forward(e, targets), got {len(inputs)} positional arguments")
        return tuple(
            x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [layout], run_check=False)
            for x, layout in zip(inputs, self.layouts, strict=True)
        )

    def _give(self, module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        if not self.use_local_output:
            return outputs
        # Copies: autograd refuses `loss += ..` of a DTensor's view, and fully_shard warns of one.
        if isinstance(outputs, tuple):
            return tuple(x.to_local().clone() for x in outputs)
        return outputs.to_local().clone()


class Local(NamedTuple):
    """What this rank computes on.

    from_local: turns a per-token tensor [.., T - shift] of it into a DTensor. seed_salt: what the rank's seed is xored
    with, another number on each rank of other tokens or other rows, for DTensors' users seed all ranks alike.
    """

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    shard: VocabShard | None
    from_local: Callable[[Tensor], DTensor]
    seed_salt: int
    weight: Tensor | None
    temperature: Tensor | None
    target_weights: Tensor | None


def localize(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    shift: int,
    temperature: Tensor | None = None,
    target_weights: Tensor | None = None,
    names: Names = NAMES,
) -> Local:
    """This rank's part of the loss of DTensors e [.., D], c [V, D], targets [..], bias [V] and class weights [V].

    temperature: of the targets' shape, or one number. With target_weights, they and targets are [.., K].

    Over a mesh dimension where c is Shard(0) the loss is vocabulary-parallel, and e and targets are gathered if they
    are sharded. Where c is Replicate, tokens stay where e has them. Raises ValueError for what is neither.
    """
    if not isinstance(c, DTensor) or not isinstance(e, DTensor):
        raise ValueError(_mixed(e, c, names))
    mesh = c.device_mesh
    of_tokens = {"targets": targets, "target_weights": target_weights}
    placed = ((names.e, e), *of_tokens.items(), ("temperature", temperature))
    for name, x in (*placed, ("bias", bias), ("weight", weight)):
        if isinstance(x, DTensor) and x.device_mesh != mesh:
            raise ValueError(f"{name}: expected a DTensor on {names.c}'s mesh {mesh}, got one on {x.device_mesh}")
    if bias is not None and not isinstance(bias, DTensor):
        raise ValueError(f"bias: expected a DTensor like {names.c}, got a plain tensor")

    dims = range(mesh.ndim)
    vocab = [m for m in dims if _is_shard(c.placements[m], [0])]
    if len(vocab) > 1 or not all(m in vocab or c.placements[m].is_replicate() for m in dims):
        raise ValueError(
            f"{names.c}: expected Shard(0) over one mesh dimension at most and Replicate over the others, got "
            f"{c.placements}; the parameter of a module under fully_shard is whole in that module's forward: compute "
            f"the loss there, or redistribute {names.c}"
        )
    token_dims = range(e.ndim - 1)
    for name, x in placed:
        placements = x.placements if isinstance(x, DTensor) else ()
        if not all(p.is_replicate() or _is_shard(p, range(e.ndim)) for p in placements):
            raise ValueError(f"{name}: expected Replicate or Shard, got {placements}; redistribute it first")

    tokens = tuple(
        p if m not in vocab and _is_shard(p, token_dims) else Replicate() for m, p in enumerate(e.placements)
    )
    split = [m for m in dims if tokens[m].is_shard()]

    def of_this_rank(name: str, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            if split:
                raise ValueError(
                    f"{name}: expected a DTensor where {names.e} is sharded over tokens ({e.placements}), got a tensor"
                )
            return x
        return x.redistribute(placements=tokens).to_local(grad_placements=tokens)

    local_targets, local_weights = (None if x is None else of_this_rank(name, x) for name, x in of_tokens.items())
    assert local_targets is not None
    if shift and any(_is_shard(tokens[m], [e.ndim - 2]) for m in split):
        raise ValueError(
            f"shift: expected 0 where the tokens' last dimension stays sharded ({e.placements}), got {shift}: a label "
            "is on another rank; shift the targets before they are sharded"
        )

    if weight is not None:
        check_weight(weight, c)
        weight = weight.redistribute(mesh, c.placements) if isinstance(weight, DTensor) else like(c, weight)

    shape = e.shape[:-1]
    if temperature is not None:
        temperature = _temperature(temperature, shape, mesh, tokens)

    def from_local(x: Tensor) -> DTensor:
        size = torch.Size([*shape[:-1], shape[-1] - shift]) if shift else shape
        strides = [math.prod(size[i + 1 :]) for i in range(len(size))]
        return DTensor.from_local(x, mesh, tokens, run_check=False, shape=size, stride=tuple(strides))

    # Each rank's part of a sum over what the mesh dimension shards.
    e_gradient = [Partial() if m in vocab else tokens[m] for m in dims]
    c_gradient = [Partial() if m in split else p for m, p in enumerate(c.placements)]
    shard = _vocab_shard(c, mesh, vocab[0]) if vocab else None
    part = 0
    for m in split:
        part = part * mesh.size(m) + mesh.get_local_rank(m)
    return Local(
        e.redistribute(placements=tokens).to_local(grad_placements=e_gradient),
        c.to_local(grad_placements=c_gradient),
        local_targets,
        None if bias is None else bias.redistribute(placements=c.placements).to_local(grad_placements=c_gradient),
        shard,
        from_local,
        seed_salt=part * len(c) + (0 if shard is None else shard.start),
        weight=weight.to_local() if isinstance(weight, DTensor) else None,
        temperature=temperature,
        target_weights=local_weights,
    )


def _temperature(temperature: Tensor, shape: torch.Size, mesh: DeviceMesh, tokens: tuple[Placement, ...]) -> Tensor:
    """This rank's part of one that has the tokens' shape, which if plain is the whole; or the one number."""
    if not isinstance(temperature, DTensor):
        if temperature.shape != shape or temperature.numel() == 1:
            return temperature  # what has another shape is refused for it
        temperature = DTensor.from_local(temperature, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placements = tokens if temperature.shape == shape else [Replicate()] * len(tokens)
    return temperature.redistribute(placements=placements).to_local()


def replicated(x: Tensor) -> Tensor:
    """A DTensor as the same on all ranks: sums are taken."""
    assert isinstance(x, DTensor)
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def like(reference: Tensor, x: Tensor) -> Tensor:
    """A plain x, whole and the same on all ranks, as a DTensor placed as reference is."""
    assert isinstance(reference, DTensor)
    mesh = reference.device_mesh
    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=reference.placements)


def _is_shard(placement: Placement, dims: Iterable[int]) -> bool:
    """Whether it is Shard over one of the dims: not a subclass, such as FSDP's of early releases, with other rows."""
    return type(placement) is Shard and placement.dim in dims


def _vocab_shard(c: DTensor, mesh: DeviceMesh, vocab: int) -> VocabShard:
    """This rank's rows of c, cut as Shard(0) cuts: in chunks of one size, the last ones smaller."""
    ranks, rank = mesh.size(vocab), mesh.get_local_rank(vocab)
    start, stop = even_rows(len(c), rank, ranks, "c")
    return VocabShard(
        start,
        stop,
        mesh.get_group(vocab).group_name,
        rank,
        ranks,
        reduce_e_grad=False,  # it is Partial
    )


def _mixed(e: Tensor, c: Tensor, names: Names) -> str:
    if isinstance(e, DTensor):
        return (
            f"{names.c}: expected a DTensor on {names.e}'s mesh {e.device_mesh}, got a plain tensor; wrap it by "
            "DTensor.from_local"
        )
    return (
        f"{names.e}: expected a DTensor on {names.c}'s mesh, got a plain tensor for a {names.c} of "
        f"{getattr(c, 'placements', None)}. If fully_shard has sharded {names.c}, compute the loss in the forward of "
        f"the module that owns it, where it is whole. If {names.c} is vocabulary-parallel, wrap {names.e} by "
        f"DTensor.from_local, or give {names.c}.to_local() and vocab_parallel_options"
    )
