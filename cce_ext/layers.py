"""Layers for `kernels` and Transformers' kernelize, which put their forward in the place of a model's own.

kernels takes a class only if it has no constructor and no members but forward, has_backward and can_torch_compile, and
if its forward has as many parameters, and of the same kinds, as the one it replaces. So what forward needs is outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .api import module_loss

__all__ = ["CCEForCausalLMLoss"]

# Keywords of linear_cross_entropy that a call may give.
_GRADIENT_OPTIONS = ("impl", "filter_eps", "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad", "scan")

# What LigerForCausalLMLoss knows and this loss does not, with the values at which it changes nothing.
_UNKNOWN_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "lse_square_scale": (0, None),
    "reduction": ("mean", None),
    "return_predicted_tokens": (False, None),
    "return_token_accuracy": (False, None),
    "return_z_loss": (False, None),
    "softcap": (None,),  # final_logit_softcapping is its name here
    "use_token_scaling": (False, None),
}


def next_tokens(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [.., T] moved to the position that predicts them. Not shift=1, which has no room for one token alone."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


class CCEForCausalLMLoss(nn.Module):
    """The loss of a causal LM from its last hidden states: Transformers' ForCausalLMLoss without logits.

    For `LayerRepository(.., layer_name="CCEForCausalLMLoss")`. Its parameters are those of
    kernels-community/liger-kernels' LigerForCausalLMLossLayer.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        logits: None,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        hidden_states: Tensor | None = None,
        lm_head_weight: Tensor | None = None,
        lm_head_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean over the tokens that count, or their sum over num_items_in_batch.

        Args:
            logits: None. A model that has computed them has no use for this.
            labels: [B, T] int32 or int64 token numbers in [0, V) or ignore_index; the loss of position t is that of
                label t + 1. Not looked at where shift_labels is given.
            vocab_size: V, or None.
            num_items_in_batch: the tokens that count in all micro-batches of a step, on all ranks: a number, or a
                tensor with one element. None: the mean of this call's, NaN if there are none.
            ignore_index: the label of tokens that do not count.
            shift_labels: [B, T], of which the loss of position t is that of label t; or None.
            hidden_states: [B, T, D] of bf16, fp16, fp32 or fp64.
            lm_head_weight: [V, D] of the same dtype and device.
            lm_head_bias: [V] or None.
            kwargs: hidden_size (D), final_logit_softcapping (a number or None), and linear_cross_entropy's impl,
                filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad and scan, which is left out where
                no gradient is computed. Others are a model's own.

        Returns: a scalar, fp32 (fp64 for fp64 inputs).

        Raises:
            ValueError: logits are given, or hidden_states, lm_head_weight or both kinds of labels are missing, as from
                a version of Transformers whose models call their loss otherwise; vocab_size or hidden_size is not that
                of the tensors; an option of Liger's that this loss does not have. All that linear_cross_entropy raises.
        """
        if logits is not None:
            raise ValueError(
                f"logits: expected None, got {type(logits).__name__}: the version of transformers that this model is "
                "from computes logits and does not call a fused loss as CCEForCausalLMLoss is called; use cce_patch"
            )
        if hidden_states is None or lm_head_weight is None:
            missing = "hidden_states" if hidden_states is None else "lm_head_weight"
            raise ValueError(
                f"{missing}: expected a tensor, got None: the version of transformers that this model is from does not "
                "call a fused loss as CCEForCausalLMLoss is called; use cce_patch"
            )
        if labels is None and shift_labels is None:
            raise ValueError("labels: expected labels or shift_labels, got None for both")
        for name, value, expected in (
            ("vocab_size", vocab_size, lm_head_weight.shape[0]),
            ("hidden_size", kwargs.get("hidden_size"), hidden_states.shape[-1]),
        ):
            if value is not None and value != expected:
                raise ValueError(f"{name}: expected the tensors' {expected}, got {value}")
        for name, neutral in _UNKNOWN_OPTIONS.items():
            if name in kwargs and kwargs[name] not in neutral:
                raise ValueError(f"{name}: CCEForCausalLMLoss has no such option, got {kwargs[name]!r}")
        if shift_labels is None:
            assert labels is not None
            targets = next_tokens(labels, ignore_index)
        else:
            targets = shift_labels
        options = {name: kwargs[name] for name in _GRADIENT_OPTIONS if name in kwargs}
        loss: Tensor = module_loss(
            hidden_states,
            lm_head_weight,
            targets.to(hidden_states.device),
            lm_head_bias,
            ignore_index=ignore_index,
            softcap=kwargs.get("final_logit_softcapping"),
            reduction="mean" if num_items_in_batch is None else "sum",
            label_smoothing=kwargs.get("label_smoothing") or 0.0,
            weight=kwargs.get("ce_weight"),
            **options,
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
