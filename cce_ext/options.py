"""The options of the loss, in one place: what they are, what they default to, and what inputs and options must be.

Every error names the argument and what it was.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypedDict

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _is_fwd_grad_enabled, unpack_dual

from .scalars import check_flag, check_number, check_of_tokens, is_a

if TYPE_CHECKING:
    from .vocab_parallel import VocabParallelOptions


class Names(NamedTuple):
    """What a function's users know its embeddings and its classifier by, in errors."""

    e: str = "e"
    c: str = "c"


NAMES = Names()

FilterEps = float | Literal["auto", "high"] | None
Scan = Literal["fp8"] | None

DEFAULT_SAMPLING_EPS = 2.0**-8

# The statistics of a loss.
RETURN_STATS = ("correct", "entropy")

# What lce_forward's stats are made of, by bits: csrc/ops/schema.cpp. The rows of its output are in this order.
ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, MAXIMUM = 1, 2, 4, 8
STATS_ROWS = 4

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

REDUCTIONS = ("mean", "sum", "none")

# impl: (method, dE filtered, dC and dbias filtered). The kahan names are Apple's: here, sums are always fp32.
_METHODS = {
    "cce": ("sampled", True, True),
    "cce_kahan": ("sampled", True, True),
    "cce_kahan_full_c": ("sampled", True, False),
    "cce_kahan_full_e": ("sampled", False, True),
    "cce_exact": ("exact", False, False),
    "cce_threshold": ("threshold", True, True),
}
DENSE = ("torch_compile", "reference")
IMPLS = (*_METHODS, *DENSE)
# Apple's other names of its exact gradient.
_SYNONYMS = {"cce_kahan_full": "cce_exact", "cce_kahan_full_c_full_e": "cce_exact"}


class LinearCrossEntropyImpl(str, enum.Enum):
    """impl as members, by which code written for Apple's package may name it: each is the string itself."""

    CCE = "cce"
    TORCH_COMPILE = "torch_compile"
    CCE_KAHAN = "cce_kahan"
    CCE_KAHAN_FULL_C = "cce_kahan_full_c"
    CCE_KAHAN_FULL_E = "cce_kahan_full_e"
    CCE_EXACT = "cce_exact"
    CCE_KAHAN_FULL_C_FULL_E = "cce_kahan_full_c_full_e"
    CCE_KAHAN_FULL = "cce_kahan_full"


_EMPTY = "; if DeepSpeed ZeRO-3 has sharded c, compute the loss in the forward of the module that owns it"


