"""linear_kl as PyTorch sees it: operators, compilers, autocast, transforms; and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from support.heads import KINDS, Heads, gradients, heads
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cce_ext import linear_kl

each_kind = pytest.mark.parametrize("kind", KINDS)


def operator_inputs(h: Heads) -> tuple[Tensor | None, ...]:
    return h.e, h.c, h.bias, *h.teacher, h.mask


@each_kind
def test_opcheck(kind, device):
    h = heads(dtype=torch.float32, device=device, kind=kind, bias=True, masked=True)
    options = {"kind": kind, "beta": 0.3, "temperature": 0.7, "softcap": 6.0}
    torch.library.opcheck(torch.ops.cce.kl_forward.default, operator_inputs(h.leaves()), options)
    value, *saved = torch.ops.cce.kl_forward(*operator_inputs(h), **options)
    for needs in ({}, {"need_e": False, "need_bias": True}, {"need_c": False}):
        inputs = (torch.rand_like(value), *operator_inputs(h), *saved)
        torch.library.opcheck(torch.ops.cce.kl_backward.default, inputs, {**options, **needs})


def test_defaults_are_those_of_the_schemas():
    """PyTorch leaves out of a call to a Python kernel what has its schema's default."""
    ours = {name: x.default for name, x in inspect.signature(linear_kl).parameters.items()}
    ours |= {"softcap": ours["student_softcap"], "need_e": True, "need_c": True, "need_bias": False}
    for op in (torch.ops.cce.kl_forward, torch.ops.cce.kl_backward):
        defaults = {x.name: x.default_value for x in op.default._schema.arguments if x.kwarg_only}
        assert len(defaults) >= 5
        assert defaults.items() <= ours.items()


@each_kind
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(kind, dynamic, device):
    """Without a graph break. The logits are the operator's own affair there as well."""
    torch._dynamo.reset()
    h = heads(dtype=torch.float32, device=device, kind=kind, bias=True, masked=True).leaves()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(e, c, bias, teacher_e, teacher_c, teacher_bias, mask):
        loss = linear_kl(e, c, teacher_e, teacher_c, mask, student_bias=bias, teacher_bias=teacher_bias, kind=kind)
        return 2 * loss

    loss, expected = step(*operator_inputs(h)), 2 * h.ours()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, h), gradients(expected, h))


def test_export(device):
    h = heads(dtype=torch.float32, device=device)

    class Head(nn.Module):
        def forward(self, e, c, teacher_e, teacher_c):
            return linear_kl(e, c, teacher_e, teacher_c, kind="jsd", beta=0.2)

    n = torch.export.Dim("n", min=2, max=100)
    args = (h.e, h.c, *h.teacher[:2])
    program = torch.export.export(Head(), args, dynamic_shapes=({0: n}, None, {0: n}, None))
    fewer = (h.e[:9], h.c, h.teacher[0][:9], h.teacher[1])
    torch.testing.assert_close(program.module()(*fewer), linear_kl(*fewer, kind="jsd", beta=0.2))


@each_kind
def test_autocast(kind, device):
    """Inputs have its dtype, sums do not; and it reaches no step of the backward."""
    h = heads(dtype=torch.float32, device=device, kind=kind, bias=True).leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = h.ours()
        grads = gradients(loss, h)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in grads] == [torch.float32] * 3
    rounded = h.to(torch.bfloat16).leaves()
    expected = rounded.ours()
    assert torch.equal(loss, expected)
    for x, y in zip(grads, gradients(expected, rounded), strict=True):
        assert torch.equal(x, y.float())


