"""Hugging Face Transformers: cce_patch lets a causal LM compute its loss without logits, cce_unpatch undoes it.

A patched model runs its own forward, on a view of itself in which lm_head gives no logits but a promise of them, and in
which loss_function computes the loss of what was promised. What the forward does in between (a scale, a softcap) the
promise records; what it does not know it refuses, so that no family is served wrongly, and nothing has to be known of a
family. The model is not changed by a call.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn

from .api import LinearCrossEntropy, linear_cross_entropy
from .options import FilterEps

try:
    import transformers
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'cce_ext.transformers needs transformers, which is not installed: pip install "cce_ext[transformers]"',
        name=error.name,
    ) from error

__all__ = ["cce_patch", "cce_unpatch", "supported"]

# The model types whose loss and gradients tests/test_transformers.py compares with those of the unpatched model.
_TESTED = (
    "apertus",
    "arcee",
    "bitnet",
    "bloom",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "lfm2",
    "llama",
    "llama4_text",
    "ministral",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)

# Options of linear_cross_entropy that are not the caller's to choose.
_FROM_THE_MODEL = ("ignore_index", "softcap", "shift", "return_lse", "vocab_parallel_options", "mean_group")

_Model = TypeVar("_Model", bound=nn.Module)


def supported() -> tuple[str, ...]:
    """The model types of the installed transformers that are tested, sorted.

    Others are served as well, unless cce_patch or the first loss refuses them.
    """
    return tuple(name for name in _TESTED if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@overload
def cce_patch(
    model_or_model_type: _Model,
    impl: str = ...,
    reduction: str = ...,
    filter_eps: FilterEps = ...,
    accum_e_fp32: bool = ...,
    accum_c_fp32: bool = ...,
    filter_e_grad: bool = ...,
    filter_c_grad: bool = ...,
    train_only: bool = ...,
) -> _Model: ...


@overload
def cce_patch(
    model_or_model_type: str | transformers.PretrainedConfig,
    impl: str = ...,
    reduction: str = ...,
    filter_eps: FilterEps = ...,
    accum_e_fp32: bool = ...,
    accum_c_fp32: bool = ...,
    filter_e_grad: bool = ...,
    filter_c_grad: bool = ...,
    train_only: bool = ...,
) -> None: ...


def cce_patch(
    model_or_model_type: nn.Module | str | transformers.PretrainedConfig,
    impl: str = "cce",
    reduction: str = "mean",
    filter_eps: FilterEps = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    train_only: bool = False,
) -> nn.Module | None:
    """Let a causal LM compute its loss by linear_cross_entropy: wherever it is given labels, and with logits None.

    Without labels the model is as it was. Softcap, logit scale and the bias of lm_head are the model's own; labels are
    int32 or int64 [B, T], -100 where a token does not count. Patch before accelerate, FSDP, DDP or torch.compile wrap
    the model; PEFT may come before or after. Patching again replaces the options.

    Args:
        model_or_model_type: a model (or PEFT's wrapper of one), which alone is patched; or a model type such as "llama"
            or a config, for the class: all its models, those that exist already as well.
        impl, filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad: as in linear_cross_entropy.
        reduction: "mean" as in Transformers: the sum over num_items_in_batch where the Trainer gives it, else the mean
            over the tokens that count (NaN if there are none). "sum", and "none", which is [B, T - 1], or has
            shift_labels' shape, take no notice of num_items_in_batch.
        train_only: a model in eval mode computes logits and its own loss.

    Returns: the model, None for a type or a config.

    Raises:
        TypeError: neither a model of transformers nor a config nor a str. ValueError: an option, an unknown model type,
            or a model that cannot be served, with the reason. NotImplementedError, where a loss is computed first: the
            forward does with its logits what is not known here, or lm_head is more than a linear layer.
    """
    criterion = LinearCrossEntropy(
        reduction=reduction,
        filter_eps=filter_eps,
        accum_e_fp32=accum_e_fp32,
        accum_c_fp32=accum_c_fp32,
        filter_e_grad=filter_e_grad,
        filter_c_grad=filter_c_grad,
        impl=impl,
    )
    bound = {name: x for name, x in criterion.options.items() if name not in _FROM_THE_MODEL}
    options = {**bound, "train_only": train_only}
    if not isinstance(model_or_model_type, nn.Module):
        cls = _class_of(model_or_model_type)
        cls.forward = _patched_forward(cls, options)
        return None
    model = _inner_model(model_or_model_type)
    if "forward" in model.__dict__:
        raise ValueError(
            "model_or_model_type: this model's forward has been replaced already (as accelerate does); patch it before"
        )
    model.__class__ = _patched_class(_unpatched_class(type(model)), options)
    return model_or_model_type


cce_patch.supported = supported  # type: ignore[attr-defined]


def cce_unpatch(model_or_model_type: nn.Module | str | transformers.PretrainedConfig) -> None:
    """Undo cce_patch of the same model, or of the same model type. Raises ValueError for what is not patched."""
    if isinstance(model_or_model_type, nn.Module):
        model = _inner_model(model_or_model_type)
        cls = type(model)
        if _unpatched_class(cls) is cls:
            raise ValueError(f"model_or_model_type: this {cls.__name__} was not patched by itself, or is wrapped since")
        model.__class__ = _unpatched_class(cls)
        return
    cls = _class_of(model_or_model_type)
    original = getattr(cls.__dict__.get("forward"), "_cce_original", None)
    if original is None:
        raise ValueError(f"model_or_model_type: {cls.__name__} is not patched")
    del cls.forward
    if cls.forward is not original:  # it was not inherited
        cls.forward = original


def _class_of(model_type: str | transformers.PretrainedConfig) -> Any:
    """The causal LM class of a model type or of a config."""
    if isinstance(model_type, transformers.PretrainedConfig):
        model_type = model_type.model_type
    if not isinstance(model_type, str):
        raise TypeError(
            f"model_or_model_type: expected a model, a config or a model type, got {type(model_type).__name__}"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"model_or_model_type: transformers {transformers.__version__} has no causal LM of type {model_type!r}"
        )
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _inner_model(model: nn.Module) -> transformers.PreTrainedModel:
    """The model itself, without PEFT's wrapper."""
    inner: Any = model
    if not isinstance(model, transformers.PreTrainedModel) and callable(getattr(model, "get_base_model", None)):
        inner = inner.get_base_model()
    if not isinstance(inner, transformers.PreTrainedModel):
        raise TypeError(
            f"model_or_model_type: expected a model of transformers or PEFT, got {type(model).__name__} "
            "(patch a model before it is wrapped)"
        )
    return inner


def _patched_class(cls: Any, options: dict[str, Any]) -> Any:
    """A subclass of cls that differs in its forward, and that copy and pickle can make again."""

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        _, _, *state = cls.__reduce_ex__(self, protocol)
        return _new_patched, (cls, options), *state

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    patched = {"forward": _patched_forward(cls, options), "__reduce_ex__": reduce, "_cce_unpatched_class": cls}
    return type(cls.__name__, (cls,), {**names, **patched})


def _new_patched(cls: Any, options: dict[str, Any]) -> Any:
    patched = _patched_class(cls, options)
    return patched.__new__(patched)


def _unpatched_class(cls: Any) -> Any:
    """What _patched_class was given, or cls itself."""
    return cls.__dict__.get("_cce_unpatched_class", cls)


def _patched_forward(cls: Any, options: dict[str, Any]) -> Callable[..., Any]:
    """cls's own forward with the loss of these options. Raises ValueError for a forward that has no loss to replace."""
    original = getattr(cls.forward, "_cce_original", cls.forward)
    code = inspect.unwrap(original).__code__
    parameters = list(inspect.signature(original).parameters)
    for reason, found in (
        ("has no labels", "labels" not in parameters),
        ("does not compute its loss by self.loss_function", "loss_function" not in code.co_names),
        ("calls its parent's", "__class__" in code.co_freevars),
    ):
        if found:
            raise ValueError(f"model_or_model_type: {cls.__name__} cannot be served: its forward {reason}")
    labels_at = parameters.index("labels") - 1  # self is not counted
    options = dict(options)
    train_only = options.pop("train_only")

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[labels_at] if len(args) > labels_at else kwargs.get("labels")
        if labels is None or (train_only and not self.training):
            return original(self, *args, **kwargs)
        if options["reduction"] == "none" and _adds_router_loss(self.config, kwargs):
            raise ValueError(
                "output_router_logits: the router's loss is one number, which reduction='none' has no place for; "
                "set it to False"
            )
        return _without_logits(original(_View(self, options), *args, **kwargs))

    forward._cce_original = original  # type: ignore[attr-defined]
    return forward


def _adds_router_loss(config: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_router_logits")
    return bool(getattr(config, "output_router_logits", False) if asked is None else asked)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(x for x in output if not isinstance(x, _Logits))
    return type(output)(**{name: x for name, x in output.items() if not isinstance(x, _Logits)})


class _View:
    """A model as its forward sees it during one call: itself, but for lm_head and loss_function."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise NotImplementedError(f"{type(model).__name__} cannot be served by cce_patch: it has no lm_head")
        own = {"_cce_model": model, "_cce_head": head, "_cce_options": options}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._cce_model, name)
        return _Head(value, type(self._cce_model).__name__) if value is self._cce_head else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cce_model, name, value)

    def loss_function(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Transformers' ForCausalLMLoss, of logits that were only promised."""
        family = type(self._cce_model).__name__
        if self._cce_model.loss_function is not ForCausalLMLoss:
            raise NotImplementedError(
                f"{family} cannot be served by cce_patch: its loss_function is not transformers' ForCausalLMLoss"
            )
        if not isinstance(logits, _Logits):
            raise NotImplementedError(
                f"{family} cannot be served by cce_patch: its logits do not come from lm_head, which is what "
                "get_output_embeddings() gives"
            )
        targets = shift_labels
        if targets is None:
            assert labels is not None  # the loss of labels is what a forward is here for
            # Not shift=1, which a sequence of one token has no room for.
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        targets = targets.to(logits.device)
        options = {**self._cce_options, "ignore_index": ignore_index}
        if num_items_in_batch is not None and options["reduction"] == "mean":
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(logits.device)
            return logits.cross_entropy(targets, **{**options, "reduction": "sum"}) / num_items_in_batch
        loss = logits.cross_entropy(targets, **options)
        return loss[..., :-1] if options["reduction"] == "none" and shift_labels is None else loss


class _Head:
    """lm_head during one call: its result is a promise."""

    def __init__(self, head: nn.Module, family: str) -> None:
        self._cce_head = head
        self._cce_family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cce_head, name)

    def __call__(self, hidden: Tensor) -> _Logits:
        return _Logits(self._cce_family, *_classifier(self._cce_head, hidden))


class _Logits:
    """Logits that are never computed: z = scale * (e @ c.T + bias), or cap * tanh(z). Refuses whatever else is asked.

    e: [.., D]; c: [V, D]; bias: [V] or None.
    """

    def __init__(
        self, family: str, e: Tensor, c: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None
    ) -> None:
        self.family, self.e, self.c, self.bias, self.scale, self.cap = family, e, c, bias, scale, cap

    def cross_entropy(self, targets: Tensor, **options: Any) -> Tensor:
        scale, softcap = self.scale, self.cap
        if softcap is not None:  # cap * tanh(z) is softcap * tanh(cap * z / softcap)
            scale *= softcap
        e, bias = self.e, self.bias
        if not math.isclose(scale, 1.0, rel_tol=1e-12):
            # e is the smaller one; in 16 bits a scale that is no power of two rounds it once more.
            e, bias = e * scale, None if bias is None else bias * scale
        loss: Tensor = linear_cross_entropy(e, self.c, targets, bias, softcap=softcap, **options)
        return loss

    def _with(self, scale: float, cap: float | None) -> _Logits:
        return _Logits(self.family, self.e, self.c, self.bias, scale, cap)

    def __mul__(self, factor: float) -> _Logits:
        if not isinstance(factor, (int, float)):
            self._refuse(f"times a {type(factor).__name__}")
        return self._with(self.scale * factor, None) if self.cap is None else self._with(self.scale, self.cap * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> _Logits:
        if not isinstance(divisor, (int, float)):
            self._refuse(f"divided by a {type(divisor).__name__}")
        return self * (1 / divisor)

    def tanh(self) -> _Logits:
        if self.cap is not None:
            self._refuse("tanh of tanh")
        return self._with(self.scale, 1.0)

    def contiguous(self) -> _Logits:
        return self

    def float(self) -> _Logits:
        """The loss is computed in fp32 anyway."""
        return self

    @property
    def device(self) -> torch.device:
        return self.e.device

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Logits:
        self = next(x for x in args if isinstance(x, _Logits))
        if function is not torch.tanh or len(args) > 1 or kwargs:
            self._refuse(torch.overrides.resolve_name(function) or str(function))
        return self.tanh()

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{self.family} cannot be served by cce_patch: between lm_head and the loss its forward does with its "
            f"logits what is not known here ({what})"
        )


def _refuse_operator(name: str) -> Callable[..., NoReturn]:
    def refuse(self: _Logits, *args: Any) -> NoReturn:
        self._refuse(name)

    return refuse


# Python looks for these on the class only, where __getattr__ does not reach.
for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "floordiv", "mod", "matmul", "rmatmul", "pow", "rpow", "neg", "abs"),
    *("lt", "le", "gt", "ge", "eq", "ne", "bool", "getitem", "setitem", "iter", "len", "contains"),
):
    setattr(_Logits, f"__{_name}__", _refuse_operator(f"__{_name}__"))


