"""Models by name, as shapes without weights: enough to size, plan and benchmark them."""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

__all__ = ["SHAPES", "shape_config"]


# Transformers' defaults are Vicuna-7B's sizes.
_LANGUAGE: dict[str, dict[str, Any]] = {
    # TinyLlama-1.1B
    "demo-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
    },
    "llava-1.5-7b": {},
    "llava-1.5-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
SHAPES = tuple(_LANGUAGE)


def shape_config(name: str) -> LlavaConfig:
    """The configuration behind a name: LLaVA-1.5 as llava-hf publishes it.

    CLIP ViT-L/14 at 336 pixels and a Llama with its vocabulary padded to 32064.

    Raises:
        ValueError: no such name.
    """
    if name not in _LANGUAGE:
        raise ValueError(f"shape {name!r} is unknown: this version has {', '.join(SHAPES)}.")
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    language = LlamaConfig(
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=32001,
        **_LANGUAGE[name],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
