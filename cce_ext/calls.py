"""What linear_cross_entropy and linear_logprobs do alike, before and after what is computed of each token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from . import reference, vocab_parallel
from .autograd import lce_forward, lce_loss
from .few_tokens import keeps_logits
from .labels import check_target_range, may_look_at, no_label, that_count
from .ops import autocast_inputs
from .options import (
    DENSE,
    EXACT,
    NAMES,
    Method,
    Names,
    Options,
    check_generator,
    check_ignore_index,
    check_inputs,
    check_shift,
    check_softcap,
    check_transforms,
    check_weight,
    may_need_seed,
    resolve_method,
    unwrapped,
)
from .pairs import with_pair_logits
from .reduction import is_dtensor
from .scan import check_scan_call
from .soft_targets import SoftTargets
from .vocab_parallel import VocabShard

# One int64 holds all the randomness of a call; 2^63 - 1 is the widest range torch.randint takes.
_SEEDS = 2**63 - 1


class Call(NamedTuple):
    """This rank's part of a call, its tokens in one dimension.

    shape: that of the targets, after the shift. from_local: makes a DTensor of what this rank has of a result, or None.
    seed_salt: what the rank's seed is xored with. weight: [V], temperature: [N] or one number, or None. soft: several
    labels a token, or None: labels are the heaviest, and pairs [N, K] those whose logits are wanted beside it, or None.
    """

    e: Tensor
    c: Tensor
    bias: Tensor | None
    labels: Tensor
    weight: Tensor | None
    temperature: Tensor | None
    soft: SoftTargets | None
    pairs: Tensor | None
    shape: torch.Size
    shift: int
    shard: VocabShard | None
    from_local: Callable[[Tensor], Any] | None
    seed_salt: int
    may_train: bool

    def counts(self, ignore_index: int | None) -> Tensor:
        """Which tokens do [N]: bool."""
        if ignore_index is not None or not self.shift:
            return that_count(self.labels, ignore_index)
        have_a_label = self.labels.new_ones(self.shape, dtype=torch.bool)
        have_a_label[..., -self.shift :] = False
        return have_a_label.reshape(-1)

    def of_positions(self, x: Tensor) -> Tensor:
        """[.., T - shift], on all ranks of a DTensor's, of x [N]."""
        x = x.reshape(self.shape)
        if self.shift:
            x = x[..., : -self.shift]
        return x if self.from_local is None else self.from_local(x)


def prepare(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    *,
    temperature: Tensor | None = None,
    target_weights: Tensor | None = None,
    stats: int = 0,
    shared_numbers: Callable[[int, Tensor | None], int] = lambda n, weight: 0,
    names: Names = NAMES,
) -> Call:
    """Localizes, casts, checks and shifts what check_tensors has seen.

    temperature: of the targets' shape, or one number.
    target_weights: what soft_targets.check has seen, of targets [.., K]. stats: of the call's lce_forward.
    shared_numbers: of n tokens and class weights, those of its sum_over_ranks.
    """
    ignore_index, weight = options.ignore_index, options.weight
    check_ignore_index(ignore_index, targets)
    # localize's from_local makes DTensors of what each rank has of the results.
    shard, from_local, seed_salt = None, None, 0
    if options.vocab_parallel_options is not None:
        shard = vocab_parallel.shard_of(options.vocab_parallel_options)
        seed_salt = shard.start
    if any(is_dtensor(x) for x in (e, c, targets, bias)):
        if shard is not None:
            raise ValueError(
                f"vocab_parallel_options: expected None where {names.e}, {names.c} or targets are DTensors, which "
                "say it"
            )
        from .distributed import localize

        local = localize(e, c, targets, bias, weight, check_shift(options.shift), temperature, target_weights, names)
        e, c, targets, bias, shard, from_local, seed_salt, weight, temperature, target_weights = local

    soft, pairs = None, None
    if target_weights is not None:
        soft = SoftTargets.of(targets, target_weights, ignore_index)
        targets = soft.labels
    e, c, bias = autocast_inputs(e, c, bias)
    check_inputs(e, c, targets, bias, names)
    check_generator(options.generator, e.device)
    check_softcap(options.softcap)
    check_weight(weight, c)
    shift = check_shift(options.shift, targets)
    if soft is not None:
        soft = soft.flat(shift)
        pairs = soft.pairs(len(c), shard)
    if shard is not None:
        more = shared_numbers(targets.numel(), weight) + (0 if soft is None else soft.shared_numbers())
        vocab_parallel.check_rows(shard, c, targets, more, stats, names)
    if shift:
        # e is not cut: the last positions have no label left, which is what ignore_index says, and counts without.
        targets = nn.functional.pad(targets[..., shift:], (0, shift), value=no_label(ignore_index))
        if temperature is not None and temperature.numel() > 1:
            temperature = nn.functional.pad(temperature[..., shift:], (0, shift), value=1.0)
    shape = targets.shape
    rows, labels = (e, targets) if targets.dim() == 1 else (e.reshape(-1, e.shape[-1]), targets.reshape(-1))

    # The operators of the CPU look by themselves; those of CUDA could not raise an IndexError.
    looks = shard is None and (options.impl in DENSE or soft is not None or labels.device.type != "cpu")
    if looks and not torch.compiler.is_compiling() and may_look_at(labels):
        check_target_range(unwrapped(labels if soft is None else soft.targets).flatten(), len(c), ignore_index)
    may_train = any(x is not None and unwrapped(x).requires_grad for x in (e, c, bias))
    if shard is not None:
        rows = vocab_parallel.shared(shard, rows)
    temperature = None if temperature is None else temperature.reshape(-1)
    of_tokens = (rows, c, bias, labels, weight, temperature, soft, pairs)
    return Call(*of_tokens, shape, shift, shard, from_local, seed_salt, may_train)