def _classifier(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """e [.., D], c [V, D] and bias of which head(hidden) [.., V] is the product, differentiable.

    Raises NotImplementedError for a head that is more than that.
    """
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if name.startswith("peft."):
        return _peft_classifier(head, hidden, name)
    if type(head) is not nn.Linear:
        raise NotImplementedError(f"lm_head: expected torch.nn.Linear, got {name}, which cce_patch cannot serve")
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in head.__dict__:
        raise NotImplementedError(
            "lm_head: it has hooks or a forward of its own (as FSDP, DeepSpeed ZeRO-3 or a device_map over several "
            "devices give it), which cce_patch would pass by"
        )
    weight = head.weight
    if type(weight) not in (Tensor, nn.Parameter):
        raise NotImplementedError(
            f"lm_head.weight: expected a plain tensor, got {type(weight).__name__} (sharded or quantized?), which "
            "cce_patch cannot serve"
        )
    return hidden, weight, head.bias


def _peft_classifier(head: Any, hidden: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """LoRA as a wider product, [e, s e A^T] @ [c, B]^T, with a copy of c; or the head that PEFT trains whole.

    Raises NotImplementedError for any other adapter.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if type(head) is ModulesToSaveWrapper:
        adapters = [] if head.disable_adapters else head.active_adapters
        saved = bool(adapters) and all(adapter in head.modules_to_save for adapter in adapters)
        return _classifier(head.modules_to_save[adapters[0]] if saved else head.original_module, hidden)
    if type(head) is not LoraLinear:
        raise NotImplementedError(f"lm_head: PEFT's {name} cannot be served by cce_patch, only its plain LoRA")
    if head.disable_adapters and head.merged:
        head.unmerge()
    e, c, bias = _classifier(head.base_layer, hidden)
    if head.disable_adapters or head.merged:
        return e, c, bias
    for adapter in head.active_adapters:
        if adapter not in head.lora_A:
            continue
        if adapter in head.lora_variant:
            variant = type(head.lora_variant[adapter]).__name__
            raise NotImplementedError(f"lm_head: LoRA's {variant} cannot be served by cce_patch, only plain LoRA")
        a: Any = head.lora_A[adapter]
        b: Any = head.lora_B[adapter]
        scaling = head.scaling[adapter]
        low = a(head.lora_dropout[adapter](hidden.to(a.weight.dtype))) * scaling
        e = torch.cat([e, low.to(e.dtype)], -1)
        c = torch.cat([c, b.weight.to(c.dtype)], 1)
        if b.bias is not None:
            bias = (b.bias * scaling + (0.0 if bias is None else bias)).to(c.dtype)
    return e, c, bias
