"""Loads the operator library. Only this module knows its file and the namespace of its operators.

Builds for the Hugging Face Hub are loaded several to a process, so each has a namespace of its own, and an _ops.py for
it with `ops` and `add_op_namespace_prefix`. packaging/hub.py writes it, or the Hub's kernel-builder does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

NAMESPACE = "cce"  # csrc/ops/namespace.h

LIBRARY = Path(__file__).with_name("_C.abi3.so")
if not LIBRARY.exists():
    raise ImportError(
        f"{LIBRARY.name} is missing beside {Path(__file__).name}: this is cce_ext's source, not an installed package; "
        "run `pip install .` (or `pip install -e .`) in the repository"
    )
torch.ops.load_library(str(LIBRARY))

ops: Any = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's full name: "lce_forward" is "cce::lce_forward"."""
    return f"{NAMESPACE}::{op_name}"
