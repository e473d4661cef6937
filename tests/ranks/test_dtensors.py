"""e, c, bias and targets as DTensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.problems import Problem, oracle, upstream
from support.sharded import DEVICE, WIDTH, R, S, problem, sequences
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from cce_ext import compute_z_loss, linear_cross_entropy
from cce_ext.distributed import VocabParallelOptions


def distribute(p: Problem, mesh: DeviceMesh, e, c, targets) -> Problem:
    """p's tensors with these placements, e, c and bias as leaves."""
    return Problem(
        distribute_tensor(p.e, mesh, e).requires_grad_(),
        distribute_tensor(p.c, mesh, c).requires_grad_(),
        distribute_tensor(p.targets, mesh, targets) if targets is not None else p.targets,
        distribute_tensor(p.bias, mesh, c).requires_grad_(),
    )


ONE_DIMENSION = [
    ([R], [S(0)], [R]),
    ([R], [S(0)], None),
    ([S(1)], [S(0)], [R]),  # sequence parallel
    ([S(1)], [S(0)], [S(1)]),
    ([S(0)], [S(0)], [S(0)]),  # as FSDP shards both, outside of its module
    ([S(0)], [R], [S(0)]),  # data parallel
    ([S(1)], [R], [R]),  # context parallel
    ([S(2)], [R], [R]),
    ([R], [R], None),
]
TWO_DIMENSIONS = [
    ([S(0), R], [R, S(0)], [S(0), R]),  # data × tensor parallel
    ([S(0), S(1)], [R, S(0)], [S(0), S(1)]),  # and sequence parallel
    ([S(1), S(0)], [S(0), R], [R, R]),
    ([S(0), S(1)], [R, R], [S(0), S(1)]),
]


def letters(placements) -> str:
    """[Shard(0), Replicate()] as S0R, and a plain tensor as plain."""
    if placements is None:
        return "plain"
    return "".join(f"S{x.dim}" if x.is_shard() else "R" for x in placements)


def name_of(placements) -> str:
    return "-".join(f"{name}_{letters(x)}" for name, x in zip(("e", "c", "targets"), placements, strict=True))


def check_placements(mesh, placements, **options):
    whole = sequences(problem())
    p = distribute(whole, mesh, *placements)
    plain = whole.leaves()
    more = {"return_lse": True, **options}
    got = linear_cross_entropy(p.e, p.c, p.targets, p.bias, impl="cce_exact", **more)
    expected = linear_cross_entropy(plain.e, plain.c, plain.targets, plain.bias, impl="reference", **more)
    for x, y in zip(got, expected, strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), y)
    if not got[0].ndim:
        assert all(x.is_replicate() for x in got[0].placements)
    grads = torch.autograd.grad(got[0].sum(), p.inputs)
    for x, y, given in zip(grads, torch.autograd.grad(expected[0].sum(), plain.inputs), p.inputs, strict=True):
        torch.testing.assert_close(x.full_tensor(), y)
        assert all(a == b or a.is_partial() for a, b in zip(x.placements, given.placements, strict=True))


@pytest.mark.parametrize("placements", ONE_DIMENSION, ids=name_of)
def test_dtensors(mesh, placements):
    check_placements(mesh, placements)


@pytest.mark.parametrize("placements", TWO_DIMENSIONS, ids=name_of)
def test_dtensors_of_two_dimensions(mesh_2d, placements):
    check_placements(mesh_2d, placements)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "sum", "shift": 1}, {"shift": 2}], ids=str)
def test_options_of_dtensors(mesh_2d, options):
    check_placements(mesh_2d, TWO_DIMENSIONS[0], **options)


def test_z_loss_of_dtensors(mesh_2d):
    p = sequences(problem())
    q = distribute(p, mesh_2d, *TWO_DIMENSIONS[0])
    values = [
        compute_z_loss(linear_cross_entropy(x.e, x.c, x.targets, shift=1, return_lse=True)[1], x.targets, shift=1)
        for x in (q, p)
    ]
    torch.testing.assert_close(values[0].to_local(), values[1])
    lse = linear_cross_entropy(q.e, q.c, q.targets, shift=1, return_lse=True)[1]
    plain = compute_z_loss(lse, p.targets, shift=1)  # whole targets, the same on all ranks
    torch.testing.assert_close(plain.to_local(), values[1])
    with pytest.raises(ValueError, match="targets: expected a plain tensor like lse, got a DTensor"):
        compute_z_loss(torch.zeros(p.targets.shape, device=DEVICE), q.targets)


