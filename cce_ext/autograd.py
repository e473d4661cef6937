"""The gradient of the operators lce_forward, lce_backward and label_logits, and the short way to their kernels.

The dispatcher serves autograd and autocast by functions in Python, each of which takes longer than a small call's
kernel. In eager mode lce_forward and gradients, here, pass them by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from ._ops import ops
from .options import ENTROPY, KernelOptions, refuse_tangents

AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA", "AutocastXPU", "AutocastMPS")

_keys = [DispatchKeySet(getattr(DispatchKey, k)) for k in ("AutogradFunctionality", "AutogradOther", *AUTOCAST_KEYS)]
_AUTOGRAD_AND_AUTOCAST = functools.reduce(DispatchKeySet.__or__, _keys)

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _call_kernel(call: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """What an operator's call gives below autograd and autocast."""
    with torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD_AND_AUTOCAST):
        return call(*args, **keywords)


def _has_short_way(*inputs: Tensor | None) -> bool:
    """Whether a call would meet nothing but autograd and autocast on its way to the kernel.

    A graph that is traced, a mode or a transform is to see the operator.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    ) and _PLAIN.issuperset(map(type, inputs))


class Outputs(NamedTuple):
    """Of cce::lce_forward, whose schema says what they are."""

    nll: Tensor
    lse: Tensor
    tile_map: Tensor
    stats: Tensor
    argmax: Tensor


def lce_forward(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, seed: Tensor | None, **options: Any
) -> Outputs:
    """cce::lce_forward of e, c and bias that autocast has cast."""
    if not _has_short_way(e, c, bias, targets, seed, options.get("scale")):
        out = ops.lce_forward(e, c, bias, targets, seed, **options)
    elif torch.is_grad_enabled() and torch._C._any_requires_grad(e, c, bias):
        out = _differentiable(ops.lce_forward.default, e, c, bias, targets, seed, options)
    else:
        out = _call_kernel(ops.lce_forward.default, e, c, bias, targets, seed, **options)
    return Outputs(*out)


# Of lce_forward alone.
OF_FORWARD = ("need_map", "stats", "batch_invariant", "scan", "keep_logits")


class _LceForward(torch.autograd.Function):
    """cce::lce_forward, by what calls its kernel, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Any],
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        seed: Tensor | None,
        scale: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        out = Outputs(*_call_kernel(call, e, c, bias, targets, seed, scale=scale, **options))
        # Of stats, the entropy alone is differentiable.
        has_entropy = bool(options.get("stats", 0) & ENTROPY)
        ctx.mark_non_differentiable(out.tile_map, out.argmax, *(() if has_entropy else (out.stats,)))
        ctx.set_materialize_grads(False)
        # A copy: users may change theirs in place.
        entropy = out.stats[0].clone() if has_entropy else None
        ctx.save_for_backward(e, c, bias, targets, out.nll, out.lse, out.tile_map, entropy, seed, scale)
        ctx.options = {name: value for name, value in options.items() if name not in OF_FORWARD}
        return tuple(out)

    @staticmethod
    def backward(
        ctx: Any, g_nll: Tensor | None, g_lse: Tensor | None, g_map: None, g_stats: Tensor | None, g_argmax: None
    ) -> tuple[Tensor | None, ...]:
        *saved, entropy, seed, scale = ctx.saved_tensors
        ups = (g_nll, g_lse, None if g_stats is None or entropy is None else g_stats[0])
        d_e, d_c, d_bias = gradients(ups, (*saved, entropy, seed), scale, ctx.options, ctx.needs_input_grad[1:4])
        return None, d_e, d_c, d_bias, None, None, None, None


_apply: Callable[..., tuple[Tensor, ...]] = _LceForward.apply


def lce_loss(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, seed: Tensor | None, mean: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """The sum of cce::lce_forward's nll, or its mean over the tokens that count, and the lse [N].

    options: of cce::lce_forward, with ignore_index, without stats and scale.
    """
    if not _has_short_way(e, c, bias, targets, seed):
        out = Outputs(*ops.lce_forward(e, c, bias, targets, seed, **options))
        return _reduced(out.nll, targets, options["ignore_index"], mean)[0], out.lse
    if torch.is_grad_enabled() and torch._C._any_requires_grad(e, c, bias):
        return _apply_loss(e, c, bias, targets, seed, mean, options)
    out, loss, _ = _call_loss(e, c, bias, targets, seed, mean, options)
    return loss, out.lse


def _reduced(nll: Tensor, targets: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor | None]:
    """The sum or the mean, and what that divides by. nll is 0 where a token does not count."""
    # A compiler makes fewer launches of the plain operations than an operator takes.
    if nll.is_cuda and nll.dtype == torch.float32 and not torch.compiler.is_compiling():
        loss, count = ops.reduce_nll.default(nll, targets, ignore_index=ignore_index, mean=mean)
        return loss, count if mean else None
    if not mean:
        return nll.sum(), None
    count = (targets != ignore_index).sum()
    return nll.sum() / count, count


def _call_loss(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seed: Tensor | None,
    mean: bool,
    options: dict[str, Any],
) -> tuple[Outputs, Tensor, Tensor | None]:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD_AND_AUTOCAST):
        out = Outputs(*ops.lce_forward.default(e, c, bias, targets, seed, **options))
        return out, *_reduced(out.nll, targets, options["ignore_index"], mean)


