"""The operators as PyTorch sees them: opcheck, torch.compile, torch.export, AOTInductor, memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support.problems import peaked
from torch import nn
from torch.nn import functional as F

import cce_ext
from cce_ext import linear_cross_entropy
from cce_ext.options import KernelOptions, Options

OPTIONS = [
    {"method": "sampled"},
    {"method": "exact", "need_map": False},
    {"method": "threshold", "eps": 1e-3, "softcap": 3.0, "filter_e": False},
]


def problem(device, **options):
    return peaked(20, 16, 300, device=device, bias=True, ignored=0.2, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["method"])
def test_opcheck(options, device):
    p = problem(device)
    seed = torch.tensor([3], device=device)
    q = p.leaves()
    torch.library.opcheck(torch.ops.cce.lce_forward.default, (q.e, q.c, q.bias, q.targets, seed), options)

    nll, lse, tile_map, *_ = torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, seed, **options)
    rest = {k: v for k, v in options.items() if k != "need_map"}
    for needs in ({}, {"need_e": False, "need_bias": True}, {"need_c": False}):
        torch.library.opcheck(
            torch.ops.cce.lce_backward.default,
            (torch.rand_like(nll), None, None, p.e, p.c, p.bias, p.targets, nll, lse, tile_map, None, seed),
            {**rest, **needs},
        )


def test_opcheck_of_the_rest(device):
    p = problem(device)
    torch.library.opcheck(torch.ops.cce.label_logits.default, (p.e, p.c, p.bias, p.targets), {"softcap": 2.0})
    nll = torch.rand(20, device=device) * (p.targets != -100)
    for options in ({}, {"mean": False, "ignore_index": 7}):
        torch.library.opcheck(torch.ops.cce.reduce_nll.default, (nll.requires_grad_(), p.targets), options)
    q = p.leaves()
    torch.library.opcheck(
        torch.ops.cce.linear_cross_entropy.default, (q.e, q.c, q.targets, q.bias), {"impl": "cce_exact", "shift": 1}
    )


class Model(nn.Module):
    """A body and a loss by the operator itself, in every precision that the caller chooses."""

    def __init__(self, d=16, v=300, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(d, d)
        self.head = nn.Linear(d, v)
        self.options = options

    def forward(self, x, t):
        h = torch.tanh(self.body(x))
        return torch.ops.cce.linear_cross_entropy(h, self.head.weight, t, self.head.bias, **self.options)

    def dense(self, x, t):
        return F.cross_entropy(self.head(torch.tanh(self.body(x))).flatten(0, -2), t.flatten())


class FunctionModel(Model):
    def forward(self, x, t):
        h = torch.tanh(self.body(x))
        return linear_cross_entropy(h, self.head.weight, t, self.head.bias, **self.options)


def batch(n, device="cpu"):
    g = torch.Generator().manual_seed(n)
    return torch.randn(3, n, 16, generator=g).to(device), torch.randint(0, 300, (3, n), generator=g).to(device)


# Inductor gets the same graph of either model, so that each is compiled by it in one of the two ways.
COMPILED = [(model, "aot_eager", dynamic) for model in (Model, FunctionModel) for dynamic in (False, True)]
COMPILED += [(Model, "inductor", True), (FunctionModel, "inductor", False)]


@pytest.mark.parametrize(("model_class", "backend", "dynamic"), COMPILED)
def test_compile(model_class, backend, dynamic, device):
    torch._dynamo.reset()
    model = model_class(impl="cce_exact").to(device)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (10, 13):
        x, t = batch(n, device)
        loss, expected = compiled(x, t), model.dense(x, t)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        parameters = list(model.parameters())
        for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dynamic, compilations", [(None, 2), (True, 1)])
def test_a_new_length_does_not_compile_anew(dynamic, compilations):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Model(), fullgraph=True, backend=counter, dynamic=dynamic)
    for n in (10, 13, 17):
        compiled(*batch(n)).backward()
    assert counter.frame_count == compilations


@pytest.mark.parametrize("impl", ["cce", "cce_threshold"])
def test_compiled_sampling_draws_a_seed_a_call(impl):
    torch._dynamo.reset()
    model = Model(d=16, v=3000, impl=impl, filter_eps=2.0**-4)
    compiled = torch.compile(model, fullgraph=True)
    x, t = batch(20)
    draws = []
    for _ in range(2):
        model.zero_grad()
        compiled(x, t).backward()
        draws.append(model.head.weight.grad.clone())
    assert torch.equal(*draws) == (impl == "cce_threshold")


def test_compiled_graph_sees_forward_and_backward_only():
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def record(g, _):
            seen.extend(str(n.target) for n in g.graph.nodes if "cce" in str(n.target))
            return make_boxed_func(g.forward)

        return aot_autograd(fw_compiler=record, bw_compiler=record)(graph, inputs)

    torch.compile(Model(), fullgraph=True, backend=backend)(*batch(8)).backward()
    assert seen == ["cce.lce_forward.default", "cce.lce_backward.default"]


def test_compiled_autocast():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(e, c, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_cross_entropy(e, c, t, impl="cce_exact")

    p = problem("cpu").leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = linear_cross_entropy(p.e, p.c, p.targets, impl="cce_exact")
    torch.testing.assert_close(step(p.e, p.c, p.targets), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("model_class", [Model, FunctionModel])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(model_class, dynamic):
    model = model_class().eval()
    x, t = batch(10)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({1: length}, {1: length}) if dynamic else None
    program = torch.export.export(model, (x, t), dynamic_shapes=shapes)
    x, t = batch(13 if dynamic else 10)
    torch.testing.assert_close(program.module()(x, t), model.dense(x, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(program.run_decompositions().module()(x, t), model.dense(x, t), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = Model().eval()
    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, batch(10), dynamic_shapes=({1: length}, {1: length}))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x, t = batch(13)
        loss = torch._inductor.aoti_load_package(package)(x, t)
    torch.testing.assert_close(loss, model.dense(x, t).detach(), rtol=1e-5, atol=1e-5)


def test_needed_gradients_only():
    p = problem("cpu")
    nll, lse, tile_map, *_ = torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, None)
    for need_e, need_c, need_bias in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        grads = torch.ops.cce.lce_backward(
            torch.ones_like(nll),
            None,
            None,
            p.e,
            p.c,
            p.bias,
            p.targets,
            nll,
            lse,
            tile_map,
            None,
            torch.tensor([1]),
            need_e=bool(need_e),
            need_c=bool(need_c),
            need_bias=bool(need_bias),
        )
        assert [g.numel() > 0 for g in grads] == [bool(need_e), bool(need_c), bool(need_bias)]


def test_defaults_are_those_of_the_schemas():
    """PyTorch leaves out of a call to a Python kernel what has its schema's default."""
    ops = torch.ops.cce
    for op in (ops.lce_forward, ops.lce_backward, ops.lce_forward_portable, ops.lce_backward_portable):
        defaults = {x.name: x.default_value for x in op.default._schema.arguments if x.kwarg_only}
        assert {x.name: x.default for x in fields(KernelOptions)}.items() <= defaults.items()
    defaults = {x.name: x.default_value for x in ops.linear_cross_entropy.default._schema.arguments[4:]}
    assert defaults.pop("filter_eps") == -1.0
    assert defaults.items() <= {x.name: x.default for x in fields(Options)}.items()


