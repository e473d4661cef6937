"""Registers the operators of namespace cce: kernels for devices without their own, fake and autocast.

Autograd's are in autograd.py.

Their schemas are in csrc/ops/schema.cpp. linear_cross_entropy is composite: a compiled graph sees lce_forward and
lce_backward, both functional.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import autograd, portable
from ._ops import add_op_namespace_prefix, ops
from .classifier import accumulate_dtype, label_logits
from .labels import check_target_range, may_look_at
from .options import MAXIMUM, STATS_ROWS, KernelOptions, check_inputs
from .sampling import CODE_WORDS, num_tiles
from .scalars import check_of_tokens
from .scan import check_scan_kernel, refuse_scan

HAS_CUDA: bool = json.loads(ops.build_info())["cuda"]

WITHOUT_CUDA = (
    "cce_ext was built without its CUDA kernels (CCE_CUDA=OFF, or no nvcc was found), so that it cannot serve CUDA "
    "tensors: put CUDA's nvcc on the PATH, or have pip bring one by CCE_CUDA_WHEELS=13.0 (drivers from 580 on), and "
    "install it again with `CCE_CUDA=ON pip install --force-reinstall --no-deps .`, or use impl='torch_compile'"
)
# device_count asks NVML first: unlike is_available it does not keep a later fork from using CUDA.
if not HAS_CUDA and torch.version.cuda is not None and torch.cuda.device_count() > 0:
    warnings.warn(WITHOUT_CUDA, RuntimeWarning, stacklevel=2)

_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "IMPL")


def _checked(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, keywords: dict[str, Any]) -> KernelOptions:
    """The options of a call whose inputs are right. Raises TypeError and ValueError."""
    options = KernelOptions(**keywords)
    if e.dim() != 2:
        raise ValueError(f"e: expected [N, D], got {list(e.shape)}")
    check_inputs(e, c, targets, bias)
    options.check(e)
    return options


def _label_logits(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, **keywords: Any) -> Tensor:
    options = _checked(e, c, bias, targets, keywords)
    return label_logits(e, c, bias, targets, options.ignore_index, options.softcap, options.scale)


def _lce_forward(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seed: Tensor | None,
    *,
    need_map: bool = True,
    stats: int = 0,
    batch_invariant: bool = False,
    scan: str | None = None,
    keep_logits: bool = False,
    **keywords: Any,
) -> tuple[Tensor, ...]:
    options = _checked(e, c, bias, targets, keywords)
    if keep_logits:
        raise ValueError(f"keep_logits: expected fp16 or bf16 on CUDA, got {e.dtype} on {e.device}")
    if not 0 <= stats < 1 << STATS_ROWS:
        raise ValueError(f"stats: expected a sum of 1, 2, 4 and 8, got {stats}")
    check_scan_kernel(scan, e, seed, options, need_map, stats, batch_invariant)
    refuse_scan(scan, e)
    if may_look_at(targets):
        check_target_range(targets, len(c), options.ignore_index)
    # The operator where it has a kernel of its own; elsewhere it would only be a longer way to the same function.
    of_labels = ops.label_logits if HAS_CUDA and e.is_cuda else label_logits
    given: dict[str, Any] = {"ignore_index": options.ignore_index, "softcap": options.softcap, "scale": options.scale}
    if of_labels is label_logits:
        given["batch_invariant"] = batch_invariant
    label = of_labels(e, c, bias, targets, **given)
    return portable.lce_forward(
        *(e, c, bias, targets, label),
        options=options,
        need_map=need_map,
        stats=stats,
        batch_invariant=batch_invariant,
    )


def _lce_backward(
    g_nll: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    nll: Tensor,
    lse: Tensor,
    tile_map: Tensor,
    entropy: Tensor | None,
    seed: Tensor | None,
    *,
    need_e: bool = True,
    need_c: bool = True,
    need_bias: bool = False,
    count: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _checked(e, c, bias, targets, keywords)
    if count is not None:
        if count.shape != ():
            raise ValueError(f"count: expected a scalar, got {list(count.shape)}")
        g_nll = None if g_nll is None else g_nll / count
    shape = (num_tiles(len(c)), len(e))
    if options.method != "exact" and (tile_map.shape != shape or tile_map.dtype != torch.int16):
        raise ValueError(
            f"tile_map: expected int16 {list(shape)}, got {str(tile_map.dtype).removeprefix('torch.')} "
            f"{list(tile_map.shape)} (lce_forward leaves none with need_map=False)"
        )
    if options.method == "sampled" and seed is None:
        raise ValueError("seed: the sampled method needs one, a [1] int64 tensor, got None")
    if g_entropy is not None:
        if entropy is None:
            raise ValueError("entropy: expected what lce_forward gave, since g_entropy is given, got None")
        check_of_tokens("entropy", entropy, e)
    gradients = portable.lce_backward(
        *(g_nll, g_lse, g_entropy, e, c, bias, targets, nll, lse, tile_map, entropy, seed),
        options=options,
        need_e=need_e,
        need_c=need_c,
        need_bias=need_bias,
    )
    d_e, d_c, d_bias = (e.new_empty(0) if g is None else g for g in gradients)
    return d_e, d_c, d_bias


def _label_logits_fake(e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, **keywords: Any) -> Tensor:
    _checked(e, c, bias, targets, keywords)
    return e.new_empty(e.shape[0], dtype=accumulate_dtype(e))


def _lce_forward_fake(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seed: Tensor | None,
    *,
    need_map: bool = True,
    stats: int = 0,
    batch_invariant: bool = False,
    scan: str | None = None,
    keep_logits: bool = False,
    **keywords: Any,
) -> tuple[Tensor, ...]:
    options = _checked(e, c, bias, targets, keywords)
    check_scan_kernel(scan, e, seed, options, need_map, stats, batch_invariant)
    n, dtype = e.shape[0], accumulate_dtype(e)
    tiles: tuple[int, ...] = (num_tiles(c.shape[0]), n) if need_map else (0, 0)
    if keep_logits:
        tiles = (num_tiles(c.shape[0]), n, CODE_WORDS)
    return (
        e.new_empty(n, dtype=dtype),
        e.new_empty(n, dtype=dtype),
        e.new_empty(tiles, dtype=torch.int16),
        e.new_empty((STATS_ROWS, n) if stats else (0, 0), dtype=dtype),
        e.new_empty(n if stats & MAXIMUM else 0, dtype=torch.int64),
    )


def empty_gradients(
    e: Tensor, c: Tensor, bias: Tensor | None, need_e: bool, need_c: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of e's, c's and bias's gradients, as the operators return them: what is not needed is [0]."""
    return (
        e.new_empty(e.shape if need_e else (0,)),
        c.new_empty(c.shape if need_c else (0,)),
        e.new_empty(c.shape[:1] if need_bias and bias is not None else (0,)),
    )


