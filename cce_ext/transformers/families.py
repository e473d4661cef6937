"""The families that supported() names: those that the tests compare with unpatched models, each of them."""

from __future__ import annotations

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

# Model types with the names of their classes.
CLASSES: dict[str, str] = {**MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}

# tests/test_transformers.py is run for each: loss and gradients are those of the unpatched model.
TESTED = (
    "apertus",
    "arcee",
    "bitnet",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "jetmoe",
    "lfm2",
    "llama",
    "llama4_text",
    "minimax",
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

# tests/test_transformers_images.py likewise.
WITH_IMAGES = (
    "aya_vision",
    "glm4v",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    # Before that its forward has its own cross-entropy, and is refused.
    *(("gemma3",) if int(transformers.__version__.split(".")[0]) >= 5 else ()),
)


def supported() -> tuple[str, ...]:
    """The model types of the installed transformers that are tested, sorted.

    Others are served as well, unless cce_patch or the first loss refuses them.
    """
    return tuple(sorted(name for name in (*TESTED, *WITH_IMAGES) if name in CLASSES))