def test_operator_errors():
    p = problem("cpu")
    ops = torch.ops.cce
    with pytest.raises(ValueError, match=r"e: expected \[N, D\], got \[1, 20, 16\]"):
        ops.lce_forward(p.e[None], p.c, None, p.targets[None], None)
    with pytest.raises(ValueError, match="method: .* got 'best'"):
        ops.lce_forward(p.e, p.c, None, p.targets, None, method="best")
    with pytest.raises(ValueError, match="eps: the sampling eps"):
        ops.lce_forward(p.e, p.c, None, p.targets, None, eps=2.0)
    nll, lse, no_map, *_ = ops.lce_forward(p.e, p.c, None, p.targets, None, need_map=False)
    with pytest.raises(ValueError, match=r"tile_map: expected int16 \[2, 20\], got int16 \[0, 0\]"):
        ops.lce_backward(nll, None, None, p.e, p.c, None, p.targets, nll, lse, no_map, None, torch.tensor([1]))
    nll, lse, tile_map, *_ = ops.lce_forward(p.e, p.c, None, p.targets, None)
    with pytest.raises(ValueError, match=r"tile_map: expected int16 \[2, 20\], got bfloat16 \[2, 20\]"):
        ops.lce_backward(
            *(nll, None, None, p.e, p.c, None, p.targets, nll, lse, tile_map.bfloat16(), None, torch.tensor([1]))
        )
    with pytest.raises(ValueError, match="seed: .* got None"):
        ops.lce_backward(nll, None, None, p.e, p.c, None, p.targets, nll, lse, tile_map, None, None)


