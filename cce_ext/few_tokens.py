"""When few tokens have their gradient from logits that the forward keeps, and not from samples.

With few tokens reading the classifier is all that a pass costs. The sampled backward reads it twice; the exact one does
so once where it need not compute the logits again. In 16 bits each they take 2 N V bytes: at most an eighth of what the
classifier's own gradient takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .options import Method, Options

MOST_TOKENS = 256
LEAST_WIDTH_OF_A_TOKEN = 8  # of D for each of N


def keeps_logits(e: Tensor, method: Method, options: Options, others: bool) -> bool:
    """Whether a call on e [N, D] is exact, and keeps its logits where it will be differentiated.

    A filter_eps that is a number is what is asked for: it samples. others: statistics or scales of its logits are
    wanted.
    """
    chosen = method.name == "exact" or (method.name == "sampled" and isinstance(options.filter_eps, str))
    # The gradient of fp16 is nearer than what 16 bits keep of a logit.
    if not (chosen and e.is_cuda and torch.version.hip is None and e.dtype == torch.bfloat16):
        return False
    if others or options.scan is not None:
        return False
    return is_few(*e.shape)


def is_few(n: int, d: int) -> bool:
    """Whether so many tokens of such a width are few."""
    return _is_true(n <= MOST_TOKENS) and _is_true(n * LEAST_WIDTH_OF_A_TOKEN <= d)


def _is_true(condition: Any) -> bool:
    """Where sizes are a graph's symbols, whether it is so for all of them: it is to serve any number of tokens."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
