"""The loss as users call it: a function, a module, and cce::linear_cross_entropy, which is the same as an operator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NamedTuple, ParamSpec, overload

import torch
from torch import Tensor, nn
from torch import distributed as dist

from . import smoothing, soft_targets
from ._ops import ops
from .calls import changeable, loss_of, outputs_of, prepare
from .ops import register_composite
from .options import (
    DENSE,
    ENTROPY,
    MAXIMUM,
    FilterEps,
    LossOptions,
    Options,
    Scan,
    check_label_smoothing,
    check_reduction,
    check_return_stats,
    check_softcap,
    check_tensors,
)
from .reduction import reduce_tokens
from .scan import check_scan, scan_in_training
from .vocab_parallel import VocabParallelOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    Stats = tuple[str, Unpack[tuple[str, ...]]]  # one at least


class LossStats(NamedTuple):
    """What linear_cross_entropy returns with return_stats. What was not asked for is None.

    correct and entropy are of each token, [.., T - shift], and have no gradient. Where the target is ignore_index they
    are False and 0.

    Attributes:
        loss: as without return_stats.
        lse: with return_lse, and as it has it.
        correct: bool: the target is the first column that has the largest logit; the heaviest one with target_weights.
            Its mean over the tokens that count is the accuracy.
        entropy: -sum p log p of the softmax p of the logits, in nats, in the loss's dtype.
    """

    loss: Tensor
    lse: Tensor | None
    correct: Tensor | None
    entropy: Tensor | None


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    return_lse: Literal[False] = ...,
    *,
    target_weights: Tensor | None = ...,
    return_stats: tuple[()] = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    *,
    return_lse: Literal[True],
    target_weights: Tensor | None = ...,
    return_stats: tuple[()] = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    return_lse: bool = ...,
    *,
    return_stats: Stats,
    target_weights: Tensor | None = ...,
    **options: Unpack[LossOptions],
) -> LossStats: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int | None = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    return_lse: bool = ...,
    filter_eps: FilterEps = ...,
    accum_e_fp32: bool = ...,
    accum_c_fp32: bool = ...,
    filter_e_grad: bool = ...,
    filter_c_grad: bool = ...,
    impl: str = ...,
    vocab_parallel_options: VocabParallelOptions | None = ...,
    mean_group: dist.ProcessGroup | None = ...,
    generator: torch.Generator | None = ...,
    label_smoothing: float = ...,
    weight: Tensor | None = ...,
    scan: Scan = ...,
    return_stats: tuple[str, ...] = ...,
    target_weights: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor] | LossStats: ...


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: FilterEps = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: VocabParallelOptions | None = None,
    mean_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    scan: Scan = None,
    return_stats: tuple[str, ...] = (),
    target_weights: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor] | LossStats:
    """Cross-entropy of the linear classifier e @ c.T + bias, without its logits.

    Args:
        e: embeddings [.., D], bf16, fp16, fp32 or fp64.
        c: classifier [V, D], e's dtype and device (under autocast e, c and bias are cast).
        targets: [..] int32 or int64, in [0, V) or ignore_index; with target_weights [.., K].
        bias: [V] or None.
        ignore_index: tokens with this target count for nothing: loss and lse 0, no gradient. None: all tokens count.
            Nothing is looked for then, and the rows of e that count are not copied on a GPU.
        softcap: logits become softcap * tanh(logits / softcap).
        reduction: "mean" over the tokens that count (NaN if there are none), "sum", or "none".
        shift: the loss of position t uses targets[.., t + shift]; in [0, T), T the targets' last dimension. True is 1.
        return_lse: return (loss, lse); both are differentiable.
        filter_eps: the method's own eps. For "cce" the sampling eps in (0, 0.5], "auto" = 2^-8: a token's gradient
            visits at most 1/eps vocab tiles in expectation; smaller is closer to exact and dearer. On CUDA "auto" is
            exact for at most 256 tokens, and D/8, of bf16, whose logits it keeps in 16 bits (not with return_stats).
            For "cce_threshold" the threshold in (0, 1), "auto" = finfo(dtype).eps / 32. None is the exact gradient.
        accum_e_fp32: accepted for compatibility. Gradients are always summed in fp32 (fp64 for fp64 inputs) and rounded
            once.
        accum_c_fp32: likewise.
        filter_e_grad: False computes e's gradient exactly.
        filter_c_grad: False computes c's and bias's gradients exactly.
        impl: "cce" (sampled gradient, unbiased), "cce_exact", "cce_threshold" (the paper's filter; biased),
            "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e" (as "cce"; full_c: c's gradient exact; full_e: e's),
            "cce_kahan_full", "cce_kahan_full_c_full_e" (as "cce_exact"),
            "torch_compile" and "reference" (dense torch, which holds the logits; filter options have no effect).
        vocab_parallel_options: c and bias are this rank's rows of a classifier that is cut over a process group
            (docs/distributed.md); targets are numbered over all of it. None: they are whole, or DTensors that say it.
        mean_group: the process group whose ranks have other tokens (data, context parallel). "mean" then divides by the
            tokens that count on a rank of it in the mean, so that the mean of the ranks' losses and gradients, which
            DDP and FSDP take, is that over all tokens. Ranks that are seeded alike draw independently. For "mean" only.
        generator: of e's device: what a sampled gradient's visits are drawn from. None: PyTorch's own, of which
            torch.manual_seed sets the state. Under torch.compile it breaks the graph.
        label_smoothing: in [0, 1): so much of each token's target is spread over all classes alike, as in
            F.cross_entropy. That part of the gradient is exact. Not with a softcap.
        weight: [V] of any float dtype, what each class counts for, as in F.cross_entropy: "mean" divides by the sum of
            the labels' weights. With vocab_parallel_options those of this rank's rows; beside DTensors a plain one is
            the whole. Needs no gradient and has none.
        scan: "fp8" scans the logits in 8 bits and corrects loss and lse by what the sampled gradient visits, in e's
            dtype: they are unbiased estimates then, with less noise than rounding the logits to 16 bits has
            (docs/gradient.md). For training with a sampled impl on Hopper, in bf16 or fp16; anything else is an error.
            None computes all logits in e's dtype.
        return_stats: of "correct" and "entropy", those that are wanted beside the loss, of the same pass over the
            logits; LossStats says what they are. Not with a scan, whose logits are rounded to 8 bits.
        target_weights: [.., K] of any float dtype, of any sign: what each of a token's K labels counts for. The loss of
            a token is Σ_k target_weights_k (lse - z_k). An entry whose target is ignore_index counts for nothing, and a
            token without others is an ignored one; "mean" divides by the number of tokens that are not, whatever their
            weights. The labels' part of the gradient is exact. With a gradient of their own, lse - z_k, unless the
            vocabulary is cut over ranks. Not with weight and label_smoothing.

    e, c, bias and targets may be DTensors of one mesh (docs/distributed.md says which placements): the loss and lse are
    those of the whole tensors, and DTensors as well.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs), a scalar, or [.., T - shift] for "none". With return_lse also
        lse = log sum exp of the logits, [.., T - shift], same dtype. With return_stats LossStats, a named tuple of all.

    Raises:
        TypeError: a dtype that is not supported or differs from e's.
        ValueError: shapes, devices or options.
        IndexError: on the CPU, a target out of range (on CUDA its loss is NaN, and CCE_DEBUG=1 raises).
        RuntimeError: a CUDA tensor in a build without CUDA kernels.
        NotImplementedError: forward-mode AD and torch.func.grad, but for "reference"; a second derivative.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024); sampling: docs/design.md.
    """
    options = Options(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        return_lse=return_lse,
        filter_eps=filter_eps,
        accum_e_fp32=accum_e_fp32,
        accum_c_fp32=accum_c_fp32,
        filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad,
        impl=impl,
        vocab_parallel_options=vocab_parallel_options,
        mean_group=mean_group,
        generator=generator,
        label_smoothing=label_smoothing,
        weight=weight,
        scan=scan,
        return_stats=return_stats,
    )
    found = _computed(e, c, targets, bias, options, target_weights)
    if return_stats:
        return found
    loss, lse, *_ = found
    return loss if lse is None else (loss, lse)


_P = ParamSpec("_P")


def _takes(
    parameters_of: Callable[_P, object],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, _P], None]]:
    """Gives an __init__ that hands its arguments on to another callable that one's signature."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, _P], None]:
        of_self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(parameters_of).parameters.values()
        init.__signature__ = inspect.Signature([of_self, *parameters])  # type: ignore[attr-defined]
        return init

    return decorate


