"""Divergences of a student's softmax from a teacher's, and their gradient, without the logits of either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import kl_blocks
from ._ops import ops
from .classifier import accumulate_dtype, live_rows
from .kl_blocks import KINDS, Divergence, Head
from .ops import autocast_inputs, empty_gradients, register_functional, without_autocast
from .options import check_reduction, check_tensor
from .reduction import is_dtensor, reduce_tokens
from .scalars import check_number

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BETA = 0.5


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: str = "forward",
    beta: float = _BETA,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How far a student's distribution of the next token is from a teacher's, of both heads without their logits.

    With p and q the softmaxes of the student's and the teacher's logits over temperature:

    - "forward": KL(q || p) = sum q (log q - log p)
    - "reverse": KL(p || q) = sum p (log p - log q)
    - "jsd": beta KL(q || r) + (1 - beta) KL(p || r), r = beta q + (1 - beta) p

    over the whole vocabulary, in nats, without a factor temperature^2. All of it is exact, gradients included: nothing
    is sampled. They are the student's alone.

    Args:
        student_hidden: [.., D], bf16, fp16, fp32 or fp64; the dtype of its weight and bias, as autocast casts them.
        student_weight: [V, D].
        teacher_hidden: [.., D'], of the same tokens. D' and the dtype may be others than the student's.
        teacher_weight: [V, D'], of the same vocabulary. May be the student's. It and teacher_bias get no gradient,
            whether or not they require one.
        mask: [..] bool or None: which tokens count. The others are 0 and get no gradient, whatever their hidden holds.
        student_bias: [V] or None. -inf is no such token.
        teacher_bias: [V] or None.
        kind: which of the three.
        beta: the teacher's part in "jsd", in (0, 1). Not for the other two.
        temperature: what the logits of both are divided by, after the softcap.
        student_softcap: s > 0: z <- s tanh(z / s). None is none.
        teacher_softcap: likewise.
        reduction: "mean" over the tokens that count (NaN of none), "sum" or "none".

    Returns:
        A scalar, or [..] for "none", in fp32, or fp64 where a side has it. inf where the first distribution of a KL
            has what the second has not; the gradient of "reverse" is then NaN.

    Raises:
        TypeError: a dtype that is not supported or differs within a side; what is no tensor or no number.
        ValueError: shapes, devices or options; a teacher_hidden that would be given a gradient; a DTensor.
        RuntimeError: "jsd" of CUDA tensors in a build without CUDA kernels.
        NotImplementedError: torch.func's transforms and forward-mode AD; a second derivative.

    Source: what it computes and costs: docs/kl.md.
    """
    student = {"student_hidden": student_hidden, "student_weight": student_weight, "student_bias": student_bias}
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    _check_plain(student | teacher | {"mask": mask})
    check_reduction(reduction)
    _check_numbers(kind, beta, temperature, student_softcap, teacher_softcap)
    if kind != "jsd" and beta != _BETA:
        raise ValueError(f"beta: expected none with kind={kind!r}, which has no use for it, got {beta!r}")
    if teacher_hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_hidden: expected a tensor that requires no gradient: it is given none. Compute it under "
            "torch.no_grad(), or give its detach()"
        )
    student_hidden, student_weight, student_bias = autocast_inputs(student_hidden, student_weight, student_bias)
    teacher_hidden, teacher_weight, teacher_bias = autocast_inputs(teacher_hidden, teacher_weight, teacher_bias)
    shape = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"teacher_hidden: expected [{', '.join(map(str, (*shape, 'D')))}], the tokens of student_hidden "
            f"{list(student_hidden.shape)}, got {list(teacher_hidden.shape)}"
        )
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask: expected {list(shape)}, one for each token, got {list(mask.shape)}")
    flat = None if mask is None else mask.reshape(-1)
    value = ops.kl_forward(
        student_hidden.flatten(end_dim=-2) if student_hidden.dim() > 1 else student_hidden[None],
        student_weight,
        student_bias,
        (teacher_hidden.flatten(end_dim=-2) if teacher_hidden.dim() > 1 else teacher_hidden[None]).detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        flat,
        kind=kind,
        beta=beta,
        temperature=temperature,
        softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )[0].reshape(shape)
    return reduce_tokens(value, torch.ones_like(value, dtype=torch.bool) if mask is None else mask, reduction)


