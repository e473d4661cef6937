"""The distributed loss against a single process's, on every rank of a gloo group: test_distributed.py runs it.

By hand: torchrun --nproc-per-node 4 -m pytest tests/on_ranks.py
"""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
import torch
from problems import Problem, assert_as_good_as_dense, dense, error, gradients, oracle, peaked, upstream
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from cce_ext import IMPLS, LinearCrossEntropy, api, compute_z_loss, linear_cross_entropy, reference, vocab_parallel
from cce_ext.distributed import LossParallel, VocabParallelOptions

EXACT = ["cce_exact", "reference"]
BATCH, LENGTH, WIDTH, VOCAB = 4, 12, 16, 701


@pytest.fixture(scope="session", autouse=True)
def ranks():
    """How many there are. A rank that waits for one that has failed fails too, not much later."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    yield dist.get_world_size()
    dist.destroy_process_group()


@pytest.fixture
def compiles(ranks):
    """Compiling takes long, and what is compiled does not depend on how many ranks there are."""
    if ranks > 2:
        pytest.skip("compiled with 2 ranks only")
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seeded_alike():
    """As users of tensor parallelism do."""
    torch.manual_seed(0)


def problem(dtype=torch.float64, **options) -> Problem:
    """Tokens are [N]; sequences() makes [BATCH, LENGTH] of them."""
    return peaked(BATCH * LENGTH, WIDTH, VOCAB, **{"dtype": dtype, "bias": True, "ignored": 0.2, **options})


def rows_of(x: torch.Tensor, options: VocabParallelOptions) -> torch.Tensor:
    return x[options.start : options.stop]


def shard_of(p: Problem, options: VocabParallelOptions) -> Problem:
    bias = None if p.bias is None else rows_of(p.bias, options)
    return replace(p, c=rows_of(p.c, options), bias=bias).leaves()


def run(p: Problem, options: VocabParallelOptions, g, function=linear_cross_entropy, **more):
    """nll, lse and gradients, of e, and of this rank's rows of c and bias."""
    q = shard_of(p, options)
    nll, lse = function(
        q.e,
        q.c,
        q.targets,
        q.bias,
        ignore_index=p.ignore_index,
        softcap=p.softcap,
        reduction="none",
        return_lse=True,
        vocab_parallel_options=options,
        **more,
    )
    return nll.detach(), lse.detach(), gradients(nll, lse, q, *g)


def mine(expected: list[torch.Tensor], options: VocabParallelOptions) -> list[torch.Tensor]:
    return [expected[0], *(rows_of(x, options) for x in expected[1:])]


def assert_matches(p: Problem, options: VocabParallelOptions, rtol: float = 1e-9, **more) -> None:
    g = upstream(p)
    nll, lse, grads = run(p, options, g, **more)
    nll_64, lse_64, grads_64 = oracle(p, *g)
    for x, y in zip([nll, lse, *grads], [nll_64, lse_64, *mine(grads_64, options)], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=rtol)


def assert_same_everywhere(x: torch.Tensor) -> None:
    others = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(others, x.contiguous())
    assert all(torch.equal(x, y) for y in others)


# ---- vocab_parallel_options ----


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "torch_compile"])
def test_loss_and_lse(impl):
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    nll_64, lse_64, grads_64 = oracle(p, *g)
    torch.testing.assert_close(nll, nll_64)
    torch.testing.assert_close(lse, lse_64)
    for x in (nll, lse, grads[0]):
        assert_same_everywhere(x)
    for x, y in zip(grads, mine(grads_64, options), strict=True):
        assert error(x, y) < (0.05 if "cce" in impl else 1e-9)


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0},
        {"bias": False, "ignored": 0.0},
        {"seed": 3, "ignored": 1.0},  # nothing counts
    ],
    ids=str,
)
def test_gradients(impl, options):
    assert_matches(problem(**options), VocabParallelOptions.from_vocab(VOCAB), impl=impl)


