"""The loss as users call it: a function, a module, and cce::linear_cross_entropy, which is the same as an operator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, overload

import torch
from torch import Tensor, nn
from torch import distributed as dist

from . import reference, smoothing, soft_targets, vocab_parallel
from ._ops import ops
from .autograd import lce_forward
from .ops import autocast_inputs, register_composite
from .options import (
    DENSE,
    FilterEps,
    LossOptions,
    Options,
    check_generator,
    check_inputs,
    check_label_smoothing,
    check_reduction,
    check_shift,
    check_softcap,
    check_target_range,
    check_tensors,
    check_transforms,
    check_weight,
    is_a,
    may_look_at,
    may_need_seed,
    resolve_method,
    unwrapped,
)
from .pairs import with_pair_logits
from .reduction import is_dtensor, reduce_tokens
from .vocab_parallel import VocabParallelOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# One int64 holds all the randomness of a call; 2^63 - 1 is the widest range torch.randint takes.
_SEEDS = 2**63 - 1


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    return_lse: Literal[False] = ...,
    *,
    target_weights: Tensor | None = ...,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    shift: bool | int = ...,
    *,
    return_lse: Literal[True],
    target_weights: Tensor | None = ...,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
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
    target_weights: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
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
    target_weights: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the linear classifier e @ c.T + bias, without its logits.

    Args:
        e: embeddings [.., D], bf16, fp16, fp32 or fp64.
        c: classifier [V, D], e's dtype and device (under autocast e, c and bias are cast).
        targets: [..] int32 or int64, in [0, V) or ignore_index; with target_weights [.., K].
        bias: [V] or None.
        ignore_index: tokens with this target count for nothing: loss and lse 0, no gradient.
        softcap: logits become softcap * tanh(logits / softcap).
        reduction: "mean" over the tokens that count (NaN if there are none), "sum", or "none".
        shift: the loss of position t uses targets[.., t + shift]; in [0, T), T the targets' last dimension. True is 1.
        return_lse: return (loss, lse); both are differentiable.
        filter_eps: the method's own eps. For "cce" the sampling eps in (0, 0.5], "auto" = 2^-8: a token's gradient
            visits at most 1/eps vocab tiles in expectation; smaller is closer to exact and dearer. For "cce_threshold"
            the threshold in (0, 1), "auto" = finfo(dtype).eps / 32. None is the exact gradient.
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
        target_weights: [.., K] of any float dtype, of any sign: what each of a token's K labels counts for. The loss of
            a token is Σ_k target_weights_k (lse - z_k). An entry whose target is ignore_index counts for nothing, and a
            token without others is an ignored one; "mean" divides by the number of tokens that are not, whatever their
            weights. The labels' part of the gradient is exact. With a gradient of their own, lse - z_k, unless the
            vocabulary is cut over ranks. Not with weight and label_smoothing.

    e, c, bias and targets may be DTensors of one mesh (docs/distributed.md says which placements): the loss and lse are
    those of the whole tensors, and DTensors as well.

    Returns:
        The loss, in fp32 (fp64 for fp64 inputs), a scalar, or [.., T - shift] for "none". With return_lse also
        lse = log sum exp of the logits, [.., T - shift], same dtype.

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
    )
    loss, lse = _loss_and_lse(e, c, targets, bias, options, target_weights)
    return (loss, lse) if return_lse else loss


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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """e [.., D], c [V, D], targets [..], bias [V]: returns and raises as linear_cross_entropy.

        With target_weights, they and targets are [.., K].
        """
        options = {**self.options, "weight": self.weight, "target_weights": target_weights}
        out: Tensor | tuple[Tensor, Tensor] = linear_cross_entropy(e, c, targets, bias, **options)
        return out

    def extra_repr(self) -> str:
        weight = "" if self.weight is None else f", weight=[{len(self.weight)}]"
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items()) + weight


def _loss_and_lse(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    target_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The second is the lse in its shape only with return_lse."""
    ignore_index, softcap, impl = options.ignore_index, options.softcap, options.impl
    weight, smoothes = options.weight, bool(options.label_smoothing)
    check_tensors(e, c, targets, bias)
    if not is_a(ignore_index, "__index__"):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    soft_targets.check(e, targets, target_weights, options)
    # localize's from_local makes DTensors of what each rank has of the results.
    shard, from_local, seed_salt = None, None, 0
    if options.vocab_parallel_options is not None:
        shard = vocab_parallel.shard_of(options.vocab_parallel_options)
        seed_salt = shard.start
    if any(is_dtensor(x) for x in (e, c, targets, bias)):
        if shard is not None:
            raise ValueError("vocab_parallel_options: expected None where e, c or targets are DTensors, which say it")
        from .distributed import localize

        local = localize(e, c, targets, bias, weight, int(options.shift), target_weights)
        e, c, targets, bias, shard, from_local, seed_salt, weight, target_weights = local

    soft = None
    if target_weights is not None:
        soft = soft_targets.SoftTargets.of(targets, target_weights, ignore_index)
        targets = soft.labels
    e, c, bias = autocast_inputs(e, c, bias)
    check_inputs(e, c, targets, bias)
    check_reduction(options.reduction, options.mean_group)
    check_generator(options.generator, e.device)
    check_softcap(softcap)
    check_label_smoothing(options.label_smoothing, softcap)
    check_weight(weight, c)
    shift = check_shift(options.shift, targets)
    pairs = None
    if soft is not None:
        soft = soft.flat(shift)
        pairs = soft.pairs(len(c), shard)
    if shard is not None:
        more = smoothing.shared_numbers(targets.numel(), weight, options.label_smoothing)
        more += 0 if soft is None else soft.shared_numbers()
        vocab_parallel.check_rows(shard, c, targets, more)
    if shift:
        # e is not cut: the last positions have no label left, which is what ignore_index says.
        targets = nn.functional.pad(targets[..., shift:], (0, shift), value=ignore_index)
    shape = targets.shape
    rows, labels = (e, targets) if targets.dim() == 1 else (e.reshape(-1, e.shape[-1]), targets.reshape(-1))

    # The operators of the CPU look by themselves; those of CUDA could not raise an IndexError.
    looks = shard is None and (impl in DENSE or soft is not None or labels.device.type != "cpu")
    if looks and not torch.compiler.is_compiling() and may_look_at(labels):
        check_target_range(unwrapped(labels if soft is None else soft.targets).flatten(), len(c), ignore_index)
    may_train = any(x is not None and unwrapped(x).requires_grad for x in (e, c, bias))
    counts: Any = labels != ignore_index if weight is not None or smoothes else None
    logits = z = None
    if shard is not None:
        rows = vocab_parallel.shared(shard, rows)
    if smoothes:
        rows, c, logits = smoothing.with_weighted_logits(rows, c, bias, weight, counts, impl in DENSE)
    if impl in DENSE:
        dense = reference.forward if impl == "reference" else _compiled_reference()
        if pairs is not None:
            dense = functools.partial(dense, pairs=pairs)
        if shard is not None:
            dense = functools.partial(vocab_parallel.dense_forward, shard, dense)
        nll, lse, *z_of_pairs = dense(rows, c, bias, labels, ignore_index, softcap)
        z = z_of_pairs[0] if z_of_pairs else None
    else:
        check_transforms()
        if pairs is not None:
            rows, c, bias, z = with_pair_logits(rows, c, bias, pairs, softcap)
        method = resolve_method(options, e.dtype)
        trains = may_train and torch.is_grad_enabled()
        seed = None
        if method.draws and may_need_seed(may_train):
            # Without a gradient too: reentrant checkpointing runs the forward so first, then again from the generator's
            # state of before. It is this draw that leaves the next step another state.
            # Ranks that are seeded alike, as tensor-parallel ones are, must not draw the same visits of their shards,
            # nor those of a mean_group the same of their tokens.
            if options.mean_group is not None:
                seed_salt ^= dist.get_rank(options.mean_group) << 32
            seed = torch.randint(_SEEDS, (1,), generator=options.generator, device=e.device)
            if seed_salt:
                seed = seed ^ seed_salt
        forward: Callable[..., Any] = lce_forward
        if shard is not None:
            forward = functools.partial(vocab_parallel.lce_forward, shard)
        nll, lse, *_ = forward(
            rows,
            c,
            bias,
            labels,
            seed,
            ignore_index=ignore_index,
            softcap=softcap,
            need_map=trains and method.needs_map,
            **method.keywords(),
        )
    if weight is not None or smoothes:
        given = (weight, options.label_smoothing, len(c), shard)
        nll, counts = smoothing.smoothed(nll, lse, logits, labels, counts, *given)
    if soft is not None:
        nll = soft.loss(nll, lse, z, len(c), shard)

    def of_positions(x: Tensor) -> Tensor:
        """[.., T - shift], on all ranks of a DTensor's, of x [N]."""
        x = x.reshape(shape)
        if shift:
            x = x[..., :-shift]
        return x if from_local is None else from_local(x)

    if options.return_lse:
        lse = of_positions(lse)
    if options.reduction != "mean":
        counts = None
    elif counts is None:
        counts = labels != ignore_index
    # A sum over plain tensors asks for no shape, and what shift leaves without a label adds 0 to it.
    if options.reduction == "none" or from_local is not None:
        nll, counts = of_positions(nll), None if counts is None else of_positions(counts)
    return reduce_tokens(nll, counts, options.reduction, options.mean_group), lse


@functools.cache
def _compiled_reference() -> Callable[..., tuple[Tensor, ...]]:
    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(reference.forward, dynamic=None)
    return compiled


_OPERATOR_OPTIONS = [x.name for x in ops.linear_cross_entropy.default._schema.arguments][4:]


def _operator(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, *args: Any) -> Tensor:
    """cce::linear_cross_entropy. PyTorch leaves out the last arguments that have their schema's defaults.

    A schema's argument has one type, so that here -1 stands for filter_eps "auto".
    """
    given = dict(zip(_OPERATOR_OPTIONS, args, strict=False))
    if given.get("filter_eps") == -1.0:
        given["filter_eps"] = "auto"
    return _loss_and_lse(e, c, targets, bias, Options(**given))[0]


register_composite(_operator)
