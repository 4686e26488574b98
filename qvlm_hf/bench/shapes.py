"""Models by name, as shapes without weights: enough to size, plan and benchmark them."""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2VLConfig

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
    "llava-34b": {
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
    },
}
_QWEN = "qwen2-vl-72b"
SHAPES = (*_LANGUAGE, _QWEN)


def shape_config(name: str) -> Any:
    """The configuration behind a name: LLaVA-1.5 as llava-hf publishes it, or Qwen2-VL.

    LLaVA: CLIP ViT-L/14 at 336 pixels and a Llama with its vocabulary padded to 32064. One of 34
    billion weights has the decoder of Yi-34B (arXiv 2403.04652, table 2), as LLaVA-1.6 does.
    Qwen2-VL-72B: the decoder of Qwen2-72B (arXiv 2407.10671, table 1) and the 675M encoder of all
    sizes (arXiv 2409.12191).

    Raises:
        ValueError: no such name.
    """
    if name == _QWEN:
        return _qwen2_vl_72b()
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
        **{"vocab_size": 32064, "max_position_embeddings": 4096} | _LANGUAGE[name],
        rms_norm_eps=1e-5,
        pad_token_id=32001,
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


def _qwen2_vl_72b() -> Qwen2VLConfig:
    language = {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 8192}
    return Qwen2VLConfig(text_config=language, vision_config=vision, tie_word_embeddings=False)
