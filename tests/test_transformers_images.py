"""cce_ext.transformers of models of images and text: tiny random ones, given an image."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from support.models import TINY, all_random, batch, compare  # noqa: E402

from cce_ext.transformers import cce_patch, cce_unpatch, supported  # noqa: E402
from cce_ext.transformers.families import WITH_IMAGES  # noqa: E402

IMAGE = 20  # the token that an image's features take the place of
SIDE, PATCH = 16, 8

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
}
# Of Qwen-VL and GLM-V, which cut images of any size into patches, and join four of them to a token.
PATCHES_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "window_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "mlp_ratio": 2,
    "image_size": 32,
}
# Positions of three axes; transformers 4 has the one name, 5 the other.
AXES = {"rope_type": "default", "mrope_section": [1, 1, 2]}
THREE_AXES = {"rope_parameters": {**AXES, "rope_theta": 10000.0}, "rope_scaling": {**AXES, "type": "default"}}


@dataclass(frozen=True)
class Family:
    """vision, text, more: of the config. tokens: an image's. pixels: their shape. inputs: what comes with them."""

    vision: dict[str, Any]
    tokens: int
    pixels: tuple[int, ...] = (1, 3, SIDE, SIDE)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def clip(**options) -> Family:
    return Family({"model_type": "clip_vision_model", **VISION}, **options)


def siglip(**options) -> Family:
    return Family({"model_type": "siglip_vision_model", **VISION}, **options)


def patches(**vision) -> Family:
    return Family(
        {**PATCHES_VISION, **vision},
        tokens=4,
        pixels=(16, 3 * 2 * PATCH**2),
        inputs={"image_grid_thw": torch.tensor([[1, 4, 4]])},
        text=THREE_AXES,
    )


SIZES = {"image_sizes": torch.tensor([[SIDE, SIDE]])}
FAMILIES = {
    "aya_vision": siglip(tokens=1, more={"downsample_factor": 2, "vision_feature_select_strategy": "full"}),
    "gemma3": siglip(tokens=4, more={"mm_tokens_per_image": 4}),
    "glm4v": patches(),
    "idefics3": Family(VISION, tokens=1, pixels=(1, 1, 3, SIDE, SIDE), more={"scale_factor": 2}),
    "internvl": Family({**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}, tokens=1),
    "llava": clip(tokens=4),
    # The whole image and its one tile, whose two rows end in a token each.
    "llava_next": clip(
        tokens=10, pixels=(1, 2, 3, SIDE, SIDE), inputs=SIZES, more={"image_grid_pinpoints": [[SIDE, SIDE]]}
    ),
    "mistral3": Family(
        {"model_type": "pixtral", **VISION, "image_size": 32, "head_dim": 8},
        tokens=4,
        pixels=(1, 3, 32, 32),
        inputs={"image_sizes": torch.tensor([[32, 32]])},
        more={"spatial_merge_size": 2},
    ),
    "paligemma": siglip(tokens=4, more={"projection_dim": 32, "hidden_size": 32}),
    "qwen2_5_vl": patches(),
    "qwen2_vl": patches(hidden_size=32),
    "qwen3_vl": patches(),
    "qwen3_vl_moe": patches(),
}


def tiny_with_images(model_type: str) -> transformers.PreTrainedModel:
    family = FAMILIES[model_type]
    known = transformers.AutoConfig.for_model(model_type).get_text_config()
    text = {name: x for name, x in TINY.items() if hasattr(known, name)}
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config={"model_type": known.model_type, **text, **copy.deepcopy(family.text)},  # which some change
        vision_config=family.vision,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        **family.more,
    )
    torch.manual_seed(0)
    return all_random(transformers.AutoModelForImageTextToText.from_config(config).eval())


def image_batch(model_type: str) -> dict[str, torch.Tensor]:
    """One image and its text, which alone has labels."""
    family = FAMILIES[model_type]
    tokens = batch(1, 16)["input_ids"].clamp(min=IMAGE + 10)
    tokens[:, 2 : 2 + family.tokens] = IMAGE
    is_image = tokens == IMAGE
    inputs = {"input_ids": tokens, "labels": tokens.masked_fill(is_image, -100), **family.inputs}
    inputs["attention_mask"] = torch.ones_like(tokens)
    inputs["pixel_values"] = torch.randn(family.pixels, generator=torch.Generator().manual_seed(0))
    if model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = is_image.long()
    if "image_grid_thw" in inputs and int(transformers.__version__.split(".")[0]) >= 5:
        inputs["mm_token_type_ids"] = is_image.long()
    return inputs


def test_all_families_are_here():
    assert set(WITH_IMAGES) <= FAMILIES.keys() and set(supported()) & FAMILIES.keys()


@pytest.mark.parametrize("model_type", [x for x in WITH_IMAGES if x in supported()])
def test_family(model_type):
    model, inputs = tiny_with_images(model_type), image_batch(model_type)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert model(**other).loss != model(**inputs).loss  # the image is seen
    compare(model, **inputs)
    assert model(**inputs).logits is None
    del inputs["labels"]
    assert model(**inputs).logits is not None


def test_a_model_type():
    model, inputs = tiny_with_images("llava"), image_batch("llava")
    for which in ("llava", model.config):
        cce_patch(which)
        try:
            assert model(**inputs).logits is None
        finally:
            cce_unpatch(which)
        assert model(**inputs).logits is not None


def test_the_router_loss_of_the_text():
    """Its switch is in the config of the text."""
    model, inputs = tiny_with_images("qwen3_vl_moe"), image_batch("qwen3_vl_moe")
    model.config.text_config.output_router_logits = True
    cce_patch(model, reduction="none")
    with pytest.raises(ValueError, match="output_router_logits: .* reduction='none'"):
        model(**inputs)
    model.config.text_config.output_router_logits = False
    assert model(**inputs).loss.shape == (1, 15)


def test_logits_of_another_model_are_refused():
    """BLIP-2's come from a whole language model within it."""
    text = {"model_type": "opt", **{name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}}
    text |= {"num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**VISION, "encoder_hidden_size": 16},
        text_config=text,
        image_token_index=IMAGE,
        num_query_tokens=4,
    )
    model, inputs = transformers.Blip2ForConditionalGeneration(config), image_batch("llava")
    assert model(**inputs).loss.isfinite()
    with pytest.raises((NotImplementedError, ValueError), match="Blip2ForConditionalGeneration cannot be served"):
        cce_patch(model)(**inputs)