def test_the_function_and_the_operator_agree(device):
    p = problem(device)
    for options in ({}, {"reduction": "none", "shift": 2}, {"softcap": 2.0, "reduction": "sum"}):
        assert torch.equal(
            linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options),
            torch.ops.cce.linear_cross_entropy(p.e, p.c, p.targets, p.bias, **options),
        )
    q = p.leaves()
    exact = torch.ops.cce.linear_cross_entropy(q.e, q.c, q.targets, filter_eps=None)
    same = linear_cross_entropy(q.e, q.c, q.targets, impl="cce_exact")
    for a, b in zip(torch.autograd.grad(exact, (q.e, q.c)), torch.autograd.grad(same, (q.e, q.c)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mean", [False, True])
def test_reduce_nll_is_what_torch_has(mean, device):
    p = problem(device)
    nll = (torch.rand(20, device=device) * (p.targets != p.ignore_index)).requires_grad_()
    count = (p.targets != p.ignore_index).sum()
    loss, counted = torch.ops.cce.reduce_nll(nll, p.targets, ignore_index=p.ignore_index, mean=mean)
    expected = nll.sum() / count if mean else nll.sum()
    torch.testing.assert_close(loss, expected)
    assert counted == count and not counted.requires_grad
    g, same = (torch.autograd.grad(3.0 * x, nll)[0] for x in (loss, expected))
    assert torch.equal(g, same)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"targets: expected \[N\] like nll, got \[19\] and \[20\]"):
            torch.ops.cce.reduce_nll(nll, p.targets[1:])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["method"])
def test_a_count_divides_the_gradient_of_nll_alone(options, device):
    p = problem(device)
    options = {**options, "ignore_index": p.ignore_index}
    seed = torch.tensor([3], device=device)
    nll, lse, tile_map, *_ = torch.ops.cce.lce_forward(p.e, p.c, p.bias, p.targets, seed, **options)
    options.pop("need_map", None)
    saved = (p.e, p.c, p.bias, p.targets, nll, lse, tile_map, None, seed)
    g_nll, g_lse, count = torch.rand_like(nll), torch.rand_like(lse), torch.tensor(7.0, device=device)
    # The weight of an ignored token is masked, not divided.
    for n, g in ((count, g_nll), (torch.zeros_like(count), torch.zeros_like(g_nll))):
        got = torch.ops.cce.lce_backward(g, g_lse, None, *saved, need_bias=True, count=n, **options)
        expected = torch.ops.cce.lce_backward(g / n, g_lse, None, *saved, need_bias=True, **options)
        # The sampled gradient of e is summed in no fixed order on a GPU.
        for x, y in zip(got, expected, strict=True):
            assert torch.allclose(x, y, rtol=1e-2, atol=1e-6, equal_nan=True)
        assert torch.equal(got[1].nan_to_num(), expected[1].nan_to_num())
    # What the portable path says on CUDA is lost where it is called through the stable ABI.
    said = "count" if device == "cpu" else "count|lce_backward|torch_call_dispatcher"
    with pytest.raises((ValueError, RuntimeError), match=said):
        torch.ops.cce.lce_backward(g_nll, g_lse, None, *saved, count=torch.ones(2, device=device), **options)


def test_cuda_tensors_without_cuda_kernels_name_the_mend():
    """What a build without CUDA kernels puts behind the CUDA key, and that it does."""
    if not cce_ext.HAS_CUDA and torch.version.hip is None:
        for op in ("label_logits", "lce_forward", "lce_backward", "reduce_nll"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cce::{op}", "CUDA")
    with pytest.raises(RuntimeError, match="built without its CUDA kernels.*CCE_CUDA=ON"):
        cce_ext.ops.refuse_cuda()


def test_a_gpu_without_cuda_kernels_is_told_at_import():
    """In a process where torch counts a GPU and the library says that it has no kernels."""
    program = (
        "import torch, warnings\n"
        "torch.version.cuda = {cuda!r}\n"
        "torch.cuda.device_count = lambda: {gpus}\n"
        "load = torch.ops.load_library\n"
        "def loaded(path):\n"
        "    load(path)\n"
        "    torch.ops.cce.build_info = lambda: '{{\"cuda\": false}}'\n"
        "torch.ops.load_library = loaded\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    try:\n"
        "        import cce_ext\n"
        "    except RuntimeError as error:\n"  # the library does have kernels: the refusal cannot be put beside them
        "        assert 'CUDA' in str(error), error\n"
        "print([w.filename for w in seen if 'built without its CUDA kernels' in str(w.message)])\n"
    )
    for cuda, gpus, warned in (("13.0", 1, True), ("13.0", 0, False), (None, 1, False)):
        command = [sys.executable, "-c", program.format(cuda=cuda, gpus=gpus)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (done.stdout.strip() != "[]") == warned, done.stdout
