"""Log-probabilities of a linear classifier's labels, and the softmax's entropy and statistics, without its logits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Call, changeable, outputs_of, prepare
from .classifier import accumulate_dtype
from .labels import may_look_at
from .ops import register_composite
from .options import (
    DENSE,
    ENTROPY,
    LOG_SUM_SQ_PROBS,
    MAXIMUM,
    MEAN_LOGITS,
    FilterEps,
    Names,
    Options,
    check_softcap,
    check_tensors,
    unwrapped,
)
from .scalars import check_number
from .vocab_parallel import VocabParallelOptions

_NAMES = Names("hidden", "weight")

# What each output needs of lce_forward's stats.
_STATS = {
    "entropy": ENTROPY,
    "is_top1": MAXIMUM,
    "log_sum_sq_probs": LOG_SUM_SQ_PROBS,
    "mean_logits": MEAN_LOGITS,
    "max_logprob": MAXIMUM,
}


class LogProbs(NamedTuple):
    """What linear_logprobs returns, in nats, of the targets' shape (the last dimension less shift).

    With z a token's logits (scaled, softcapped, over the temperature) and p their softmax. fp32, fp64 for fp64 inputs;
    0 or False where the target is ignore_index. What outputs does not name is None.

    Attributes:
        logprobs: log p of the target. Differentiable.
        lse: log of the sum of exp z. Differentiable.
        entropy: -sum p log p. Differentiable.
        is_top1: bool: the target is the first column that has the largest logit.
        log_sum_sq_probs: log of the sum of p^2, minus the Renyi entropy of order 2.
        mean_logits: sum z / V.
        max_logprob: log of the largest p.
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    max_logprob: Tensor | None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = -100,
    shift: bool | int = 0,
    outputs: Collection[str] = ("entropy",),
    impl: str = "cce",
    filter_eps: FilterEps = "auto",
    vocab_parallel_options: VocabParallelOptions | None = None,
    batch_invariant: bool = False,
    generator: torch.Generator | None = None,
) -> LogProbs:
    """Log-probabilities of targets under softmax(z), z = logit_scale * (hidden @ weight.T + bias) / temperature.

    One forward and, where a gradient is asked for, one backward, without the [N, V] logits. With a softcap,
    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature.

    Args:
        hidden: [.., D], bf16, fp16, fp32 or fp64.
        weight: [V, D], hidden's dtype and device (under autocast hidden, weight and bias are cast).
        targets: [..] int32 or int64, in [0, V) or ignore_index.
        bias: [V] or None.
        temperature: positive; a number, or a float tensor of one element or of the targets' shape, which the shift
            moves with them. It gets no gradient. On a GPU a tensor's values are not looked at (CCE_DEBUG=1 looks):
            where one is not positive the token's results mean nothing.
        softcap: a positive number or None.
        logit_scale: a positive number.
        ignore_index: tokens with this target have 0 everywhere, and no gradient. None: all tokens count. Nothing is
            looked for then, and the rows of hidden that count are not copied on a GPU.
        shift: as in linear_cross_entropy: position t has targets[.., t + shift]. True is 1.
        outputs: of "entropy", "is_top1", "log_sum_sq_probs", "mean_logits" and "max_logprob", those that are wanted
            beside logprobs and lse. The others cost nothing.
        impl: as in linear_cross_entropy. With "cce" the gradients of logprobs, lse and entropy are sampled together,
            unbiased; what is returned is exact with every impl.
        filter_eps: as in linear_cross_entropy. With "cce" a token's gradient visits at most 1/eps vocab tiles in
            expectation, that of the entropy included; "cce_threshold" keeps blocks by |p - onehot|, whatever the
            entropy's gradient is.
        vocab_parallel_options: as in linear_cross_entropy: weight and bias are this rank's rows.
        batch_invariant: a token's results are bitwise the same whatever else is in the batch: how many tokens, in which
            order, padded or ignored ones. Of the results, not of gradients, which add up over the batch. Not for the
            dense impls.
        generator: as in linear_cross_entropy.

    hidden, weight, bias, targets and temperature may be DTensors of one mesh (docs/distributed.md); so are the results.

    Returns:
        LogProbs: logprobs, lse, and what outputs names, each of the targets' shape ([.., T - shift]).

    Raises:
        TypeError: a dtype that is not supported or differs from hidden's; what is no tensor or no number.
        ValueError: shapes, devices or options: an unknown output, a temperature that is not positive or requires a
            gradient, batch_invariant with a dense impl.
        IndexError: on the CPU, a target out of range (on CUDA its logprob is NaN, and CCE_DEBUG=1 raises).
        RuntimeError: a CUDA tensor in a build without CUDA kernels.
        NotImplementedError: forward-mode AD and torch.func.grad, but for "reference"; a second derivative.

    Source: the entropy's gradient and how it is sampled: docs/logprobs.md.
    """
    stats = _stats_of(outputs)
    check_number("logit_scale", logit_scale)
    check_softcap(softcap)
    check_tensors(hidden, weight, targets, bias, _NAMES)
    of_tokens, factor = None, None
    if isinstance(temperature, Tensor):
        _check_temperature(temperature, targets)
        of_tokens = temperature
    else:
        check_number("temperature", temperature)
        factor = logit_scale / temperature
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    if batch_invariant and impl in DENSE:
        raise ValueError(
            f"batch_invariant: expected False with impl={impl!r}, whose products are PyTorch's of the whole batch"
        )
    options = Options(
        ignore_index=ignore_index,
        softcap=None if softcap is None else softcap / logit_scale,
        shift=shift,
        filter_eps=filter_eps,
        impl=impl,
        vocab_parallel_options=vocab_parallel_options,
        generator=generator,
    )
    call = prepare(hidden, weight, targets, bias, options, temperature=of_tokens, stats=stats, names=_NAMES)
    scale = _scale(call, factor, logit_scale, ignore_index)
    nll, lse, rows, argmax, _ = outputs_of(
        call, options, softcap=options.softcap, scale=scale, stats=stats, batch_invariant=batch_invariant
    )
    found: dict[str, Tensor] = {}
    for i, name in enumerate(("entropy", "log_sum_sq_probs", "mean_logits")):
        if name in outputs:
            found[name] = changeable(rows[i]) if name == "entropy" else rows[i].detach()
    if "is_top1" in outputs:
        found["is_top1"] = (argmax == call.labels) & call.counts(ignore_index)
    if "max_logprob" in outputs:
        found["max_logprob"] = (rows[3] - lse).detach()
    shaped = {name: call.of_positions(x) for name, x in found.items()}
    # Not -nll, which would make -0.0 of what is ignored.
    logprobs, lse = call.of_positions(0.0 - nll), call.of_positions(changeable(lse))
    return LogProbs(logprobs, lse, *(shaped.get(name) for name in LogProbs._fields[2:]))


