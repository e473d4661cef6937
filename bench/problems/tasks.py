"""What a task needs of a problem beside e and c: weights of log-probabilities, or a teacher's soft targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .inputs import IGNORE_INDEX, Problem

# By name: the loss; log-probabilities and entropies of a policy; soft targets.
TASKS = ("loss", "logprobs", "distill")
# Of policy_weights. Training has 0.001 to 0.01, of which a gradient's error would not see the entropy's part.
ENTROPY_COEFFICIENT = 0.1
# Of soft_targets: labels a token, and the standard deviation of what the teacher's logits differ by.
LABELS = 64
TEACHER_NOISE = 0.5


def of_task(task: str, p: Problem, seed: int) -> Problem:
    """p with what the task has besides. Tokens that p ignores count for nothing."""
    if task == "logprobs":
        return replace(p, weights=policy_weights(p, seed))
    return soft_targets(p, seed) if task == "distill" else p


def policy_weights(p: Problem, seed: int) -> Tensor:
    """[N, 2], fp32: what log-probabilities count for in a policy's loss, advantages N(0, 1), and what entropies do."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.full((len(p.e), 2), ENTROPY_COEFFICIENT)
    weights[:, 0] = torch.randn(len(p.e), generator=generator)
    return weights.to(p.e.device) * p.live()[:, None]


def soft_targets(p: Problem, seed: int, block: int = 512) -> Problem:
    """p with the LABELS most probable columns of a teacher as targets [N, K], and its probabilities of them as weights.

    The teacher's logits are p's and Gaussian noise; its probabilities add up to 1 over the columns of a token.
    """
    generator = torch.Generator(p.e.device).manual_seed(seed)
    count = min(LABELS, len(p.c))
    targets = torch.empty(len(p.e), count, dtype=torch.int64, device=p.e.device)
    weights = torch.empty(len(p.e), count, device=p.e.device)
    for i in range(0, len(p.e), block):
        z = (p.e[i : i + block] @ p.c.T).float()
        z += TEACHER_NOISE * torch.randn(z.shape, generator=generator, device=z.device)
        top = z.topk(count, dim=1)
        targets[i : i + block], weights[i : i + block] = top.indices, top.values.softmax(1)
    return replace(p, targets=targets.masked_fill(~p.live()[:, None], IGNORE_INDEX), weights=weights)


def without_entropy(p: Problem) -> Problem:
    """The problem of the log-probabilities alone."""
    assert p.weights is not None
    return replace(p, weights=p.weights * p.weights.new_tensor([1.0, 0.0]))
