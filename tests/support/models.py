"""Tiny models of transformers, and the comparison of a patched one with itself unpatched."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from cce_ext.transformers import cce_patch

VOCAB = 173
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # GPT-2's names of the same
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "output_router_logits": True,
    # what comes between lm_head and the loss, strong enough to be seen
    "final_logit_softcapping": 0.7,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MORE = {
    "codegen": {"rotary_dim": 4, "n_inner": 48, "n_positions": 64},
    "deepseek_v3": LATENT_ATTENTION,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4, "n_inner": 48, "n_positions": 64},
}


def tiny(model_type: str = "llama", **more) -> transformers.PreTrainedModel:
    """In eval mode, so that nothing is dropped; every parameter is random, biases and norms as well."""
    known = transformers.AutoConfig.for_model(model_type)
    settings = {name: x for name, x in TINY.items() if hasattr(known, name)}
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **MORE.get(model_type, {}), **more})
    torch.manual_seed(0)
    return all_random(transformers.AutoModelForCausalLM.from_config(config).eval())


def all_random(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model, with every parameter moved: biases begin as zeros, norms as ones."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def batch(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (rows, length), generator=g)
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def loss_and_gradients(model: nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(patched, unpatched, rtol: float = 1e-5) -> None:
    """Of two loss_and_gradients: a gradient's error is measured by the largest entry of all of them."""
    (loss, gradients), (expected_loss, expected) = patched, unpatched
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=0.0, equal_nan=True)
    assert gradients.keys() == expected.keys()
    largest = max(x.abs().max().item() for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(gradients[name], x, rtol=0.0, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


def compare(model: nn.Module, *, rtol: float = 1e-5, **inputs) -> None:
    """What the model gives before and after it is patched."""
    inputs = inputs or batch()
    torch.manual_seed(1)
    unpatched = loss_and_gradients(model, **inputs)
    cce_patch(model, impl="cce_exact")
    torch.manual_seed(1)
    assert_same(loss_and_gradients(model, **inputs), unpatched, rtol)
