"""Hugging Face Transformers: cce_patch lets a causal LM compute its loss without logits, cce_unpatch undoes it.

A patched model runs its own forward, on a view of itself in which lm_head gives no logits but a promise of them, and in
which loss_function computes the loss of what was promised. What the forward does in between (a scale, a softcap) the
promise records; what it does not know it refuses, so that no family is served wrongly, and nothing has to be known of a
family. The model is not changed by a call.
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'cce_ext.transformers needs transformers, which is not installed: pip install "cce_ext[transformers]"',
        name=error.name,
    ) from error

from .families import supported
from .patch import cce_patch, cce_unpatch
from .stats import TokenMeans, TokenStats

__all__ = ["TokenMeans", "TokenStats", "cce_patch", "cce_unpatch", "supported"]
