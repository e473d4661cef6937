"""A trained model's own problem for the benchmark: what the loss is given on held-out text, in a file.

`python -m bench --data saved:FILE` reads it (bench/problems/inputs.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model import Decoder
from study_data import HeldOut
from torch import Tensor
from training import autocast


@dataclass(frozen=True)
class ProblemFile:
    """Where to save how many tokens' problem, and of which run's model: (phase, impl, seed)."""

    file: Path
    tokens: int
    run: tuple[str, str, int]

    def held_out_tokens(self, context: int) -> int:
        """Tokens of as many windows as it takes: the last one of a window predicts nothing."""
        return -(-self.tokens // (context - 1)) * context

    def save(
        self, model: Decoder, part: HeldOut, batch: int, device: str, dtype: str, origin: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Write e, c and targets, and origin, which says where they are from. Gives the tensors."""
        problem = {
            name: tensor[: self.tokens].clone() if name != "c" else tensor  # a slice alone would be saved whole
            for name, tensor in loss_inputs(model, part, batch, device, dtype).items()
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}.partial")
        # Through JSON: torch's version is a type of its own, which a load of weights alone refuses.
        torch.save({**problem, "origin": json.loads(json.dumps(origin))}, partial)
        partial.replace(self.file)
        return problem


@torch.no_grad()
def loss_inputs(model: Decoder, part: HeldOut, batch: int, device: str, dtype: str) -> dict[str, Tensor]:
    """e [n, width] and c [vocab, width] in bf16, as autocast hands them to the loss, and targets [n].

    Of each window's positions all but the last, which has no next token. `batch` windows go through the model at once.
    """
    hidden, targets = [], []
    for tokens, labels in zip(part.windows.split(batch), part.labels.split(batch), strict=True):
        with autocast(device, dtype):
            e = model(tokens.to(device))
        hidden.append(e[:, :-1].flatten(0, 1).bfloat16().cpu())
        targets.append(labels[:, 1:].flatten())
    return {
        "e": torch.cat(hidden),
        "c": model.classifier.weight.detach().bfloat16().cpu(),
        "targets": torch.cat(targets),
    }
