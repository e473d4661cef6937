"""The 8-bit scan, scan="fp8": what it takes, and where it is left out. What it computes: docs/gradient.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _is_fwd_grad_enabled

from .options import DENSE, KernelOptions, Options, Scan, may_need_seed, resolve_method, unwrapped

_CAPABILITY = (9, 0)


def check_scan(options: Options) -> None:
    """Raises ValueError for a scan that is none, or beside options by which the gradient is not sampled."""
    _check_value(options.scan)
    if options.scan is None:
        return
    if options.impl in DENSE or not resolve_method(options, torch.float32).draws:
        raise ValueError(
            f"scan: {options.scan!r} corrects the loss by what a sampled gradient visits, and nothing is sampled with "
            f"impl={options.impl!r}, filter_eps={options.filter_eps!r}, filter_e_grad={options.filter_e_grad}, "
            f"filter_c_grad={options.filter_c_grad}"
        )
    if options.return_stats:
        raise ValueError(
            f"return_stats: expected () with scan={options.scan!r}, got {options.return_stats!r}: of logits of 8 bits "
            "the loss and the lse are corrected by what is visited, which says nothing of a maximum and an entropy"
        )


def check_scan_call(scan: str, e: Tensor, may_train: bool) -> None:
    """Raises ValueError for a call that has no gradient to draw for, or an e [N, D] that no kernel scans.

    may_train: whether one of e, c and bias requires a gradient, in whatever grad mode.
    """
    if not may_need_seed(may_train):
        raise ValueError(
            f"scan: {scan!r} is for training: without a gradient nothing is drawn that could correct the loss; leave "
            "it out where e, c and bias require none"
        )
    _check_tensor(scan, e)


def check_scan_kernel(
    scan: str | None,
    e: Tensor,
    seed: Tensor | None,
    options: KernelOptions,
    need_map: bool,
    stats: int,
    batch_invariant: bool,
) -> None:
    """Of a call of cce::lce_forward. Raises ValueError for what the 8-bit scan does not go with."""
    _check_value(scan)
    if scan is None:
        return
    if options.method != "sampled":
        raise ValueError(f"method: expected 'sampled' with scan={scan!r}, got {options.method!r}")
    if seed is None:
        raise ValueError(f"seed: expected a [1] int64 tensor with scan={scan!r}, got None")
    if not need_map:
        raise ValueError(f"need_map: expected True with scan={scan!r}, got False")
    if options.scale is not None:
        raise ValueError(f"scale: expected None with scan={scan!r}, got one of shape {list(options.scale.shape)}")
    if stats:
        raise ValueError(f"stats: expected 0 with scan={scan!r}, got {stats}")
    if batch_invariant:
        raise ValueError(
            f"batch_invariant: expected False with scan={scan!r}: what is visited of a token depends on the others"
        )
    _check_tensor(scan, e)


def refuse_scan(scan: str | None, e: Tensor) -> None:
    """Of the portable implementation, which has none: raises ValueError where one is asked for."""
    if scan is not None:
        raise _unsupported(scan, e)


def scan_in_training(scan: Scan, e: Tensor, c: Tensor, bias: Tensor | None) -> Scan:
    """scan where the loss of these is about to be differentiated, None where it is not: in evaluation.

    An autograd.Function's forward, as the first one of reentrant checkpointing, is taken for training.
    """
    if scan is None:
        return None
    trains = torch.is_grad_enabled() and any(unwrapped(x).requires_grad for x in (e, c, bias) if isinstance(x, Tensor))
    if torch.compiler.is_compiling():
        return scan if trains else None
    return scan if (trains or not _is_fwd_grad_enabled()) and not torch.is_inference_mode_enabled() else None


def _check_value(scan: Any) -> None:
    if scan is not None and scan != "fp8":
        raise ValueError(f"scan: expected 'fp8' or None, got {scan!r}")


def _check_tensor(scan: str, e: Tensor) -> None:
    if e.device.type != "cuda" or e.dtype not in (torch.bfloat16, torch.float16):
        raise _unsupported(scan, e)
    # A compiler's and a mode's tensors may be of a GPU that is not there.
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return
    capability = torch.cuda.get_device_capability(e.device)
    if capability != _CAPABILITY:
        raise _unsupported(scan, e, f" of compute capability {capability[0]}.{capability[1]}")


def _unsupported(scan: str, e: Tensor, capability: str = "") -> ValueError:
    dtype = str(e.dtype).removeprefix("torch.")
    return ValueError(
        f"scan: {scan!r} takes a Hopper GPU (compute capability 9.0) and bf16 or fp16, got {dtype} on "
        f"{e.device}{capability}"
    )