@pytest.mark.parametrize("impl", ["cce_exact", "cce_threshold", "reference"])
def test_half_of_the_ranks_rows_hold_no_target(impl, ranks):
    """And shards are uneven, smaller than a vocab tile, and in another order than the ranks."""
    p = problem()
    p = replace(p, targets=torch.where(p.targets >= 0, p.targets % 3, p.targets))
    edges = [0, 5, VOCAB] if ranks == 2 else [0, 5, 6, 300, VOCAB]
    at = ranks - 1 - dist.get_rank()
    more = {"filter_eps": 1e-12} if impl == "cce_threshold" else {}
    assert_matches(p, VocabParallelOptions(edges[at], edges[at + 1]), impl=impl, **more)


@pytest.mark.parametrize("impl", EXACT)
def test_ignore_index_among_the_rows(impl):
    p = problem()
    for index in (0, 7, VOCAB - 1):
        assert_matches(
            replace(p, ignore_index=index, targets=torch.where(p.targets < 0, index, p.targets)),
            VocabParallelOptions.from_vocab(VOCAB),
            impl=impl,
        )


@pytest.mark.parametrize("offset", [-900.0, 900.0])
@pytest.mark.parametrize("impl", ["cce", *EXACT])
def test_logits_far_from_zero(impl, offset):
    """In fp32, with another offset on each side of the middle. A step of the lse is 6e-5 there."""
    p = problem(torch.float32)
    bias = p.bias + offset
    bias[: VOCAB // 2] -= offset / 2
    p = replace(p, bias=bias)
    options = VocabParallelOptions.from_vocab(VOCAB)
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    exact, same = oracle(p, *g), dense(p, *g)
    ours, theirs, best = [nll, lse], [*same[:2]], [*exact[:2]]
    if impl in EXACT:
        ours, theirs, best = ours + grads, theirs + mine(same[2], options), best + mine(exact[2], options)
    for x, y, z in zip(ours, theirs, best, strict=True):
        assert_as_good_as_dense(x, y, z, tiny=1e-4)


@pytest.mark.parametrize("impl", EXACT)
def test_masked_rows(impl, ranks):
    """A bias of -inf, as vocabularies are padded: all of the last shard but one row."""
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    bias = p.bias.clone()
    bias[VOCAB - VOCAB // ranks + 1 :] = -float("inf")
    p = replace(p, bias=bias, targets=torch.where(p.targets >= 0, p.targets % 50, p.targets))
    g = upstream(p)
    nll, lse, grads = run(p, options, g, impl=impl)
    exact = oracle(p, *g)
    for x, y in zip([nll, lse, *grads], [*exact[:2], *mine(exact[2], options)], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("frozen", ["e", "c"])
def test_frozen_inputs_under_autocast(frozen):
    p = problem(torch.float32)
    options = VocabParallelOptions.from_vocab(VOCAB)
    q = shard_of(p, options)
    getattr(q, frozen).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(q.e, q.c, q.targets, q.bias, vocab_parallel_options=options, impl="cce_exact")
    loss.backward()
    whole = p.leaves()
    expected = linear_cross_entropy(whole.e, whole.c, whole.targets, whole.bias, impl="reference")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert getattr(q, frozen).grad is None
    got, grad = (q.c.grad, rows_of(whole.c.grad, options)) if frozen == "e" else (q.e.grad, whole.e.grad)
    assert got.dtype == torch.float32 and error(got, grad) < 2e-2


def test_part_of_the_gradient_of_e():
    p = problem()
    options = replace(VocabParallelOptions.from_vocab(VOCAB), reduce_e_grad=False)
    g = upstream(p)
    *_, (d_e, *_) = run(p, options, g, impl="cce_exact")
    expected = oracle(p, *g)[2][0]
    assert error(d_e, expected) > 0.01
    dist.all_reduce(d_e)
    torch.testing.assert_close(d_e, expected)


def sampled(p: Problem, draws: int, **options) -> list[torch.Tensor]:
    """Gradients of the whole problem, a draw each along the first dimension: e's, and c's of all ranks."""
    cut = VocabParallelOptions.from_vocab(len(p.c))
    d_e, d_c = [], []
    for _ in range(draws):
        grads = run(p, cut, upstream(p), **options)[2]
        d_e.append(grads[0])
        whole = torch.zeros_like(p.c)
        rows_of(whole, cut).copy_(grads[1])
        dist.all_reduce(whole)
        d_c.append(whole)
    return [torch.stack(d_e), torch.stack(d_c)]


def test_the_sampled_gradient_is_unbiased():
    """The mean's error falls as its own spread says, and stays within it."""
    p = peaked(24, 8, 1500)
    exact = oracle(p, *upstream(p))[2]
    for draws, expected in zip(sampled(p, 240, filter_eps=2.0**-3), exact, strict=True):
        noise = (draws - draws.mean(0)).square().sum().div(len(draws) - 1).sqrt().item()
        bias = (draws.mean(0) - expected).norm().item()
        assert noise > 0.02 * expected.norm()
        # A few directions have most of the noise, so that the mean's error is not always near its expectation.
        assert bias < 2 * noise / len(draws) ** 0.5


def spiked(n: int, v: int) -> Problem:
    """All of the probability is one column's of each tile, the same in each. All labels are in the first tile."""
    p = peaked(n, 8, v)
    c = torch.full_like(p.c, -8.0)
    c[::128] = 0.0
    return replace(p, e=torch.ones_like(p.e), c=c, targets=p.targets % 100)


def all_differ(d_c: torch.Tensor) -> int:
    """Visited tiles but the first, of the ranks' gradients of as many rows, which must not be the same tiles."""
    others = [torch.empty_like(d_c) for _ in range(dist.get_world_size())]
    dist.all_gather(others, d_c)
    visited = torch.stack(others)[:, 128:].view(len(others), -1, 128 * d_c.shape[1]).ne(0).any(2)
    assert visited.any(1).all() and not visited.all(1).any()
    assert len(visited.unique(dim=0)) == len(others)
    return int(visited.sum())


def test_ranks_draw_of_their_own(ranks):
    """Shards that are alike, ranks that are seeded alike. A token's visits are the group's, not each rank's."""
    p = spiked(3, 16384 * ranks)
    options = VocabParallelOptions.from_vocab(len(p.c))
    assert all_differ(run(p, options, upstream(p), filter_eps=2.0**-4)[2][1]) < 1.4 * 3 * 15


@pytest.mark.parametrize("impl", ["cce", "reference"])
def test_reductions_shift_and_module(impl):
    p = problem(bias=False)
    e, targets = p.e.view(BATCH, LENGTH, WIDTH), p.targets.view(BATCH, LENGTH)
    options = VocabParallelOptions.from_vocab(VOCAB)
    for reduction in ("mean", "sum", "none"):
        more = {"reduction": reduction, "shift": 1, "return_lse": True}
        got = LinearCrossEntropy(**more, impl=impl, vocab_parallel_options=options)(e, rows_of(p.c, options), targets)
        expected = linear_cross_entropy(e, p.c, targets, impl="reference", **more)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("impl", ["cce", "reference"])
def test_a_target_that_no_rank_has(impl):
    p = problem()
    options = VocabParallelOptions.from_vocab(VOCAB)
    for bad in (VOCAB, -5):
        p.targets[5] = bad
        with pytest.raises(IndexError, match=f"targets: {bad} at flat position 5: in no rank's rows, nor ignore_index"):
            run(p, options, upstream(p), impl=impl)


def test_a_target_that_no_rank_has_is_nan_where_nobody_looks(monkeypatch):
    """As on CUDA: in the loss, and in the gradient."""
    monkeypatch.setattr(vocab_parallel, "may_look_at", lambda targets: False)
    p = problem()
    p.targets[5] = VOCAB
    nll, lse, grads = run(p, VocabParallelOptions.from_vocab(VOCAB), upstream(p), impl="cce_exact")
    assert nll.isnan().nonzero().tolist() == [[5]] and lse.isfinite().all()
    assert grads[0].isnan().any(1).nonzero().tolist() == [[5]] and grads[1].isnan().all()


def test_rows_are_those_of_tensor_split(ranks):
    for v in (ranks, 701, 1000):
        x = torch.arange(v)
        assert torch.equal(rows_of(x, VocabParallelOptions.from_vocab(v)), x.tensor_split(ranks)[dist.get_rank()])


def test_mistakes_of_options(ranks):
    p = problem()
    with pytest.raises(ValueError, match=f"vocab_size: expected a row for each of the group's {ranks} ranks, got 1"):
        VocabParallelOptions.from_vocab(1)
    with pytest.raises(ValueError, match="start, stop: .* got 3, 3"):
        VocabParallelOptions(3, 3)
    with pytest.raises(ValueError, match=r"c: expected 5 rows, this rank's \[0, 5\) .* got \[701, 16\]"):
        linear_cross_entropy(p.e, p.c, p.targets, vocab_parallel_options=VocabParallelOptions(0, 5))


def test_mean_over_all_ranks_tokens(ranks):
    """Ranks with different numbers of tokens that count, one of them with none: the mean of ranks is the whole's."""
    p = problem()
    targets = p.targets.view(ranks, -1).clone()
    targets[0] = -100
    targets[1, ::2] = -100
    e = p.e.view(ranks, -1, WIDTH)
    whole = linear_cross_entropy(e, p.c, targets, impl="reference")
    part = e[dist.get_rank()].clone().requires_grad_()
    loss = linear_cross_entropy(part, p.c, targets[dist.get_rank()], impl="cce_exact", mean_group=dist.group.WORLD)
    loss.backward()
    mean = loss.detach() / ranks
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, whole)
    assert dist.get_rank() != 0 or loss == 0


def test_compile(compiles):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    assert_matches(problem(), VocabParallelOptions.from_vocab(VOCAB), function=compiled, impl="reference")


def test_the_compiled_impl(compiles, monkeypatch):
    # By inductor it takes a minute, and to the collectives it is the same.
    monkeypatch.setattr(api, "_compiled_reference", lambda: torch.compile(reference.forward, backend="aot_eager"))
    assert_matches(problem(), VocabParallelOptions.from_vocab(VOCAB), impl="torch_compile")


def test_compile_by_inductor(compiles):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    assert_matches(problem(), VocabParallelOptions.from_vocab(VOCAB), function=compiled, impl="cce_exact")


# ---- DTensor ----


@pytest.fixture(scope="module")
def mesh(ranks) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


@pytest.fixture(scope="module")
def mesh_2d(ranks) -> DeviceMesh:
    return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))