class _LceLoss(torch.autograd.Function):
    """The short way of lce_loss: one step where the operator and its reduction take five."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        seed: Tensor | None,
        mean: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        (nll, lse, tile_map, *_), loss, count = _call_loss(e, c, bias, targets, seed, mean, options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(e, c, bias, targets, nll, lse, tile_map, seed, count)
        ctx.options = options
        return loss, lse

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        e, c, bias, targets, nll, lse, tile_map, seed, count = ctx.saved_tensors
        options = {name: value for name, value in ctx.options.items() if name not in OF_FORWARD}
        if g is not None:
            # On a GPU the operator divides, since that launches nothing.
            if count is not None and count.is_cuda and count.dtype == nll.dtype:
                options["count"] = count
            elif count is not None:
                g = g / count
            # An ignored token gets it as well: the operator masks it.
            g = g.expand(nll.shape[0])
        saved = (e, c, bias, targets, nll, lse, tile_map, None, seed)
        d_e, d_c, d_bias = gradients((g, g_lse, None), saved, None, options, ctx.needs_input_grad[:3])
        return d_e, d_c, d_bias, None, None, None, None


_apply_loss: Callable[..., tuple[Tensor, Tensor]] = _LceLoss.apply


def _differentiable(call: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """args: those of the operator, and a dict of its keywords."""
    *tensors, options = args
    scale = options.get("scale")
    if scale is not None and scale.requires_grad:
        raise ValueError("scale: expected a tensor that requires no gradient: it is given none")
    rest = {name: value for name, value in options.items() if name != "scale"}
    return _apply(call, *tensors, scale, rest)


def gradients(
    ups: tuple[Tensor | None, Tensor | None, Tensor | None],
    saved: tuple[Tensor | None, ...],
    scale: Tensor | None,
    options: dict[str, Any],
    need: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """cce::lce_backward of what a forward saved (its arguments from e to seed): e's, c's and bias's, where needed.

    ups: the gradients of nll, lse and the entropy.
    """
    e = saved[0]
    sampled = options.get("method", KernelOptions.method) == "sampled"
    if e is not None and e.is_cuda and sampled and torch.are_deterministic_algorithms_enabled():
        # The visits add to dE in no fixed order, while the exact gradient has one. dC's samples have one as well.
        options = options | {"filter_e": False}
    needs = {"need_e": need[0], "need_c": need[1], "need_bias": need[2]}
    # Gradients are enabled here where these are to be differentiated: the operator refuses that.
    if not torch.is_grad_enabled() and _has_short_way(*ups, *saved, scale):
        found = _call_kernel(ops.lce_backward.default, *ups, *saved, scale=scale, **options, **needs)
    else:
        found = ops.lce_backward(*ups, *saved, scale=scale, **options, **needs)
    d_e, d_c, d_bias = (g if needed else None for g, needed in zip(found, need, strict=True))
    return d_e, d_c, d_bias


class _ReduceNll(torch.autograd.Function):
    """cce::reduce_nll, by what calls its kernel, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., Any], nll: Tensor, targets: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        loss, count = _call_kernel(call, nll, targets, **options)
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(count)
        ctx.mean, ctx.n = options.get("mean", True), nll.shape[0]
        return loss, count

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_count: None) -> tuple[Tensor | None, ...]:
        (count,) = ctx.saved_tensors
        return None, (g / count if ctx.mean else g).expand(ctx.n), None, None