class LinearCrossEntropy(nn.Module):
    """linear_cross_entropy with its options bound. Holds no parameters: e, c and bias come with the call.

    Attributes:
        options: all of them by name, but weight.
        weight: a buffer, as nn.CrossEntropyLoss has it, or None.
    """

    weight: Tensor | None

    @_takes(Options)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Options as in linear_cross_entropy, in its order from ignore_index on.

        Raises:
            ValueError: options that no call could take.
            TypeError: an option of a wrong type.
        """
        super().__init__()
        options = Options(*args, **kwargs)
        options.check()
        self.options: dict[str, Any] = dict(vars(options))
        self.register_buffer("weight", self.options.pop("weight"))

    def forward(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        target_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | LossStats:
        """e [.., D], c [V, D], targets [..], bias [V]: returns and raises as linear_cross_entropy.

        With target_weights, they and targets are [.., K]. Where no gradient is computed scan is left out: a loss that
        is not trained by has its logits in e's dtype.
        """
        options = {**self.options, "weight": self.weight, "target_weights": target_weights}
        out: Tensor | tuple[Tensor, Tensor] | LossStats = module_loss(e, c, targets, bias, **options)
        return out

    def extra_repr(self) -> str:
        weight = "" if self.weight is None else f", weight=[{len(self.weight)}]"
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items()) + weight


def module_loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scan: Scan = None,
    **options: Any,
) -> Any:
    """linear_cross_entropy of what evaluates by the same call as it trains by: scan is for the latter alone."""
    return linear_cross_entropy(e, c, targets, bias, scan=scan_in_training(scan, e, c, bias), **options)


def _computed(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    target_weights: Tensor | None = None,
) -> LossStats:
    softcap, s = options.softcap, options.label_smoothing
    check_reduction(options.reduction, options.mean_group)
    check_softcap(softcap)
    check_label_smoothing(s, softcap)
    check_return_stats(options.return_stats)
    check_scan(options)
    check_tensors(e, c, targets, bias)
    soft_targets.check(e, targets, target_weights, options)
    shared_numbers = functools.partial(smoothing.shared_numbers, s=s)
    stats = sum(bit for name, bit in (("correct", MAXIMUM), ("entropy", ENTROPY)) if name in options.return_stats)
    more: Any = {"target_weights": target_weights, "shared_numbers": shared_numbers, "stats": stats}
    call = prepare(e, c, targets, bias, options, **more)
    plain = None if stats else loss_of(call, options)
    if plain is not None:
        loss, lse = plain
        return LossStats(loss, call.of_positions(changeable(lse)) if options.return_lse else None, None, None)
    weight, labels, ignore_index = call.weight, call.labels, options.ignore_index
    counts: Any = call.counts(ignore_index) if weight is not None or s else None
    logits = None
    if s:
        dense = options.impl in DENSE
        rows, classes, logits = smoothing.with_weighted_logits(call.e, call.c, call.bias, weight, counts, dense)
        call = call._replace(e=rows, c=classes)
    of_operator, lse, rows, argmax, z = outputs_of(call, options, softcap=softcap, stats=stats)
    nll = of_operator
    correct = (argmax == labels) & call.counts(ignore_index) if stats & MAXIMUM else None
    entropy = rows[0].detach() if stats & ENTROPY else None
    if weight is not None or s:
        nll, counts = smoothing.smoothed(nll, lse, logits, labels, counts, weight, s, len(call.c), call.shard)
    if call.soft is not None:
        nll = call.soft.loss(nll, lse, z, len(call.c), call.shard)

    if options.reduction == "none" and nll is of_operator:
        nll = changeable(nll)
    if options.reduction != "mean":
        counts = None
    elif counts is None:
        counts = call.counts(ignore_index)
    # A sum over plain tensors asks for no shape, and what shift leaves without a label adds 0 to it, where such is
    # ignored.
    has_others = bool(call.shift) and ignore_index is None
    if options.reduction == "none" or call.from_local is not None or has_others:
        nll, counts = call.of_positions(nll), None if counts is None else call.of_positions(counts)
    loss = reduce_tokens(nll, counts, options.reduction, options.mean_group)
    of_tokens = (changeable(lse) if options.return_lse else None, correct, entropy)
    return LossStats(loss, *(None if x is None else call.of_positions(x) for x in of_tokens))


_OPERATOR_OPTIONS = [x.name for x in ops.linear_cross_entropy.default._schema.arguments][4:]


def _operator(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor:
    """cce::linear_cross_entropy. PyTorch leaves out the last arguments that have their schema's defaults.

    A schema's argument has one type, so that here -1 stands for filter_eps "auto".
    """
    given = dict(zip(_OPERATOR_OPTIONS, args, strict=False))
    if given.get("filter_eps") == -1.0:
        given["filter_eps"] = "auto"
    return _computed(e, c, targets, bias, Options(**given)).loss


register_composite("linear_cross_entropy", _operator)
