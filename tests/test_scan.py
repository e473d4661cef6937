"""scan="fp8" in Python: what it needs, what it reaches, and where it is left out. Its kernels: test_scan_gpu.py."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from support.problems import Problem, peaked
from support.scanned import Forward, taken
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cce_ext import LinearCrossEntropy, linear_cross_entropy
from cce_ext import scan as rules
from cce_ext.layers import CCEForCausalLMLoss
from cce_ext.options import Options

ops = torch.ops.cce
SCANNED = "fp8"
UNSUPPORTED = r"scan: 'fp8' takes a Hopper GPU \(compute capability 9.0\) and bf16 or fp16, got "
UNTRAINED = "scan: 'fp8' is for training: without a gradient nothing is drawn that could correct the loss"

# Options by which nothing is drawn.
NOT_SAMPLED = [
    *({"impl": impl} for impl in ("cce_exact", "cce_threshold", "cce_kahan_full", "torch_compile", "reference")),
    {"filter_eps": None},
    {"filter_e_grad": False, "filter_c_grad": False},
    {"impl": "cce_kahan_full_c", "filter_e_grad": False},
]
# Options that it goes with.
BESIDE = [
    {},
    {"impl": "cce_kahan_full_c"},
    {"filter_e_grad": False},
    {"filter_eps": 2.0**-5, "softcap": 5.0},
    {"reduction": "none", "shift": 1},
    {"label_smoothing": 0.1},
    {"weight": torch.linspace(0.5, 1.5, 2000)},
    {"return_lse": True, "label_smoothing": 0.1, "weight": torch.linspace(0.5, 1.5, 2000)},
]


def problem(**options) -> Problem:
    return peaked(60, 16, 2000, bias=True, ignored=0.2, **options)


def loss_of(p: Problem, **options) -> torch.Tensor:
    return linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options)


@pytest.fixture
def calls(monkeypatch) -> list[Forward]:
    return taken(monkeypatch)


# ---- What is refused ----


@pytest.mark.parametrize("scan", ["fp16", "FP8", 8, True, torch.float8_e4m3fn], ids=str)
def test_another_scan(scan):
    for refuses in (partial(loss_of, problem().leaves()), LinearCrossEntropy):
        with pytest.raises(ValueError, match="scan: expected 'fp8' or None, got "):
            refuses(scan=scan)


@pytest.mark.parametrize("options", NOT_SAMPLED, ids=str)
def test_what_draws_nothing(options, calls):
    for refuses in (partial(loss_of, problem().leaves()), LinearCrossEntropy, Options(scan=SCANNED, **options).check):
        with pytest.raises(ValueError, match="scan: 'fp8' corrects the loss by what a sampled gradient visits"):
            refuses() if isinstance(refuses, type(Options().check)) else refuses(scan=SCANNED, **options)
    assert calls == []


def test_without_a_gradient(calls):
    """For nothing requires one, or none can be asked for."""
    p = problem()
    with pytest.raises(ValueError, match=UNTRAINED):
        loss_of(p, scan=SCANNED)
    with torch.inference_mode(), pytest.raises(ValueError, match=UNTRAINED):
        loss_of(p.leaves(), scan=SCANNED)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_where_there_is_no_kernel(dtype):
    p = problem(dtype=dtype).leaves()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"^{UNSUPPORTED}{str(dtype).removeprefix('torch.')} on cpu$"):
        loss_of(p, scan=SCANNED)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_other_gpus_and_dtypes():
    p = peaked(20, 16, 300, device="cuda").leaves()
    with pytest.raises(ValueError, match=f"{UNSUPPORTED}float32 on cuda:0"):
        loss_of(p, scan=SCANNED)
    capability = torch.cuda.get_device_capability()
    if capability == (9, 0):
        pytest.skip("this GPU has the kernel")
    said = f"{UNSUPPORTED}bfloat16 on cuda:0 of compute capability {capability[0]}.{capability[1]}"
    half = p.to(torch.bfloat16).leaves()
    with pytest.raises(ValueError, match=said):
        loss_of(half, scan=SCANNED)
    seed = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="scan"):
        ops.lce_forward(half.e, half.c, None, half.targets, seed, scan=SCANNED)


def test_other_compute_capabilities(monkeypatch):
    """As a machine that has none of them can tell."""
    with FakeTensorMode(), torch.no_grad():
        e, c = (torch.empty(n, 32, device="cuda:0", dtype=torch.bfloat16) for n in (8, 512))
        t, seed = (torch.empty(n, device="cuda:0", dtype=torch.int64) for n in (8, 1))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            said = f"{UNSUPPORTED}bfloat16 on cuda:0 of compute capability {capability[0]}.{capability[1]}"
            with pytest.raises(ValueError, match=said):
                ops.lce_forward(e, c, None, t, seed, scan=SCANNED)


# ---- The operators ----


@pytest.mark.parametrize(
    "options, said",
    [
        ({"scan": "int8"}, "scan: expected 'fp8' or None, got 'int8'"),
        ({"method": "exact", "eps": 0.0}, "method: expected 'sampled' with scan='fp8', got 'exact'"),
        ({"method": "threshold"}, "method: expected 'sampled' with scan='fp8', got 'threshold'"),
        ({"seed": None}, r"seed: expected a \[1\] int64 tensor with scan='fp8', got None"),
        ({"need_map": False}, "need_map: expected True with scan='fp8', got False"),
        ({"scale": torch.ones(60)}, r"scale: expected None with scan='fp8', got one of shape \[60\]"),
        ({"stats": 9}, "stats: expected 0 with scan='fp8', got 9"),
        ({"batch_invariant": True}, "batch_invariant: expected False with scan='fp8'"),
        ({}, f"{UNSUPPORTED}float32 on cpu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", ["lce_forward", "lce_forward_portable"])
def test_what_the_operator_needs(options, said, fake, name):
    if fake and name != "lce_forward":
        pytest.skip("the portable operator is called by kernels alone, and has no fake one")
    p, mode = problem(), FakeTensorMode() if fake else nullcontext()
    given = {"seed": torch.tensor([1]), "scan": SCANNED, **options}
    tensors = [p.e, p.c, p.bias, p.targets, given.pop("seed")]
    if fake:
        tensors = [None if x is None else mode.from_tensor(x) for x in tensors]
        given = {k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    with mode, pytest.raises(ValueError, match=said):
        getattr(ops, name)(*tensors, **given)


def test_the_portable_implementation_has_none(monkeypatch):
    """Whatever GPU calls it: ROCm has compute capabilities of its own, 9.0 among them."""
    monkeypatch.setattr(rules, "_check_tensor", lambda *_: None)
    p = problem()
    for name in ("lce_forward", "lce_forward_portable"):
        with pytest.raises(ValueError, match=UNSUPPORTED):
            getattr(ops, name)(p.e, p.c, p.bias, p.targets, torch.tensor([1]), scan=SCANNED)


def test_the_fake_kernel():
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a fake tensor is of this machine's GPU, which has no kernel")
    with FakeTensorMode(), torch.no_grad():
        e, c = (torch.empty(n, 32, device="cuda", dtype=torch.bfloat16) for n in (8, 600))
        t, seed = (torch.empty(n, device="cuda", dtype=torch.int64) for n in (8, 1))
        nll, lse, tile_map, stats, argmax = ops.lce_forward(e, c, None, t, seed, scan=SCANNED)
    assert nll.shape == lse.shape == (8,) and nll.dtype == lse.dtype == torch.float32
    assert tile_map.shape == (3, 8) and tile_map.dtype == torch.int16 and nll.device == e.device
    assert stats.shape == (0, 0) and argmax.shape == (0,)


def test_opcheck(calls):
    q = problem().leaves()
    inputs = (q.e, q.c, q.bias, q.targets, torch.tensor([3]))
    torch.library.opcheck(ops.lce_forward.default, inputs, {"scan": SCANNED})
    assert {call.scan for call in calls} == {SCANNED}


def test_the_composite_operator(calls):
    p = problem().leaves()
    torch.manual_seed(0)
    loss = ops.linear_cross_entropy(p.e, p.c, p.targets, p.bias, scan=SCANNED)
    loss.backward()
    assert [call.scan for call in calls] == [SCANNED]
    with pytest.raises(ValueError, match="corrects the loss"):
        ops.linear_cross_entropy(p.e, p.c, p.targets, p.bias, scan=SCANNED, impl="cce_exact")


# ---- What it reaches ----


def step(p: Problem, **options) -> list[torch.Tensor]:
    """Outputs and gradients, of a draw that is always the same."""
    torch.manual_seed(5)
    q = p.leaves()
    outputs = loss_of(q, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(sum((k + 1) * x.sum() for k, x in enumerate(outputs)), q.inputs)]


@pytest.mark.parametrize("options", BESIDE, ids=lambda o: ",".join(o) or "alone")
def test_it_is_the_forwards_alone(options, calls):
    """The kernel gets it, with a seed and a map, and the backward is that of any other forward."""
    p = problem()
    scanned, plain = step(p, scan=SCANNED, **options), step(p, **options)
    assert [call.scan for call in calls] == [SCANNED, None]
    assert all(call.seed is not None and call.need_map and call.method == "sampled" for call in calls)
    assert all(torch.equal(x, y) for x, y in zip(scanned, plain, strict=True))


def test_several_labels_a_token(calls):
    p = problem()
    labels = torch.stack([p.targets, p.targets.roll(1)], 1)
    p = Problem(p.e, p.c, labels, p.bias)
    shares = torch.tensor([0.75, 0.25]).expand(60, 2)
    scanned, plain = step(p, scan=SCANNED, target_weights=shares), step(p, target_weights=shares)
    assert [(call.scan, call.need_map) for call in calls] == [(SCANNED, True), (None, True)]
    assert all(torch.equal(x, y) for x, y in zip(scanned, plain, strict=True))


@pytest.mark.parametrize("frozen", ["e", "c and bias"])
def test_a_frozen_side(frozen, calls):
    p = problem().leaves()
    for x in [p.e] if frozen == "e" else [p.c, p.bias]:
        x.requires_grad_(False)
    loss_of(p, scan=SCANNED).backward()
    assert calls[0].scan == SCANNED and calls[0].need_map and calls[0].seed is not None


def test_autocast(calls):
    p = problem().leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(p, scan=SCANNED).backward()
        out = ops.lce_forward(p.e, p.c, p.bias, p.targets, torch.tensor([1]), scan=SCANNED)
    assert [(call.scan, call.e.dtype) for call in calls] == 2 * [(SCANNED, torch.bfloat16)]
    assert out[0].dtype == torch.float32 and p.e.grad.dtype == torch.float32


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_compiled(module, calls):
    torch._dynamo.reset()
    seen: list[object] = []

    def backend(graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def record(g, _):
            seen.extend(n.kwargs.get("scan") for n in g.graph.nodes if "lce_forward" in str(n.target))
            return make_boxed_func(g.forward)

        return aot_autograd(fw_compiler=record, bw_compiler=record)(graph, inputs)

    p, loss = problem().leaves(), LinearCrossEntropy(scan=SCANNED) if module else partial(linear_cross_entropy)
    options = {} if module else {"scan": SCANNED}
    compiled = torch.compile(lambda e, c, t, b: loss(e, c, t, b, **options), fullgraph=True, backend=backend)
    scanned = compiled(p.e, p.c, p.targets, p.bias)
    scanned.backward()
    torch.testing.assert_close(scanned, loss_of(problem()))
    assert seen == [SCANNED]
    if module:  # evaluated, a graph of its own
        with torch.no_grad():
            compiled(p.e, p.c, p.targets, p.bias)
        assert seen == [SCANNED, None]


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_vocab_parallel(one_rank, calls):
    from cce_ext.distributed import VocabParallelOptions

    p, options = problem(), {"vocab_parallel_options": VocabParallelOptions(0, 2000)}
    scanned, plain = step(p, scan=SCANNED, **options), step(p, **options)
    assert [(call.scan, call.need_map) for call in calls] == [(SCANNED, True), (None, True)]
    assert all(torch.equal(x, y) for x, y in zip(scanned, plain, strict=True))
    with pytest.raises(ValueError, match=UNTRAINED):
        loss_of(p, scan=SCANNED, **options)


# ---- Checkpoints ----


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoints(reentrant, frozen, module, calls):
    """The first forward of a reentrant one has no gradient, and must be like the second: the loss is its."""
    p = problem()
    c = p.c if frozen else p.c.clone().requires_grad_()
    scan = {"scan": SCANNED}
    loss = LinearCrossEntropy(**scan) if module else partial(linear_cross_entropy, **scan)

    def gradient(run):
        e = p.e.clone().requires_grad_()
        run(lambda x: loss(2 * x, c, p.targets), e).backward()
        return e.grad

    torch.manual_seed(3)
    plain = [gradient(lambda f, e: f(e)) for _ in range(2)]
    torch.manual_seed(3)
    saved = [gradient(lambda f, e: checkpoint(f, e, use_reentrant=reentrant)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(plain, saved, strict=True))
    assert len(calls) == 6
    assert all(call.scan == SCANNED and call.need_map and call.seed is not None for call in calls)


def test_the_function_without_a_gradient_mode(calls):
    """What requires a gradient may be run without one first, by whoever saves memory so."""
    p = problem().leaves()
    with torch.no_grad():
        loss_of(p, scan=SCANNED)
    assert calls[0].scan == SCANNED and calls[0].need_map and calls[0].seed is not None


# ---- What evaluates as well as it trains ----

UNGRADED = {
    "no_grad": (torch.no_grad, True),
    "inference_mode": (torch.inference_mode, True),
    "nothing requires one": (nullcontext, False),
}


@pytest.mark.parametrize("where", UNGRADED)
def test_the_module_evaluates_in_16_bits(where, calls):
    mode, leaves = UNGRADED[where]
    loss, p = LinearCrossEntropy(scan=SCANNED, impl="cce"), problem()
    assert "scan='fp8'" in repr(loss)
    with mode():
        q = p.leaves() if leaves else p
        evaluated = loss(q.e, q.c, q.targets, q.bias)
    q = p.leaves()
    loss.eval()(q.e, q.c, q.targets, q.bias).backward()  # a gradient it is that counts, not the module's mode
    assert [call.scan for call in calls] == [None, SCANNED]
    assert torch.equal(evaluated, loss_of(p))


@pytest.mark.parametrize("where", UNGRADED)
def test_the_layer_evaluates_in_16_bits(where, calls):
    mode, leaves = UNGRADED[where]
    p, layer = problem(), CCEForCausalLMLoss()

    def loss(q: Problem) -> torch.Tensor:
        return layer(
            None, q.targets[None], hidden_states=q.e[None], lm_head_weight=q.c, lm_head_bias=q.bias, scan=SCANNED
        )

    loss(p.leaves()).backward()
    with mode():
        loss(p.leaves() if leaves else p)
    assert [call.scan for call in calls] == [SCANNED, None]


@pytest.mark.parametrize("where", UNGRADED)
def test_the_patch_evaluates_in_16_bits(where, calls):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from support.models import batch, tiny

    from cce_ext.transformers import cce_patch

    mode, leaves = UNGRADED[where]
    model = cce_patch(tiny(), scan=SCANNED)
    model(**batch()).loss.backward()
    assert [call.scan for call in calls] == [SCANNED]
    model.eval().requires_grad_(leaves)
    with mode():
        evaluated = model(**batch()).loss
    assert [call.scan for call in calls[1:]] == [None]
    assert torch.equal(evaluated, cce_patch(model)(**batch()).loss.detach())
    with pytest.raises(ValueError, match="corrects the loss"):
        cce_patch(model, impl="cce_exact", scan=SCANNED)
    with pytest.raises(ValueError, match="expected 'fp8' or None"):
        cce_patch(model, scan="fp4")


def test_torchtitan_validates_in_16_bits(monkeypatch, calls):
    from support.titan import fresh_import, install_stub

    install_stub(monkeypatch)
    titan = fresh_import(monkeypatch)
    loss_fn = titan.CCELoss.Config(scan=SCANNED).build()
    loss_fn.set_lm_head(nn.Linear(16, 300))
    h, labels = torch.randn(9, 16, requires_grad=True), torch.arange(9)
    loss_fn(h, labels)[0].backward()
    with torch.no_grad():
        loss_fn(h, labels)
    assert [call.scan for call in calls] == [SCANNED, None]
    with pytest.raises(ValueError, match="corrects the loss"):
        titan.CCELoss.Config(scan=SCANNED, filter_eps=None).build()