def _check_plain(tensors: dict[str, Tensor | None]) -> None:
    """Raises for what the operators could not name or serve."""
    for name, x in tensors.items():
        if x is None and name in ("mask", "student_bias", "teacher_bias"):
            continue
        check_tensor(name, x)
        assert x is not None
        if is_dtensor(x):
            raise ValueError(
                f"{name}: expected a plain tensor, got a DTensor; give its full_tensor(), or its to_local() where it "
                "is a rank's own tokens"
            )
        if name.endswith("hidden") and x.dim() < 1:
            raise ValueError(f"{name}: expected [.., D], got a tensor without dimensions")
    if torch.compiler.is_compiling():
        return
    tangents = forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors.values()
    )
    if tangents or torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "linear_kl: torch.func's transforms and forward-mode AD are not served: its gradient is loss.backward()'s "
            "and torch.autograd.grad's"
        )


def _check_head(side: str, e: Tensor, c: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError for a dtype, ValueError for a shape or a device."""
    of = {"hidden": e, "weight": c} if bias is None else {"hidden": e, "weight": c, "bias": bias}
    for name, x in of.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{side}_{name}: expected a tensor of bf16, fp16, fp32 or fp64, got {x.dtype}")
        if x.dtype != e.dtype:
            raise TypeError(
                f"{side}_{name}: expected {e.dtype} like {side}_hidden, got {x.dtype} (autocast casts hidden, weight "
                "and bias)"
            )
        if x.device != e.device:
            raise ValueError(f"{side}_{name}: expected {e.device} like {side}_hidden, got {x.device}")
    if e.shape[-1] == 0:
        raise ValueError(f"{side}_hidden: expected [.., D] with D >= 1, got {list(e.shape)}")
    if c.dim() != 2 or c.shape[1] != e.shape[-1] or c.shape[0] == 0:
        raise ValueError(
            f"{side}_weight: expected [V, {e.shape[-1]}] with V >= 1 for {side}_hidden of width {e.shape[-1]}, got "
            f"{list(c.shape)}"
        )
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(
            f"{side}_bias: expected [{c.shape[0]}] for {side}_weight {list(c.shape)}, got {list(bias.shape)}"
        )


def _check_numbers(
    kind: str, beta: float, temperature: float, softcap: float | None, teacher_softcap: float | None
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_number("beta", beta, "a number in (0, 1)", 1.0)
    check_number("temperature", temperature)
    for name, bound in (("student_softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if bound is not None:
            check_number(name, bound)


def _checked(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    mask: Tensor | None,
    kind: str = "forward",
    beta: float = _BETA,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> tuple[str, float, tuple[float, float | None, float | None]]:
    """What the two operators have in common: kind, beta, and what makes logits. Raises TypeError and ValueError."""
    _check_numbers(kind, beta, temperature, softcap, teacher_softcap)
    if e.dim() != 2 or teacher_e.dim() != 2:
        raise ValueError(f"hidden: expected [N, D] each, got {list(e.shape)} and {list(teacher_e.shape)}")
    _check_head("student", e, c, bias)
    _check_head("teacher", teacher_e, teacher_c, teacher_bias)
    if teacher_c.shape[0] != c.shape[0]:
        raise ValueError(
            f"teacher_weight: expected {c.shape[0]} rows, the vocabulary of student_weight {list(c.shape)}, got "
            f"{list(teacher_c.shape)}"
        )
    if teacher_e.shape[0] != e.shape[0]:
        raise ValueError(
            f"teacher_hidden: expected {e.shape[0]} tokens like student_hidden, got {list(teacher_e.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, True where a token counts, got {mask.dtype}; give targets != -100")
    if mask is not None and mask.shape != e.shape[:1]:
        raise ValueError(f"mask: expected [{e.shape[0]}], got {list(mask.shape)}")
    for name, other in (("teacher_hidden", teacher_e), ("mask", mask)):
        if other is not None and other.device != e.device:
            raise ValueError(f"{name}: expected {e.device} like student_hidden, got {other.device}")
    return kind, float(beta), (temperature, softcap, teacher_softcap)


def _heads(
    inputs: tuple[Tensor | None, ...], numbers: tuple[float, float | None, float | None]
) -> tuple[Head, Head, Tensor | None]:
    """Student's and teacher's, of tokens that count, and which those are [R], or None for all.

    Off the CPU, where counting would wait for the device, the others are zeros instead.
    """
    e, c, bias, teacher_e, teacher_c, teacher_bias, mask = inputs
    assert e is not None and c is not None and teacher_e is not None and teacher_c is not None
    temperature, softcap, teacher_softcap = numbers
    rows = None if mask is None else live_rows(mask)
    if rows is not None:
        e, teacher_e = e[rows], teacher_e[rows]
    elif mask is not None:
        e, teacher_e = (x.masked_fill(~mask[:, None], 0.0) for x in (e, teacher_e))
    factor = 1.0 / temperature
    student = Head(e, c, bias, softcap, factor)
    return student, Head(teacher_e, teacher_c, teacher_bias, teacher_softcap, factor), rows


def _kl_forward(*inputs: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    kind, beta, numbers = _checked(*inputs, **options)  # type: ignore[arg-type]
    e, mask = inputs[0], inputs[6]
    assert e is not None
    student, teacher, rows = _heads(inputs, numbers)
    # Autocast would round what the log-sum-exps' operator is given. It has no part in products into a buffer.
    with without_autocast(e.device):
        found = kl_blocks.divergence(kind, beta, student, teacher)
    if rows is not None:
        return tuple(x.new_zeros(len(e)).index_copy_(0, rows, x) for x in found)
    if mask is None:
        # Outputs of an operator share no memory.
        return *found[:3], found.mean.clone()
    return tuple(x.masked_fill(~mask, 0.0) for x in found)


def _kl_backward(
    g: Tensor, *inputs: Tensor | None, need_e: bool = True, need_c: bool = True, need_bias: bool = False, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    heads, (lse, teacher_lse, mean) = inputs[:7], inputs[7:]
    kind, beta, numbers = _checked(*heads, **options)  # type: ignore[arg-type]
    e, _, bias, _, _, teacher_bias, mask = heads
    assert e is not None and lse is not None and teacher_lse is not None and mean is not None
    needs = {"need_e": need_e, "need_c": need_c, "need_bias": need_bias}
    student, teacher, rows = _heads(heads, numbers)
    found = Divergence(mean, lse, teacher_lse, mean)
    if rows is not None:
        g, found = g[rows], Divergence(*(x[rows] for x in found))
    elif mask is not None:
        # Masked, not multiplied: what flows into a token that does not count may be anything, NaN as well.
        g = g.masked_fill(~mask, 0.0)
        if bias is not None or teacher_bias is not None:
            # Its p and q are 0 then, and so is dz, also where the biases alone are infinitely far apart.
            lse, teacher_lse = (x.masked_fill(~mask, float("inf")) for x in (lse, teacher_lse))
            found = Divergence(mean, lse, teacher_lse, mean)
    d_e, d_c, d_bias = kl_blocks.gradients(kind, beta, g, student, teacher, found, **needs)
    if d_e is not None and rows is not None:
        d_e = torch.zeros_like(e, memory_format=torch.contiguous_format).index_copy_(0, rows, d_e.to(e.dtype))
    empty = e.new_empty(0)
    return (
        empty if d_e is None else d_e.to(e.dtype),
        empty.clone() if d_c is None else d_c,
        empty.clone() if d_bias is None else d_bias.to(e.dtype),
    )


def _kl_forward_fake(e: Tensor, c: Tensor, bias: Tensor | None, teacher_e: Tensor, *rest: Any, **options: Any) -> Any:
    _checked(e, c, bias, teacher_e, *rest, **options)
    dtype = torch.promote_types(accumulate_dtype(e), accumulate_dtype(teacher_e))
    return tuple(e.new_empty(e.shape[0], dtype=dtype) for _ in range(4))


def _kl_backward_fake(
    g: Tensor,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    *rest: Any,
    need_e: bool = True,
    need_c: bool = True,
    need_bias: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(e, c, bias, need_e, need_c, need_bias)


class _KL(torch.autograd.Function):
    """cce::kl_forward, by what calls its kernel, and its gradient."""

    @staticmethod
    def forward(ctx: Any, call: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, options = inputs
        value, *rest = call(*tensors, **options)
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*tensors, *rest)
        ctx.options = options
        return value, *rest

    @staticmethod
    def backward(ctx: Any, g: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[1:4]
        needs = dict(zip(("need_e", "need_c", "need_bias"), need, strict=True))
        found = ops.kl_backward(g, *ctx.saved_tensors, **ctx.options, **needs)
        grads = (x if needed else None for x, needed in zip(found, need, strict=True))
        return None, *grads, None, None, None, None, None


register_functional("kl_forward", _kl_forward, _kl_forward_fake, _KL.apply)
register_functional(
    "kl_backward", _kl_backward, _kl_backward_fake, "cce: the gradient of linear_kl cannot be differentiated again"
)
