"""The families that supported() names: those that the tests compare with unpatched models, each of them."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# tests/test_transformers.py is run for each: loss and gradients are those of the unpatched model.
TESTED = (
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


def supported() -> tuple[str, ...]:
    """The model types of the installed transformers that are tested, sorted.

    Others are served as well, unless cce_patch or the first loss refuses them.
    """
    return tuple(name for name in TESTED if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
