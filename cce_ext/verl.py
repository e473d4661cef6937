"""verl: the function that its models call for log-probabilities and entropy, under verl's own name for it.

verl.utils.kernel.linear_cross_entropy.linear_cross_entropy as of verl 0.6 to 0.9, whose trainers call it where
use_fused_kernels is on and the backend is "triton", or always with Megatron. Nothing of verl is imported here.
"""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist

from .logprobs import linear_logprobs
from .options import FilterEps
from .vocab_parallel import VocabParallelOptions

__all__ = ["linear_cross_entropy"]

_REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
    *,
    impl: str = "cce",
    filter_eps: FilterEps = "auto",
) -> tuple[Tensor, Tensor]:
    """verl's linear_cross_entropy by linear_logprobs: log-probabilities of labels, and the entropy.

    Args:
        hidden: [.., D], N tokens in all, in the order of labels: Megatron's [T, 1, D] goes with labels [1, T].
        weight: [V, D], hidden's dtype (autocast casts both). With a group, rows [rank * V, (rank + 1) * V) of the
            whole on each of its ranks, as Megatron cuts them.
        labels: N int32 or int64, of any shape, numbered over the whole vocabulary. -100 is ignored, unlike in verl:
            log-probability and entropy are 0, and so are their gradients.
        temperature: a positive number, or a tensor of one number or of labels' shape; None is 1.
        reduction: of the log-probabilities: "none", "sum" or "mean" (over all N); None is "none".
        dist_process_group: the tensor-parallel ranks, or None. A rank's gradient of hidden is its own rows' part, as
            from verl: Megatron sums them, where sequence parallelism gathers hidden.
        impl: as in linear_logprobs; not of verl's.
        filter_eps: likewise.

    Returns:
        log-probabilities, [N] or a scalar, and the entropy [N]; both differentiable, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: a reduction that is none, or numbers of tokens that differ; and all that linear_logprobs raises.

    Source: verl/utils/kernel/linear_cross_entropy.py of verl.
    """
    reduction = "none" if reduction is None else reduction.lower()
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) != labels.numel():
        raise ValueError(
            f"labels: expected {len(rows)} of them for hidden of shape {list(hidden.shape)}, got {list(labels.shape)}"
        )
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)
    shard = None
    if dist_process_group is not None and dist.get_world_size(dist_process_group) > 1:
        start = dist.get_rank(dist_process_group) * len(weight)
        shard = VocabParallelOptions(start, start + len(weight), dist_process_group, reduce_e_grad=False)
    found = linear_logprobs(
        *(rows, weight, labels.reshape(-1)),
        temperature=1.0 if temperature is None else temperature,
        impl=impl,
        filter_eps=filter_eps,
        vocab_parallel_options=shard,
    )
    assert found.entropy is not None  # it is what linear_logprobs gives unless asked not to
    logprobs = found.logprobs
    if reduction != "none":
        logprobs = logprobs.sum() if reduction == "sum" else logprobs.mean()
    return logprobs, found.entropy