@dataclass(frozen=True)
class Options:
    """The options of linear_cross_entropy, whose docstring explains them: the same names, order and defaults.

    Nothing is checked until check().
    """

    ignore_index: int | None = -100
    softcap: float | None = None
    reduction: str = "mean"
    shift: bool | int = 0
    return_lse: bool = False
    filter_eps: FilterEps = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True
    impl: str = "cce"
    vocab_parallel_options: VocabParallelOptions | None = None
    mean_group: dist.ProcessGroup | None = None
    generator: torch.Generator | None = None
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    scan: Scan = None
    return_stats: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError and TypeError for options that no call could take."""
        check_ignore_index(self.ignore_index)
        check_reduction(self.reduction, self.mean_group)
        check_shift(self.shift)
        check_return_stats(self.return_stats)
        check_generator(self.generator)
        check_softcap(self.softcap)
        check_label_smoothing(self.label_smoothing, self.softcap)
        check_weight(self.weight)
        if not isinstance(self.return_lse, int):
            raise TypeError(
                f"return_lse: expected a bool, got {self.return_lse!r}; give options by name: Apple's module has "
                "filter_eps in this place, and return_lse at the end"
            )
        if self.impl not in DENSE:
            resolve_method(self, torch.float32)
        from .scan import check_scan  # which is of these options, as the other is
        from .vocab_parallel import check_options

        check_scan(self)
        check_options(self.vocab_parallel_options)


class GradientOptions(TypedDict, total=False):
    """Those of Options that say how gradients are computed, for type checkers: keywords of several functions."""

    filter_eps: FilterEps
    accum_e_fp32: bool
    accum_c_fp32: bool
    filter_e_grad: bool
    filter_c_grad: bool


class LossOptions(GradientOptions, total=False):
    """The same of all that follow return_lse."""

    impl: str
    vocab_parallel_options: VocabParallelOptions | None
    mean_group: dist.ProcessGroup | None
    generator: torch.Generator | None
    label_smoothing: float
    weight: Tensor | None
    scan: Scan


@dataclass(frozen=True)
class KernelOptions:
    """The keywords that the operators lce_forward and lce_backward share. Defaults are those of csrc/ops/schema.cpp.

    PyTorch leaves a keyword out where it has its schema's default, so that a kernel in Python needs them as well.
    """

    ignore_index: int | None = -100
    softcap: float | None = None
    method: str = "sampled"
    eps: float = DEFAULT_SAMPLING_EPS
    filter_e: bool = True
    filter_c: bool = True
    scale: Tensor | None = None

    def check(self, e: Tensor) -> None:
        """For a call on e [N, D]. Raises ValueError, TypeError for a scale of a wrong dtype."""
        check_softcap(self.softcap)
        check_eps(self.method, self.eps, "eps")
        if self.scale is not None:
            check_of_tokens("scale", self.scale, e)


class Method(NamedTuple):
    """How the backward picks its visits. name: sampled, exact or threshold; eps: that method's own."""

    name: str
    eps: float
    filter_e: bool
    filter_c: bool

    @property
    def draws(self) -> bool:
        """Whether it needs a seed."""
        return self.name == "sampled"

    @property
    def needs_map(self) -> bool:
        """Whether its backward reads the tile map."""
        return self.name != "exact"

    def keywords(self) -> dict[str, Any]:
        """Of the operators: some of KernelOptions."""
        return {"method": self.name, "eps": self.eps, "filter_e": self.filter_e, "filter_c": self.filter_c}


EXACT = Method("exact", 0.0, False, False)


def resolve_method(options: Options, dtype: torch.dtype) -> Method:
    """The method that a (not dense) impl and its filter options stand for, for e of dtype.

    filter_eps None, or no side to filter, is exact. Raises ValueError for an unknown impl or an eps out of the method's
    range, TypeError for what is no number and no bool.
    """
    impl = _SYNONYMS.get(options.impl, options.impl) if isinstance(options.impl, str) else ""
    if impl not in _METHODS:
        raise ValueError(f"impl: expected one of {', '.join((*IMPLS, *_SYNONYMS))}, got {options.impl!r}")
    name, filter_e, filter_c = _METHODS[impl]
    if options.filter_e_grad is not True or options.filter_c_grad is not True:
        check_flag("filter_e_grad", options.filter_e_grad)
        check_flag("filter_c_grad", options.filter_c_grad)
    filter_e, filter_c = filter_e and options.filter_e_grad, filter_c and options.filter_c_grad
    filter_eps = options.filter_eps
    if isinstance(filter_eps, str):
        if filter_eps not in ("auto", "high"):  # the latter is an older Apple's, and means the same there
            raise ValueError(f"filter_eps: expected a number, 'auto' or None, got {filter_eps!r}")
        eps = DEFAULT_SAMPLING_EPS if name == "sampled" else torch.finfo(dtype).eps / 32
    elif filter_eps is None:
        eps, name = 0.0, "exact"
    elif not is_a(filter_eps, "__float__"):
        raise TypeError(f"filter_eps: expected a number, 'auto' or None, got {filter_eps!r}")
    else:
        eps = float(filter_eps)
        check_eps(name, eps, "filter_eps")
    if name == "exact" or not (filter_e or filter_c):
        return EXACT
    return Method(name, eps, filter_e, filter_c)


def check_eps(method: str, eps: float, argument: str) -> None:
    """eps of an operator or of the function, called argument there. Raises ValueError."""
    if method not in ("sampled", "exact", "threshold"):
        raise ValueError(f"method: expected sampled, exact or threshold, got {method!r}")
    if method == "sampled" and not 0 < eps <= 0.5:
        raise ValueError(f"{argument}: the sampling eps must be in (0, 0.5], got {eps!r}")
    if method == "threshold" and not 0 < eps < 1:
        raise ValueError(f"{argument}: the threshold must be in (0, 1), got {eps!r}")