def changeable(x: Tensor) -> Tensor:
    """x for users, who may change it in place: the operators keep theirs for the gradient."""
    if not x.requires_grad:
        return x
    # Inductor drops a copy: what then changed x outside of the graph would make its gradient wrong without a word.
    return x - 0.0 if torch.compiler.is_compiling() else x.clone()


def outputs_of(
    call: Call,
    options: Options,
    *,
    softcap: float | None,
    scale: Tensor | None = None,
    stats: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """nll, lse [N], stats and argmax as lce_forward has them, of the whole vocabulary, and the pairs' logits [N, K]."""
    ignore_index, shard = options.ignore_index, call.shard
    e, c, bias, z = call.e, call.c, call.bias, None
    if options.impl in DENSE:
        dense: Callable[..., Any] = reference.with_statistics
        if options.impl != "reference":
            dense = _compiled_reference()
        if shard is not None:
            dense = functools.partial(vocab_parallel.dense_forward, shard, dense)
        nll, lse, rows, argmax, z = dense(e, c, bias, call.labels, ignore_index, softcap, scale, stats, call.pairs)
        return nll, lse, rows, argmax, z
    check_transforms()
    if call.pairs is not None:
        e, c, bias, z = with_pair_logits(e, c, bias, call.pairs, softcap)
    seed, keywords = _of_kernel(call, options, softcap, scored=bool(stats) or scale is not None)
    if stats:
        keywords["stats"] = stats
    if batch_invariant:
        keywords["batch_invariant"] = True
    if scale is not None:
        keywords["scale"] = scale
    forward: Callable[..., Any] = lce_forward
    if shard is not None:
        forward = functools.partial(vocab_parallel.lce_forward, shard)
    out = forward(e, c, bias, call.labels, seed, **keywords)
    return out[0], out[1], out[-2], out[-1], z


def loss_of(call: Call, options: Options) -> tuple[Tensor, Tensor] | None:
    """The sum or mean of a call's nll by options.reduction and its lse [N], of the operator and a step of autograd.

    None where they take more: of what options and inputs ask besides, or of ranks that have parts.
    """
    more = (options.mean_group, call.weight, call.soft, call.shard, call.from_local)
    if (
        options.reduction == "none"
        or options.ignore_index is None
        or options.impl in DENSE
        or options.label_smoothing
        or any(x is not None for x in more)
    ):
        return None
    check_transforms()
    seed, keywords = _of_kernel(call, options, options.softcap)
    return lce_loss(call.e, call.c, call.bias, call.labels, seed, options.reduction == "mean", **keywords)


def _of_kernel(
    call: Call, options: Options, softcap: float | None, scored: bool = False
) -> tuple[Tensor | None, dict[str, Any]]:
    """The seed and the keywords of a call's lce_forward. scored: statistics or scales of its logits are wanted."""
    method, scan = resolve_method(options, call.e.dtype), options.scan
    trains = call.may_train and torch.is_grad_enabled()
    # Whatever will be differentiated: a reentrant checkpoint's first pass does not show it, and is to draw alike.
    few = keeps_logits(call.e, method, options, scored)
    if few:
        method = EXACT
    keywords = {
        "ignore_index": options.ignore_index,
        "softcap": softcap,
        "method": method.name,
        "eps": method.eps,
        "filter_e": method.filter_e,
        "filter_c": method.filter_c,
        # The scan draws by the map itself.
        "need_map": scan is not None or (trains and method.needs_map),
    }
    if few and trains:
        keywords["keep_logits"] = True
    if scan is not None:
        check_scan_call(scan, call.e, call.may_train)
        keywords["scan"] = scan
    return _seed(call, method, options), keywords


def _seed(call: Call, method: Method, options: Options) -> Tensor | None:
    """Of a sampled gradient that may be asked for."""
    if not (method.draws and may_need_seed(call.may_train)):
        return None
    # Without a gradient too: reentrant checkpointing runs the forward so first, then again from the generator's
    # state of before. It is this draw that leaves the next step another state.
    # Ranks that are seeded alike, as tensor-parallel ones are, must not draw the same visits of their shards,
    # nor those of a mean_group the same of their tokens.
    salt = call.seed_salt
    if options.mean_group is not None:
        salt ^= dist.get_rank(options.mean_group) << 32
    seed = torch.randint(_SEEDS, (1,), generator=options.generator, device=call.e.device)
    return seed ^ salt if salt else seed


@functools.cache
def _compiled_reference() -> Callable[..., Any]:
    return torch.compile(reference.with_statistics, dynamic=None)