def sequences(p: Problem) -> Problem:
    return replace(p, e=p.e.view(BATCH, LENGTH, WIDTH), targets=p.targets.view(BATCH, LENGTH))


def distribute(p: Problem, mesh: DeviceMesh, e, c, targets) -> Problem:
    """p's tensors with these placements, e, c and bias as leaves."""
    return Problem(
        distribute_tensor(p.e, mesh, e).requires_grad_(),
        distribute_tensor(p.c, mesh, c).requires_grad_(),
        distribute_tensor(p.targets, mesh, targets) if targets is not None else p.targets,
        distribute_tensor(p.bias, mesh, c).requires_grad_(),
    )


R, S = Replicate(), Shard
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


@pytest.mark.parametrize("placements", ONE_DIMENSION, ids=str)
def test_dtensors(mesh, placements):
    check_placements(mesh, placements)


@pytest.mark.parametrize("placements", TWO_DIMENSIONS, ids=str)
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
    with pytest.raises(ValueError, match=f"c: Shard.0. of its {ranks - 1} rows over {ranks} ranks leaves"):
        linear_cross_entropy(distribute_tensor(p.e, mesh, [R]), few, q.targets)


def test_ranks_of_other_tokens_draw_of_their_own(mesh):
    """The same tokens on all ranks, seeded alike."""
    p = spiked(3, 4096)
    e, targets = (DTensor.from_local(x, mesh, [S(0)]) for x in (p.e, p.targets))
    c = distribute_tensor(p.c, mesh, [R]).requires_grad_()
    (d_c,) = torch.autograd.grad(linear_cross_entropy(e, c, targets, filter_eps=2.0**-4), c)
    assert all_differ(d_c.to_local()) > 0


# ---- modules ----


class Head(nn.Linear):
    """A classifier that computes its loss."""

    def __init__(self, options=None) -> None:
        torch.manual_seed(3)
        super().__init__(WIDTH, VOCAB)
        self.options = {"impl": "cce_exact", **(options or {})}

    def forward(self, e, targets):
        return linear_cross_entropy(e, self.weight, targets, self.bias, **self.options)


class Model(nn.Module):
    def __init__(self, options=None) -> None:
        super().__init__()
        self.head = Head(options)
        self.body = nn.Linear(WIDTH, WIDTH)

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


@pytest.mark.parametrize("layout", [R, S(1)])
def test_parallelize_module(mesh, layout):
    check_parallel_model(mesh, layout)


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