def check_generator(generator: torch.Generator | None, device: torch.device | None = None) -> None:
    """Raises TypeError for what is none, ValueError for one of another device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    # A CUDA generator without a number is the current device's, and randint checks that.
    if device is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one of e's device, {device}, got one of {generator.device}")


def check_return_stats(return_stats: tuple[str, ...]) -> None:
    """Raises TypeError for what is no tuple, ValueError for a name that is not in RETURN_STATS."""
    expected = ", ".join(RETURN_STATS)
    if not isinstance(return_stats, (tuple, list)):
        raise TypeError(f"return_stats: expected a tuple of some of {expected}, got {return_stats!r}")
    for name in return_stats:
        if name not in RETURN_STATS:
            raise ValueError(f"return_stats: expected some of {expected}, got {name!r}")


def check_reduction(reduction: str, mean_group: dist.ProcessGroup | None = None) -> None:
    """Raises ValueError for one that is not in REDUCTIONS or has no use for a mean_group, TypeError for no group."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if mean_group is not None and reduction != "mean":
        raise ValueError(f"mean_group: expected None with reduction={reduction!r}, which divides by nothing")
    if mean_group is not None and not hasattr(mean_group, "group_name"):
        raise TypeError(f"mean_group: expected a process group or None, got {type(mean_group).__name__}")


def check_transforms() -> None:
    """Raises NotImplementedError under transforms of torch.func that the operators' written-out gradient cannot serve.

    Of forward-mode AD without them the operators know by their inputs' tangents: refuse_tangents.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    keys = {interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()}
    transforms = torch._C._functorch.TransformType
    if transforms.Jvp in keys:
        _refuse(_FORWARD_MODE)
    if transforms.Grad in keys:
        _refuse("torch.func.grad and what is built on it are")


def refuse_tangents(*inputs: Tensor | None) -> None:
    """Raises NotImplementedError for inputs of forward-mode AD: it would get a tangent of 0, without a word."""
    if forward_ad._current_level >= 0 and any(x is not None and unpack_dual(x).tangent is not None for x in inputs):
        _refuse(_FORWARD_MODE)


_FORWARD_MODE = "forward-mode AD (torch.func.jvp, torch.autograd.forward_ad) is"


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"linear_cross_entropy: {what} served by impl='reference' only; the others have their gradient by "
        "loss.backward() and torch.autograd.grad"
    )


def may_need_seed(may_train: bool) -> bool:
    """Whether there may be a backward, given that one of e, c and bias requires a gradient, in whatever grad mode.

    In an autograd.Function's forward, such as the first one of reentrant checkpointing, what is computed requires none:
    there c may be frozen and e still need a gradient. Forward-mode AD is off there, and in no other mode but inference.
    """
    if torch.compiler.is_compiling():  # which cannot ask for the modes
        return may_train
    return (may_train or not _is_fwd_grad_enabled()) and not torch.is_inference_mode_enabled()


def unwrapped(x: Tensor) -> Tensor:
    """What torch.func's transforms have wrapped as x, if they have: all of a batch, and what autograd knows it as."""
    if torch.compiler.is_compiling():
        return x
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def check_softcap(softcap: float | None) -> None:
    """Raises TypeError or ValueError for one that is no positive number. None is no softcap."""
    if softcap is not None:
        check_number("softcap", softcap, "a positive number or None")


def check_label_smoothing(label_smoothing: float, softcap: float | None) -> None:
    """Raises TypeError or ValueError for one that is no number in [0, 1), or that is beside a softcap."""
    if not is_a(label_smoothing, "__float__"):
        raise TypeError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
    if label_smoothing and softcap is not None:
        raise ValueError(
            f"label_smoothing: expected 0 with softcap={softcap!r}, got {label_smoothing!r}: it needs the sum of a "
            "token's logits, which a product with the sum of c's rows gives, but not once a softcap has bent them"
        )


