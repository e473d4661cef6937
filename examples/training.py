"""What the training programs here share: optimizer and schedule, the dense loss they are judged by, results files."""

import json
import math
import os
import platform
import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from model import Decoder
from torch import Tensor

import cce_ext


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def make_optimizer(model: Decoder, lr: float) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices and none on the norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over a tenth of the steps, then a cosine to a tenth of the peak. Steps count from 1."""
    warmup = max(1, steps // 10)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def optimizer_step(model: Decoder, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Take the step that the gradients ask for, clipped to norm 1, at this learning rate; and drop the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def dense_logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@torch.no_grad()
def window_losses(
    model: Decoder, windows: Tensor, labels: Tensor, batch: int, device: str, dtype: str, softcap: float | None = None
) -> Tensor:
    """The sum of each window's losses [n] (fp64, on `device`), from the float32 logits of a few tokens at a time.

    windows [n, context]; labels [n, context] are the windows, or -100 for a token whose prediction does not count.
    `batch` windows go through the model at once.
    """
    sums = []
    for tokens, wanted in zip(windows.split(batch), labels.split(batch), strict=True):
        with autocast(device, dtype):
            hidden = model(tokens.to(device))[:, :-1].flatten(0, 1)
        targets = wanted[:, 1:].flatten().to(device)
        losses = [
            F.cross_entropy(dense_logits(h.float(), model.classifier.weight, softcap), t, reduction="none")
            for h, t in zip(hidden.split(256), targets.split(256), strict=True)
        ]
        sums.append(torch.cat(losses).double().view(len(tokens), -1).sum(1))
    return torch.cat(sums)


def held_out_loss(
    model: Decoder, windows: Tensor, labels: Tensor, batch: int, device: str, dtype: str, softcap: float | None = None
) -> float:
    """The mean loss, in nats a token, over the labels that count. Takes what window_losses takes."""
    sums = window_losses(model, windows, labels, batch, device, dtype, softcap)
    return sums.sum().item() / int((labels[:, 1:] != -100).sum())


def provenance(device: str, commit: str | None = None) -> dict[str, Any]:
    """Where figures come from. commit: the one to name where there is no git to ask."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "commit": commit or source_commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cce_ext": cce_ext.__version__,
        },
    }


def source_commit() -> str | None:
    """Of the repository that this file is in; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_json(result: dict[str, Any], path: Path) -> None:
    """In one step: a program that is ended here leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