def _stats_of(outputs: Collection[str]) -> int:
    """What they need of lce_forward. Raises ValueError for one that is none, TypeError for what is no tuple of them."""
    expected = ", ".join(_STATS)
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list, set, frozenset)):
        raise TypeError(f"outputs: expected a tuple of some of {expected}, got {outputs!r}")
    stats = 0
    for name in outputs:
        if name not in _STATS:
            raise ValueError(f"outputs: expected some of {expected}, got {name!r}")
        stats |= _STATS[name]
    return stats


def _check_temperature(temperature: Tensor, targets: Tensor) -> None:
    """Its values are looked at once the tokens that count are known."""
    if not temperature.is_floating_point():
        raise TypeError(f"temperature: expected a number or a float tensor, got {temperature.dtype}")
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor that requires no gradient: it is given none")
    if temperature.numel() != 1 and temperature.shape != targets.shape:
        raise ValueError(
            f"temperature: expected one number or the targets' shape {list(targets.shape)}, got "
            f"{list(temperature.shape)}"
        )


def _scale(call: Call, factor: float | None, logit_scale: float, ignore_index: int | None) -> Tensor | None:
    """What multiplies the logits of each token [N], None for 1. factor: it where the temperature is no tensor."""
    dtype, n = accumulate_dtype(call.e), call.labels.shape[0]
    if factor is not None:
        return None if factor == 1.0 else call.e.new_full((n,), factor, dtype=dtype)
    temperature, ignored = call.temperature, ~call.counts(ignore_index)
    assert temperature is not None
    if temperature.device != call.e.device:
        raise ValueError(f"temperature: expected {call.e.device} like hidden, got {temperature.device}")
    # What a graph is traced by is a subclass, and has no values.
    is_plain = not torch.compiler.is_compiling() and type(unwrapped(temperature)) in (Tensor, torch.nn.Parameter)
    if is_plain and may_look_at(temperature):
        bad = unwrapped(~(temperature > 0) & ~ignored).flatten()
        if bool(bad.any()):
            values = unwrapped(temperature.expand(n)).flatten()
            raise ValueError(f"temperature: expected positive numbers, got {values[int(bad.int().argmax())].item()}")
    # What an ignored token has may be anything, 0 as well.
    return (logit_scale / temperature.to(dtype)).expand(n).masked_fill(ignored, 1.0)


def _operator(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **given: Any
) -> tuple[Tensor, ...]:
    """cce::linear_logprobs, whose arguments have one type each. PyTorch leaves out those that have their defaults."""
    temperatures = given.pop("temperatures", None)
    if temperatures is not None:
        given["temperature"] = temperatures
    if given.get("filter_eps") == -1.0:
        given["filter_eps"] = "auto"
    if "outputs" in given:
        given["outputs"] = tuple(filter(None, given["outputs"].split(",")))
    logprobs, lse, *rest = linear_logprobs(hidden, weight, targets, bias, **given)
    dtypes = {"is_top1": torch.bool}
    return (
        logprobs,
        lse,
        *(
            lse.new_empty(0, dtype=dtypes.get(name)) if x is None else x
            for name, x in zip(LogProbs._fields[2:], rest, strict=True)
        ),
    )


register_composite("linear_logprobs", _operator)