def test_uneven_dtensors(mesh, ranks):
    """A batch that the ranks cannot share evenly."""
    p = problem()
    p = replace(p, e=p.e[: ranks + 1], targets=p.targets[: ranks + 1])
    q = distribute(p, mesh, [S(0)], [R], [S(0)])
    nll = linear_cross_entropy(q.e, q.c, q.targets, q.bias, reduction="none")
    assert nll.shape == p.targets.shape
    torch.testing.assert_close(nll.full_tensor(), oracle(p, *upstream(p))[0])


def test_dtensors_of_a_mesh_within_a_mean(mesh_2d):
    """tp is in the mesh of the tensors, dp is not: mean_group."""
    tp, dp = mesh_2d["tp"], mesh_2d["dp"]
    p = problem(bias=False)
    targets = p.targets.view(2, -1).clone()
    targets[0, ::2] = -100
    at = dp.get_local_rank()
    loss = linear_cross_entropy(
        distribute_tensor(p.e.view(2, -1, WIDTH)[at], tp, [R], src_data_rank=None),
        distribute_tensor(p.c, tp, [S(0)], src_data_rank=None),
        targets[at],
        mean_group=dp.get_group(),
    ).to_local()
    dist.all_reduce(loss, group=dp.get_group())
    expected = linear_cross_entropy(p.e, p.c, targets.flatten(), impl="reference")
    torch.testing.assert_close(loss / 2, expected)


@pytest.mark.parametrize(
    "e, c, targets, message",
    [
        (None, [S(0)], [R], "e: expected a DTensor on c's mesh, got a plain tensor.*fully_shard.*from_local"),
        ([R], None, [R], "c: expected a DTensor on e's mesh .*, got a plain tensor"),
        ([R], [S(1)], [R], r"c: expected Shard\(0\) .* got \(Shard\(dim=1\),\).*fully_shard"),
        ([R], [Partial()], [R], "c: expected .*Partial"),
        ([Partial()], [S(0)], [R], "e: expected Replicate or Shard, got .*Partial.*redistribute it first"),
        ([_StridedShard(1, split_factor=2)], [R], [R], "e: expected Replicate or Shard, got .*redistribute it first"),
        ([R], [_StridedShard(0, split_factor=2)], [R], r"c: expected Shard\(0\) .*fully_shard"),
        ([R], [S(0)], [Partial()], "targets: expected Replicate or Shard, got .*Partial"),
        ([S(0)], [R], None, "targets: expected a DTensor where e is sharded over tokens"),
    ],
    ids=[
        "plain_e",
        "plain_c",
        "c_over_its_width",
        "partial_c",
        "partial_e",
        "strided_e",
        "strided_c",
        "partial_targets",
        "plain_targets",
    ],
)
def test_mistakes_of_placements(mesh, e, c, targets, message):
    p = sequences(problem())
    tensors = [
        x if placements is None else DTensor.from_local(x, mesh, placements, run_check=False)
        for x, placements in ((p.e, e), (p.c, c), (p.targets, targets))
    ]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*tensors)


def test_other_mistakes_of_dtensors(mesh, mesh_2d, ranks):
    p = sequences(problem())
    q = distribute(p, mesh, [S(1)], [R], [S(1)])
    with pytest.raises(ValueError, match="shift: expected 0 where the tokens' last dimension stays sharded .* got 1"):
        linear_cross_entropy(q.e, q.c, q.targets, shift=1)
    with pytest.raises(TypeError, match="shift: expected an integer or a bool, got 'a'"):
        linear_cross_entropy(q.e, q.c, q.targets, shift="a")
    with pytest.raises(ValueError, match="vocab_parallel_options: expected None where"):
        linear_cross_entropy(q.e, q.c, q.targets, vocab_parallel_options=VocabParallelOptions(0, 1))
    with pytest.raises(ValueError, match="bias: expected a DTensor like c"):
        linear_cross_entropy(q.e, q.c, q.targets, p.bias)
    other = distribute_tensor(p.targets, mesh_2d, [R, R])
    with pytest.raises(ValueError, match="targets: expected a DTensor on c's mesh"):
        linear_cross_entropy(q.e, q.c, other)
    both = distribute_tensor(p.c, mesh_2d, [S(0), S(0)])
    with pytest.raises(ValueError, match=r"c: expected Shard\(0\) over one mesh dimension at most"):
        linear_cross_entropy(distribute_tensor(p.e, mesh_2d, [R, R]), both, other)
    few = distribute_tensor(p.c[: ranks - 1], mesh, [S(0)])
    with pytest.raises(ValueError, match=f"c: {ranks - 1} rows in chunks of 1 leave the last of {ranks} ranks none"):
        linear_cross_entropy(distribute_tensor(p.e, mesh, [R]), few, q.targets)