def check_weight(weight: Tensor | None, c: Tensor | None = None) -> None:
    """Raises TypeError for class weights that are no float tensor, ValueError for those that are not of c's rows.

    Without a c, for those that no c could make right.
    """
    if weight is None:
        return
    check_tensor("weight", weight)
    if weight.dtype not in _DTYPES:
        raise TypeError(f"weight: expected a tensor of bf16, fp16, fp32 or fp64, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("weight: expected a tensor that requires no gradient: it is given none")
    if weight.dim() != 1:
        raise ValueError(f"weight: expected [V], one for each class, got {_shape(weight)}")
    if c is None:
        return
    if len(weight) != len(c):
        raise ValueError(f"weight: expected [{len(c)}] for c of shape {_shape(c)}, got {_shape(weight)}")
    if hasattr(weight, "device_mesh") and not hasattr(c, "device_mesh"):
        raise ValueError("weight: expected a plain tensor like c, got a DTensor; give its to_local()")
    if weight.device != c.device:
        raise ValueError(f"weight: expected {c.device} like e, got {weight.device}")


def check_tensors(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, names: Names = NAMES) -> None:
    """Raises TypeError for an argument that is no tensor: what all else is asked of them as."""
    for name, x in ((names.e, e), (names.c, c), ("targets", targets), ("bias", bias)):
        if name != "bias" or x is not None:
            check_tensor(name, x)


def check_tensor(name: str, x: object) -> None:
    """Raises TypeError for an argument of this name that is no tensor."""
    if not isinstance(x, Tensor):
        hint = "; give its weight (and bias)" if isinstance(x, torch.nn.Module) else ""
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}{hint}")


def check_inputs(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, names: Names = NAMES) -> None:
    """e [.., D], c [V, D], targets [..], bias [V]: shapes, dtypes and devices that belong together.

    Raises TypeError for a dtype, ValueError for a shape or a device.
    """
    for name, x in ((names.e, e), (names.c, c), ("bias", bias)):
        if x is not None and x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a tensor of bf16, fp16, fp32 or fp64, got {x.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 or int32, got {targets.dtype}")
    for name, x in ((names.c, c), ("bias", bias)):
        if x is not None and x.dtype != e.dtype:
            raise TypeError(
                f"{name}: expected {e.dtype} like {names.e}, got {x.dtype} (autocast casts {names.e}, {names.c} and "
                "bias)"
            )

    if e.dim() < 1:
        raise ValueError(f"{names.e}: expected [.., D], got a tensor without dimensions")
    if e.shape[-1] == 0:
        raise ValueError(f"{names.e}: expected [.., D] with D >= 1, got {_shape(e)}")
    if c.dim() != 2 or c.shape[1] != e.shape[-1]:
        raise ValueError(
            f"{names.c}: expected [V, {e.shape[-1]}] for {names.e} of shape {_shape(e)}, got {_shape(c)}"
            + (_EMPTY if c.numel() == 0 and c.dim() < 2 else "")
        )
    if targets.shape != e.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {list(e.shape[:-1])} for {names.e} of shape {_shape(e)}, got {_shape(targets)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != c.shape[0]):
        raise ValueError(f"bias: expected [{c.shape[0]}] for {names.c} of shape {_shape(c)}, got {_shape(bias)}")

    for name, x in ((names.c, c), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != e.device:
            raise ValueError(f"{name}: expected {e.device} like {names.e}, got {x.device}")


def check_shift(shift: int, targets: Tensor | None = None) -> int:
    """shift as an int in [0, T), T the targets' last dimension, without them any. Raises TypeError, ValueError."""
    if not is_a(shift, "__index__"):
        raise TypeError(f"shift: expected an integer or a bool, got {shift!r}")
    shift = int(shift)
    if targets is None:
        if shift < 0:
            raise ValueError(f"shift: expected 0 <= shift, got {shift}")
        return shift
    length = targets.shape[-1] if targets.dim() else 0
    if shift != 0 and not 0 <= shift < length:
        raise ValueError(f"shift: expected 0 <= shift < {length}, the last dimension of targets, got {shift}")
    return shift


def check_ignore_index(ignore_index: int | None, targets: Tensor | None = None) -> None:
    """Raises TypeError for one that is neither an integer nor None, ValueError for one that no target can have.

    In 32 bits such a number would be compared, without a word, as what its low half is.
    """
    if ignore_index is None:
        return
    if not is_a(ignore_index, "__index__"):
        raise TypeError(f"ignore_index: expected an integer or None, got {ignore_index!r}")
    if targets is not None and targets.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index: expected a number of int32, which targets are, or None, got {ignore_index}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
