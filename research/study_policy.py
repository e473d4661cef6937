"""The phase `policy`: a policy gradient on a reward that is counted, with every gradient of the log-probabilities.

A step samples `group` completions of each of `prompts` prompts and takes one step on -(A log p + entropy H), the mean
over the completions' tokens: A is a completion's reward less its group's mean, over the group's standard deviation
(GRPO's advantage; with one step a batch its ratio is 1). Reward, sampler and prompts are the same for every
implementation, and the sampler's random numbers those of the seed; so runs of one seed differ by the gradient, and by
what follows of it.

The reward is the number of different tokens of a class in a completion, over the completion's length. The class is
large, a quarter of the vocabulary, and a token counts once: to win, the policy must move probability to many tokens,
rare ones too, which is where a sampled gradient is noisy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from study_meter import Meter
from text import batches
from torch import Tensor
from tqdm import tqdm
from training import autocast, dense_logits, learning_rate, make_optimizer, optimizer_step

from cce_ext import linear_logprobs

if TYPE_CHECKING:
    from model import Decoder
    from study_run import Study

POLICY = "policy"
POLICY_SETTINGS: dict[str, int | float] = {
    "policy.prompts": 16,
    "policy.group": 8,
    "policy.prompt": 32,  # tokens
    "policy.completion": 32,  # tokens
    "policy.steps": 100,
    "policy.lr": 1e-4,
    "policy.entropy": 1e-3,  # of the bonus
    "policy.eval_batches": 8,  # of held-out prompts, at the end
}
CLASS = 4  # the tokens whose id is a multiple of it
WARMUP_STEPS = 5  # not counted in tokens a second
EVAL_SEED = 10**6  # of the held-out prompts' order and of their completions: the same in every run

# Log-probabilities and entropies [n] of hidden [n, width], weight [vocab, width], targets [n].
LogProbs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def dense_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = dense_logits(hidden, weight, None).log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def make_logprobs(impl: str | None, options: dict[str, Any]) -> LogProbs:
    """`impl` of linear_logprobs with these options; None: dense torch."""
    if impl is None:
        return dense_logprobs

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logprobs(hidden, weight, targets, outputs=("entropy",), impl=impl, **options)
        assert out.entropy is not None
        return out.logprobs, out.entropy

    return function


def rewards(completions: Tensor) -> Tensor:
    """[n] of completions [n, length]: the share of different tokens of the class."""
    ordered = completions.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (first & (ordered % CLASS == 0)).sum(1) / completions.shape[1]


def advantages(reward: Tensor, group: int) -> Tensor:
    """[n] of rewards [n], whose groups follow one another; 0 in a group of equal rewards."""
    grouped = reward.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


@torch.no_grad()
def complete(model: Decoder, prompts: Tensor, length: int, generator: torch.Generator, dtype: str) -> Tensor:
    """Prompts [n, p] with `length` tokens more, sampled from dense float32 logits: [n, p + length]."""
    tokens, weight = prompts, model.classifier.weight.float()
    with autocast(prompts.device.type, dtype):
        for _ in range(length):
            hidden = model(tokens)[:, -1]
            with torch.autocast(prompts.device.type, enabled=False):
                p = dense_logits(hidden.float(), weight, None).softmax(1)
                tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
    return tokens


class Rollouts:
    """Batches of completions: the seed gives the prompts and the sampler's random numbers."""

    def __init__(self, study: Study, held_out: bool, seed: int) -> None:
        s = study.settings
        text = study.data.held_out if held_out else study.data.finetune
        self.prompts: Iterator[Tensor] = batches(text, s["policy.prompts"], s["policy.prompt"], seed)
        self.generator = torch.Generator(study.device).manual_seed(seed)
        self.group, self.length, self.study = s["policy.group"], s["policy.completion"], study

    def draw(self, model: Decoder) -> tuple[Tensor, Tensor]:
        """Tokens [prompts × group, prompt + completion] and the completions' rewards."""
        prompts = self.study.to_device(next(self.prompts)).repeat_interleave(self.group, 0)
        tokens = complete(model, prompts, self.length, self.generator, self.study.dtype)
        return tokens, rewards(tokens[:, -self.length :])


def train_policy(study: Study, logprobs_of: LogProbs, seed: int, title: str) -> dict[str, Any]:
    """One run from the model of the checkpoint; gives its curves and figures."""
    started = time.perf_counter()
    s = study.settings
    model = study.make_model(POLICY, seed)
    study.free_memory()
    length, steps = s["policy.completion"], s["policy.steps"]
    rollouts = Rollouts(study, held_out=False, seed=seed)
    optimizer = make_optimizer(model, s["policy.lr"])
    torch.manual_seed(seed)  # of the gradient's sampling

    curves: list[Tensor] = []  # reward and entropy of each step
    meter = Meter(study.device)
    meter.start()
    for step in tqdm(range(1, steps + 1), desc=title, unit="step"):
        tokens, reward = rollouts.draw(model)
        advantage = advantages(reward, rollouts.group).repeat_interleave(length)
        targets = tokens[:, -length:].flatten()
        with autocast(study.device, study.dtype):
            hidden = model(tokens[:, :-1])[:, -length:].flatten(0, 1)
            logprobs, entropy = logprobs_of(hidden, model.classifier.weight, targets)
            loss = -(advantage * logprobs + s["policy.entropy"] * entropy).mean()
        loss.backward()
        optimizer_step(model, optimizer, learning_rate(step, steps, s["policy.lr"]))
        curves.append(torch.stack([reward.mean(), entropy.detach().mean()]))
        del hidden, logprobs, entropy, loss
        meter.pending += 1
        if step == WARMUP_STEPS:
            meter.stop(counts=False)
            meter.start()
    meter.stop(counts=steps > WARMUP_STEPS)
    reward_curve, entropy_curve = torch.stack(curves).T.tolist()
    if not all(map(torch.isfinite, curves[-1])):
        raise ValueError(f"the entropy is {entropy_curve[-1]} at step {steps}")
    judged = Rollouts(study, held_out=True, seed=EVAL_SEED)
    final = torch.cat([judged.draw(model)[1] for _ in range(s["policy.eval_batches"])])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "reward": [round(x, 5) for x in reward_curve],
        "entropy": [round(x, 5) for x in entropy_curve],
        "final_reward": final.mean().item(),
        "tokens_per_second": targets.numel() * meter.steps / meter.seconds if meter.steps else None,
        "peak_memory_bytes": meter.peak or None,
        "seconds": time.perf_counter() - started,
    }
