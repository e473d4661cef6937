"""cce_patch and cce_unpatch: a model whose forward runs on a view of it that computes no logits."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
import transformers
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ..layers import next_tokens
from ..options import RETURN_STATS, FilterEps, GradientOptions, Options, Scan
from .families import CLASSES, supported
from .fused_head import has_fused_head, warning_setattr
from .logits import PromisedLogits, PromisingHead
from .stats import TokenStats, stats_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Model = TypeVar("_Model", bound=nn.Module)


class PatchOptions(GradientOptions, total=False):
    """Keywords of cce_patch, for type checkers."""

    train_only: bool
    label_smoothing: float
    scan: Scan
    stats: bool


@overload
def cce_patch(
    model_or_model_type: _Model,
    impl: str = ...,
    reduction: str = ...,
    **options: Unpack[PatchOptions],
) -> _Model: ...


@overload
def cce_patch(
    model_or_model_type: str | transformers.PretrainedConfig,
    impl: str = ...,
    reduction: str = ...,
    **options: Unpack[PatchOptions],
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
    *,
    label_smoothing: float = 0.0,
    scan: Scan = None,
    stats: bool = False,
) -> nn.Module | None:
    """Let a causal LM compute its loss by linear_cross_entropy: wherever it is given labels, and with logits None.

    A model of images and text, such as LLaVA, is one as well.

    Without labels the model is as it was, and says so once if it is in training. Softcap, logit scale and the bias of
    lm_head are the model's own; labels are int32 or int64 [B, T], -100 where a token does not count. Patch before
    accelerate, FSDP, DDP or torch.compile wrap the model; PEFT may come before or after. Patching again replaces the
    options. Trainers of TRL do not ask for a model's loss, and a patched model that is given to one warns:
    cce_ext.trl.patch is for them.

    Args:
        model_or_model_type: a model (or PEFT's wrapper of one), which alone is patched; or a model type such as "llama"
            or a config, for the class: all its models, those that exist already as well, unless a trainer of TRL has
            given one its fused lm_head before.
        impl: as in linear_cross_entropy.
        reduction: "mean" as in Transformers: the sum over num_items_in_batch where the Trainer gives it, else the mean
            over the tokens that count (NaN if there are none). "sum", and "none", which is [B, T - 1], or has
            shift_labels' shape, take no notice of num_items_in_batch.
        filter_eps: as in linear_cross_entropy.
        accum_e_fp32: likewise.
        accum_c_fp32: likewise.
        filter_e_grad: likewise.
        filter_c_grad: likewise.
        train_only: a model in eval mode computes logits and its own loss. The Trainer's compute_metrics needs them:
            otherwise it is given an empty tuple.
        label_smoothing: as in linear_cross_entropy, and instead of the Trainer's label_smoothing_factor, which takes
            the labels away from the model. A model with a softcap has none.
        scan: as in linear_cross_entropy, in training. Evaluation uses the 16-bit forward: where no gradient is computed
            (torch.no_grad, torch.inference_mode, nothing that requires one) scan is left out.
        stats: the model keeps its tokens' accuracy and entropy in model.cce_stats, a TokenStats, by the loss's own pass
            over the logits, in training and in evaluation. Not with a scan.

    Returns:
        The model, None for a type or a config.

    Raises:
        TypeError: neither a model of transformers nor a config nor a str.
        ValueError: an option, an unknown model type, or a model that cannot be served, with the reason, such as TRL's
            fused lm_head.
        NotImplementedError: where a loss is computed first. The forward does with its logits what is not known here, or
            lm_head is more than a linear layer.
    """
    options: dict[str, Any] = {
        "impl": impl,
        "reduction": reduction,
        "filter_eps": filter_eps,
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
        "label_smoothing": label_smoothing,
        "scan": scan,
    }
    if stats and scan is not None:
        raise ValueError(f"stats: expected False with scan={scan!r}, whose logits are rounded to 8 bits")
    Options(**options).check()
    options["train_only"] = train_only
    if stats:
        options["return_stats"] = RETURN_STATS
    if not isinstance(model_or_model_type, nn.Module):
        cls = _class_of(model_or_model_type)
        cls.forward, cls.__setattr__ = _patched_forward(cls, options), warning_setattr(cls)
        return None
    model = _inner_model(model_or_model_type)
    if has_fused_head(model.__dict__.get("forward")):
        raise ValueError(
            "model_or_model_type: this model has the fused lm_head of TRL, as TRL's trainers give it, which does not "
            "ask for the model's loss; call cce_ext.trl.patch() instead of cce_patch"
        )
    if "forward" in model.__dict__:
        raise ValueError(
            "model_or_model_type: this model's forward has been replaced already (as accelerate does); patch it before"
        )
    vars(model).pop("cce_stats", None)
    if stats:
        model.cce_stats = TokenStats()
    model.__class__ = _patched_class(_unpatched_class(type(model)), options)
    return model_or_model_type


cce_patch.supported = supported  # type: ignore[attr-defined]


def cce_unpatch(model_or_model_type: nn.Module | str | transformers.PretrainedConfig) -> None:
    """Undo cce_patch of the same model, or of the same model type.

    Raises:
        ValueError: what is not patched, or a model that was patched by itself and whose forward has been replaced
            since.
    """
    if isinstance(model_or_model_type, nn.Module):
        model = _inner_model(model_or_model_type)
        if "forward" in model.__dict__:
            raise ValueError(
                "model_or_model_type: this model's forward has been replaced since, as accelerate and "
                "Trainer(bf16=True) do, and still has the patch; call accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False) and `del model.forward` first"
            )
        cls = type(model)
        if _unpatched_class(cls) is cls:
            raise ValueError(f"model_or_model_type: this {cls.__name__} was not patched by itself, or is wrapped since")
        model.__class__ = _unpatched_class(cls)
        vars(model).pop("cce_stats", None)
        return
    cls = _class_of(model_or_model_type)
    original = getattr(cls.__dict__.get("forward"), "_cce_original", None)
    if original is None:
        raise ValueError(f"model_or_model_type: {cls.__name__} is not patched")
    cls.forward._cce_undone = True  # models whose forward accelerate has replaced still call this one
    for name, own in (("forward", original), ("__setattr__", cls.__setattr__._cce_original)):
        delattr(cls, name)
        if getattr(cls, name) is not own:  # it was not inherited
            setattr(cls, name, own)


def _class_of(model_type: str | transformers.PretrainedConfig) -> Any:
    """The causal LM class, or that of images and text, of a model type or of a config."""
    if isinstance(model_type, transformers.PretrainedConfig):
        model_type = model_type.model_type
    if not isinstance(model_type, str):
        raise TypeError(
            f"model_or_model_type: expected a model, a config or a model type, got {type(model_type).__name__}"
        )
    if model_type not in CLASSES:
        raise ValueError(
            f"model_or_model_type: transformers {transformers.__version__} has no causal LM of type {model_type!r}"
        )
    return getattr(transformers, CLASSES[model_type])


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
    patched = {
        "forward": _patched_forward(cls, options),
        "__setattr__": warning_setattr(cls),
        "__reduce_ex__": reduce,
        "_cce_unpatched_class": cls,
    }
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
    warned = False

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal warned
        labels = args[labels_at] if len(args) > labels_at else kwargs.get("labels")
        if forward._cce_undone:  # type: ignore[attr-defined]
            return original(self, *args, **kwargs)
        if labels is None or (train_only and not self.training):
            # Not in a graph, which would keep the question and break at the warning.
            if not torch.compiler.is_compiling() and self.training and torch.is_grad_enabled() and not warned:
                warned = True
                warnings.warn(_NO_LABELS.format(cls.__name__), stacklevel=2)
            return original(self, *args, **kwargs)
        if options["reduction"] == "none" and _adds_router_loss(self.config, kwargs):
            raise ValueError(
                "output_router_logits: the router's loss is one number, which reduction='none' has no place for; "
                "set it to False"
            )
        return _without_logits(original(_View(self, options), *args, **kwargs))

    forward._cce_original = original  # type: ignore[attr-defined]
    forward._cce_undone = False  # type: ignore[attr-defined]
    return forward


_NO_LABELS = (
    "cce_patch: {} is in training and was given no labels, so that it computes its logits, and no loss of cce_ext's. "
    "transformers.Trainer takes the labels away where it has label_smoothing_factor or compute_loss_func: give "
    "cce_patch label_smoothing instead of the one, leave the other out, or undo the patch by cce_unpatch where that is "
    "what you want"
)


def _adds_router_loss(config: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_router_logits")
    if asked is None:  # a model of images and text has it in the latter's config
        asked = any(getattr(x, "output_router_logits", False) for x in (config, config.get_text_config()))
    return bool(asked)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(x for x in output if not isinstance(x, PromisedLogits))
    return type(output)(**{name: x for name, x in output.items() if not isinstance(x, PromisedLogits)})


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
        return PromisingHead(value, type(self._cce_model).__name__) if value is self._cce_head else value

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
        if not isinstance(logits, PromisedLogits):
            raise NotImplementedError(
                f"{family} cannot be served by cce_patch: its logits do not come from lm_head, which is what "
                "get_output_embeddings() gives"
            )
        targets = shift_labels
        if targets is None:
            assert labels is not None  # the loss of labels is what a forward is here for
            targets = next_tokens(labels, ignore_index)
        targets = targets.to(logits.device)
        options = {**self._cce_options, "ignore_index": ignore_index}
        if num_items_in_batch is not None and options["reduction"] == "mean":
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(logits.device)
            return self._loss(logits, targets, {**options, "reduction": "sum"}) / num_items_in_batch
        loss = self._loss(logits, targets, options)
        return loss[..., :-1] if options["reduction"] == "none" and shift_labels is None else loss

    def _loss(self, logits: PromisedLogits, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """What it has besides is kept."""
        found = logits.cross_entropy(targets, **options)
        if isinstance(found, Tensor):
            return found
        model = self._cce_model
        stats_of(model).add(found, targets != options["ignore_index"], model.training)
        return found.loss