def _lce_backward_fake(
    g_nll: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    *saved: Tensor | None,
    need_e: bool = True,
    need_c: bool = True,
    need_bias: bool = False,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(e, c, bias, need_e, need_c, need_bias)


def _reduce_nll(nll: Tensor, targets: Tensor, *, ignore_index: int = -100, mean: bool = True) -> tuple[Tensor, Tensor]:
    if nll.dim() != 1 or targets.shape != nll.shape:
        raise ValueError(f"targets: expected [N] like nll, got {list(targets.shape)} and {list(nll.shape)}")
    count = (targets != ignore_index).sum(dtype=nll.dtype)
    return nll.sum() / count if mean else nll.sum(), count


def _reduce_nll_fake(nll: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return nll.new_empty(()), nll.new_empty(())


torch.library.register_fake(add_op_namespace_prefix("label_logits"), _label_logits_fake)
torch.library.register_fake(add_op_namespace_prefix("reduce_nll"), _reduce_nll_fake)
torch.library.register_fake(add_op_namespace_prefix("lce_forward"), _lce_forward_fake)
torch.library.register_fake(add_op_namespace_prefix("lce_backward"), _lce_backward_fake)


autograd.register(_library)


# Asked once: torch.compile cannot trace the question.
_AUTOCAST_DEVICES = [d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d)]


def autocast_inputs(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """e, c and bias in autocast's dtype where it is on for their device; fp64 stays, as in PyTorch's own rules."""
    device = e.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return e, c, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(e), cast(c), None if bias is None else cast(bias)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where PyTorch's operations on this device compute in their inputs' dtype."""
    return torch.autocast(device.type, enabled=False) if device.type in _AUTOCAST_DEVICES else nullcontext()


def _lce_forward_autocast(
    e: Tensor, c: Tensor, bias: Tensor | None, targets: Tensor, seed: Tensor | None, **options: Any
) -> Any:
    e, c, bias = autocast_inputs(e, c, bias)
    with torch.autocast(e.device.type, enabled=False):
        return ops.lce_forward(e, c, bias, targets, seed, **options)


def _lce_backward_autocast(
    g_nll: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    e: Tensor,
    *inputs: Tensor | None,
    **options: Any,
) -> Any:
    """Everything has the forward's dtype. A backward inside the caller's autocast must not have its own steps cast."""
    with torch.autocast(e.device.type, enabled=False):
        return ops.lce_backward(g_nll, g_lse, g_entropy, e, *inputs, **options)


for _key in autograd.AUTOCAST_KEYS:
    _library.impl("lce_forward", _lce_forward_autocast, _key)
    _library.impl("lce_backward", _lce_backward_autocast, _key)

_library.impl("label_logits", _label_logits, "CompositeExplicitAutograd")
_library.impl("reduce_nll", _reduce_nll, "CompositeExplicitAutograd")
_library.impl("lce_forward", _lce_forward, "CompositeExplicitAutograd")
_library.impl("lce_backward", _lce_backward, "CompositeExplicitAutograd")
# Where the CUDA kernels of the two above leave a dtype to portable torch.
_library.impl("lce_forward_portable", _lce_forward, "CompositeExplicitAutograd")
_library.impl("lce_backward_portable", _lce_backward, "CompositeExplicitAutograd")


def register_composite(name: str, kernel: Callable[..., Any]) -> None:
    """Make kernel the implementation of an operator made of others, for every device and under every transform."""
    _library.impl(name, kernel, "CompositeImplicitAutograd")


def register_functional(
    name: str, kernel: Callable[..., Any], fake: Callable[..., Any], gradient: Callable[..., Any] | str
) -> None:
    """Make kernel an operator's, for every device, with a gradient of its own: autograd.register_operator."""
    torch.library.register_fake(add_op_namespace_prefix(name), fake)
    autograd.register_operator(_library, name, gradient)
    _library.impl(name, kernel, "CompositeExplicitAutograd")


def refuse_cuda(*args: Any, **kwargs: Any) -> NoReturn:
    """The operators' CUDA kernel in a build that has none. Raises RuntimeError that says how to get them."""
    raise RuntimeError(WITHOUT_CUDA)


if not HAS_CUDA and torch.version.hip is None:
    for _name in ("label_logits", "lce_forward", "lce_backward", "reduce_nll"):
        _library.impl(_name, refuse_cuda, "CUDA")