@each_kind
def test_operators_under_autocast_keep_their_dtypes(kind, device):
    h = heads(dtype=torch.float32, device=device, kind=kind).leaves()
    expected = torch.ops.cce.kl_forward(*operator_inputs(h), kind=kind)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = torch.ops.cce.kl_forward(*operator_inputs(h), kind=kind)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_divergence_alone_has_a_gradient(device):
    """What else the operator gives is for its backward: in silence it would have lost its own."""
    value, *rest = torch.ops.cce.kl_forward(*operator_inputs(heads(device=device).leaves()))
    assert value.requires_grad
    assert not any(x.requires_grad for x in rest)


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(kind, reentrant, device):
    h = heads(device=device, kind=kind).leaves()
    loss = checkpoint(lambda e, c: replace(h, e=e, c=c).ours(), h.e, h.c, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close([h.e.grad, h.c.grad], gradients(h.ours(), h))


def test_no_second_derivative(device):
    h = heads(device=device).leaves()
    (d_e,) = torch.autograd.grad(h.ours(), h.e, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_kl cannot be differentiated again"):
        d_e.sum().backward()


def test_transforms_are_refused(device):
    h = heads(device=device)
    loss = lambda e: replace(h, e=e).ours()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"linear_kl: torch\.func's transforms"):
        torch.func.grad(loss)(h.e)
    with pytest.raises(NotImplementedError, match=r"linear_kl: torch\.func's transforms"):
        torch.func.vmap(loss)(h.e[None])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(h.e, torch.ones_like(h.e))
        with pytest.raises(NotImplementedError, match="linear_kl: .* forward-mode AD"):
            loss(dual)
        assert torch.equal(loss(h.e), h.ours())


WRONG = {
    "student_hidden: expected a tensor, got list": {"student_hidden": [1.0]},
    "student_weight: expected a tensor, got Linear; give its weight": {"student_weight": nn.Linear(4, 9)},
    "mask: expected a tensor, got list": {"mask": [True] * 5},
    "teacher_hidden: expected a tensor of bf16, fp16, fp32 or fp64, got torch.int64": {
        "teacher_hidden": torch.ones(5, 3, dtype=torch.int64)
    },
    "student_weight: expected torch.float32 like student_hidden, got torch.bfloat16": {
        "student_weight": torch.ones(9, 4, dtype=torch.bfloat16)
    },
    r"teacher_bias: expected torch.float32 like teacher_hidden, got torch.float64": {
        "teacher_bias": torch.ones(9, dtype=torch.float64)
    },
    r"student_weight: expected \[V, 4\] .* got \[9, 5\]": {"student_weight": torch.ones(9, 5)},
    r"student_weight: expected \[V, 4\] with V >= 1 .* got \[0, 4\]": {"student_weight": torch.ones(0, 4)},
    r"teacher_weight: expected \[V, 3\] .* got \[9\]": {"teacher_weight": torch.ones(9)},
    r"teacher_weight: expected 9 rows, the vocabulary of student_weight \[9, 4\], got \[8, 3\]": {
        "teacher_weight": torch.ones(8, 3)
    },
    r"student_hidden: expected \[\.\., D\] with D >= 1": {"student_hidden": torch.ones(5, 0)},
    r"student_hidden: expected \[\.\., D\], got a tensor without": {"student_hidden": torch.ones(())},
    r"teacher_hidden: expected \[5, D\], the tokens of student_hidden \[5, 4\], got \[6, 3\]": {
        "teacher_hidden": torch.ones(6, 3)
    },
    r"student_bias: expected \[9\] for student_weight \[9, 4\], got \[4\]": {"student_bias": torch.ones(4)},
    r"teacher_bias: expected \[9\] for teacher_weight \[9, 3\], got \[9, 1\]": {"teacher_bias": torch.ones(9, 1)},
    r"mask: expected \[5\], one for each token, got \[4\]": {"mask": torch.ones(4, dtype=torch.bool)},
    "mask: expected bool, True where a token counts, got torch.int64; give targets != -100": {
        "mask": torch.ones(5, dtype=torch.int64)
    },
    "student_weight: expected cpu like student_hidden, got meta": {"student_weight": torch.ones(9, 4, device="meta")},
    "mask: expected cpu like student_hidden, got meta": {"mask": torch.ones(5, dtype=torch.bool, device="meta")},
    "kind: expected one of forward, reverse, jsd, got 'kl'": {"kind": "kl"},
    r"beta: expected a number in \(0, 1\), got 1\.0": {"kind": "jsd", "beta": 1.0},
    r"beta: expected a number in \(0, 1\), got 0": {"kind": "jsd", "beta": 0},
    r"beta: expected a number in \(0, 1\), got nan": {"kind": "jsd", "beta": float("nan")},
    "beta: expected none with kind='forward', which has no use for it, got 0.1": {"beta": 0.1},
    "temperature: expected a positive number, got 0.0": {"temperature": 0.0},
    "temperature: expected a positive number, got -1": {"temperature": -1},
    "temperature: expected a positive number, got inf": {"temperature": float("inf")},
    "temperature: expected a positive number, got 'hot'": {"temperature": "hot"},
    "student_softcap: expected a positive number, got 0": {"student_softcap": 0},
    "teacher_softcap: expected a positive number, got -3.0": {"teacher_softcap": -3.0},
    "reduction: expected one of mean, sum, none, got 'batchmean'": {"reduction": "batchmean"},
    r"student_softcap: expected a positive number, got a tensor of shape \[2\]": {"student_softcap": torch.ones(2)},
    **{
        f"{name}: expected a .*number.*, got a tensor that requires a gradient: it is given none": {
            name: torch.tensor(0.5, requires_grad=True),
            "kind": "jsd",
        }
        for name in ("beta", "temperature", "student_softcap", "teacher_softcap")
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_argument_and_what_it_was(message):
    right = {
        "student_hidden": torch.ones(5, 4),
        "student_weight": torch.ones(9, 4),
        "teacher_hidden": torch.ones(5, 3),
        "teacher_weight": torch.ones(9, 3),
    }
    linear_kl(**right)
    with pytest.raises((ValueError, TypeError), match=message):
        linear_kl(**{**right, **WRONG[message]})


def test_dtensors_are_refused():
    class Mesh(torch.Tensor):
        device_mesh = None

    h = heads()
    with pytest.raises(ValueError, match=r"student_weight: expected a plain tensor, got a DTensor; give its full_tens"):
        replace(h, c=h.c.as_subclass(Mesh)).ours()
