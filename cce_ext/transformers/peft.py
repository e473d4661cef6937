"""An lm_head under PEFT (LoRA: Hu et al., 2021), as one linear classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# e [.., D], c [V, D] and bias [V] or None.
Classifier = tuple[Tensor, Tensor, Tensor | None]


def peft_classifier(
    head: Any, hidden: Tensor, linear_classifier: Callable[[nn.Module, Tensor], Classifier]
) -> Classifier:
    """logits.linear_classifier of an lm_head that PEFT has wrapped. It is given, for what is in the wrapper.

    LoRA is a wider product, [e, s e A^T] @ [c, B]^T, with a copy of c. A head that PEFT trains whole is taken from it.

    Raises NotImplementedError for any other adapter.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if type(head) is ModulesToSaveWrapper:
        adapters = [] if head.disable_adapters else head.active_adapters
        saved = bool(adapters) and all(adapter in head.modules_to_save for adapter in adapters)
        return linear_classifier(head.modules_to_save[adapters[0]] if saved else head.original_module, hidden)
    if type(head) is not LoraLinear:
        name = f"{type(head).__module__}.{type(head).__qualname__}"
        raise NotImplementedError(f"lm_head: PEFT's {name} cannot be served by cce_patch, only its plain LoRA")
    if head.disable_adapters and head.merged:
        head.unmerge()
    e, c, bias = linear_classifier(head.base_layer, hidden)
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