class _NotDifferentiable(torch.autograd.Function):
    """An operator, by what calls its kernel, whose gradient raises NotImplementedError with a message."""

    @staticmethod
    def forward(ctx: Any, message: str, call: Callable[..., Any], *args: Any) -> Any:
        ctx.message = message
        *tensors, options = args
        return _call_kernel(call, *tensors, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(ctx.message)


def _not_differentiable(message: str) -> Callable[..., Any]:
    return functools.partial(_NotDifferentiable.apply, message)


def with_pair_logits(
    e: Tensor, c: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """e, c and bias, which are what the loss is to be computed of, and cce::pair_logits [N, K] of them.

    labels: [N, K] int32, -1 for none. What the pairs add to the gradients is then added to those that come back of the
    loss, and no other tensor of their size is needed. A transform and forward-mode AD see the operator by itself, which
    has a gradient of its own.
    """
    options = {"ignore_index": -1, "softcap": softcap}
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() or forward_ad._current_level >= 0:
        return e, c, bias, ops.pair_logits(e, c, bias, labels, **options)
    call = _call_kernel if _has_short_way(e, c, bias, labels) else _call
    new_e, new_c, new_bias, z = _with_pair_logits(call, e, c, bias, labels, options)
    # A view requires a gradient where one of them does: what is frozen stays what it is.
    e, c = new_e if e.requires_grad else e, new_c if c.requires_grad else c
    bias = new_bias if bias is not None and bias.requires_grad else bias
    return e, c, bias, z


def _call(call: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    return call(*args, **keywords)


class _WithPairLogits(torch.autograd.Function):
    """e, c and bias as they are, and their pair logits. call: calls an operator that is its first argument."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Any],
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        z = call(ops.pair_logits.default, e, c, bias, labels, **options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(e, c, bias, labels, z)
        ctx.call, ctx.options = call, options
        return e.view_as(e), c.view_as(c), None if bias is None else bias.view_as(bias), z

    @staticmethod
    def backward(
        ctx: Any, d_e: Tensor | None, d_c: Tensor | None, d_bias: Tensor | None, g: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if g is not None:
            need = ctx.needs_input_grad[1:4]
            d_e, d_c, d_bias = _add_pairs(ctx.call, g, ctx.saved_tensors, ctx.options, need, (d_e, d_c, d_bias))
        return None, d_e, d_c, d_bias, None, None


class _PairLogits(torch.autograd.Function):
    """cce::pair_logits, by what calls its kernel, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Any],
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        z: Tensor = _call_kernel(call, e, c, bias, targets, **options)
        ctx.save_for_backward(e, c, bias, targets, z)
        ctx.options = options
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("cce: the gradient of cce::pair_logits cannot be differentiated again")
        return None, *_add_pairs(_call, g, ctx.saved_tensors, ctx.options, ctx.needs_input_grad[1:4]), None, None


_with_pair_logits: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor]] = _WithPairLogits.apply


def _add_pairs(
    call: Callable[..., Any],
    g: Tensor,
    saved: tuple[Tensor, ...],
    options: dict[str, Any],
    need: tuple[bool, ...],
    gradients: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor | None, ...]:
    """Gradients of e, c and bias, where needed, with those by the pair logits z [N, K], whose own is g, added.

    In place, since nobody else has what comes back of a view that one operator was given.
    """
    *inputs, targets, z = saved
    c, softcap = inputs[1], options.get("softcap")
    labels = torch.where((targets >= 0) & (targets < len(c)), targets, -1).to(torch.int32)
    if "ignore_index" in options:
        labels = labels.masked_fill(targets == options["ignore_index"], -1)
    if softcap is not None:
        g = g * (1 - (z / softcap).square())
    coefficients = g.to(z.dtype).contiguous()
    out = [
        None if not needed or x is None else torch.zeros_like(x) if d is None else d.contiguous()
        for x, d, needed in zip(inputs, gradients, need, strict=True)
    ]
    # The order in which a row of c's gradient is summed: that of the tokens, on every run.
    order = labels.flatten().sort(stable=True).indices if need[1] or need[2] else None
    call(ops.add_pair_gradients.default, coefficients, labels, order, *inputs[:2], *out)
    return tuple(d if new is None else new for d, new in zip(gradients, out, strict=True))


def register(library: torch.library.Library) -> None:
    """Register all of it with the operators, for those who call them by themselves and for compiled graphs."""
    _register(library, "lce_forward", _differentiable)
    _register(library, "pair_logits", _PairLogits.apply)
    _register(library, "reduce_nll", _ReduceNll.apply)
    _register(
        library,
        "lce_backward",
        _not_differentiable("cce: the gradient of linear_cross_entropy cannot be differentiated again"),
    )
    _register(
        library,
        "label_logits",
        _not_differentiable("cce::label_logits has no gradient: differentiate lce_forward's nll instead"),
    )


def _register(library: torch.library.Library, name: str, differentiable: Callable[..., Any]) -> None:
    """differentiable takes what calls the operator's kernel, the operator's arguments, and a dict of its keywords.

    torch.library.register_autograd would leave forward-mode AD a tangent of 0, and the short way its own Function.
    """
    op = getattr(ops, name).default

    def kernel(keyset: DispatchKeySet, *args: Tensor | None, **options: Any) -> Any:
        refuse_tangents(*args)
        call = functools.partial(op.redispatch, keyset & torch._C._after_autograd_keyset)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return differentiable(call, *args, options)
        return _call_kernel(call, *args, **options)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def register_operator(library: torch.library.Library, name: str, gradient: Callable[..., Any] | str) -> None:
    """Register one operator's gradient, or the message of the NotImplementedError that stands for it."""
    _register(library, name, _not_differentiable(gradient) if isinstance(gradient, str) else gradient)
