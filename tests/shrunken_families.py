"""A tiny random model of any image-text-to-text family: its own configuration with small sizes.

`tiny_model("qwen2_vl")` takes the family's default configuration, shrinks every size in it by the
name of the field, and builds the model with random weights. `_SPECIAL` holds what the names do not
tell. Nothing is downloaded; two calls with the same arguments give equal tensors.
"""

import re

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

__all__ = ["FAMILIES", "tiny_config", "tiny_model"]

FAMILIES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
WIDTH, HEADS, VOCABULARY, LAYERS = 64, 4, 512, 2
HEAD_WIDTH = WIDTH // HEADS
_FIRST_TOKEN = 400  # special tokens with ids outside the small vocabulary come to lie behind this

# field (a full match) -> value; the first that matches counts
_SIZES = (
    (r"vocab_size|unpadded_vocab_size|vocab_size_per_layer_input|text_vocab_size", VOCABULARY),
    (r"swa_num_attention_heads|num_sliding_attention_heads|linear_num_value_heads", HEADS),
    (r"linear_num_key_heads|(swa_)?num_(key_value|kv|global_key_value)_heads", 2),
    (r"(\w*_)?(num_)?(attention_)?(heads|n_heads)|n_head|num_(attention_)?heads", HEADS),
    (r"(attention_|swa_|resampler_|linear_(key_|value_)?|v_|global_)?head_dim|d_kv", HEAD_WIDTH),
    (r"(\w*_)?(num_(hidden_)?layers|n_layers|depth|num_(en|de)coder_layers)", LAYERS),
    (r"layers|encoder_layers|decoder_layers|num_global_layers|num_query_layers", LAYERS),
    (r"(\w*_)?moe_intermediate_size|moe_shared_expert_intermediate_size", 48),
    (r"(\w*_)?(intermediate_size(_mlp)?|ffn_dim|d_ff|mlp_dim|share_expert_dim)", 96),
    (r"(\w*_)?(num_experts|num_local_experts|n_routed_experts)", 4),
    (r"num_experts_per_tok|moe_topk|moe_k", 2),
    (r"n_group|topk_group|num_local_blocks", 1),
    (r"(\w*_)?(hidden_size|hidden_dim|d_model|projection_dim|embed_dim|pooler_output_size)", WIDTH),
    (r"(\w*_)?(input_dim|output_dim|output_size)|word_embed_proj_dim", WIDTH),
    (r"q_lora_rank|kv_lora_rank", 32),
    (r"qk_nope_head_dim|qk_rope_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"image_size|max_image_size|min_image_size|max_img_size|resolution", 32),
    (r"patch_size", 8),
    (r"base_channels", 32),
    (r"n_groups", 2),
    (r"codebook_size|num_embeddings", 64),
    (r"latent_channels", WIDTH),
    (r"num_codebooks|image_seq_len|image_seq_length|num_image_tokens", 16),
    (r"max_position_embeddings|max_source_positions|original_max_position_embeddings", 512),
    (r"sliding_window(_size)?|attention_chunk_size", 64),
)
_LETTERS = "ABCDEFGHIJ"
_PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_OMNI = {"vision_start_token_id": 470, "vision_end_token_id": 471, "audio_start_token_id": 472}
_SAM = {"sam_config": {"downsample_channels": [48, WIDTH], "global_attn_indexes": [1]}}
_GEMMA = {"mm_tokens_per_image": 4}
_SMALL_VQ = {"num_res_blocks": 1, "channel_multiplier": [1, 2], "attn_resolutions": [16]}
_APERTUS = {"image_token_offset": 300, "audio_token_offset": 364}
_PATCHES = {"vision_config": {"patch_embed_hidden_size": 768}}
_CHAMELEON = {"<image>": 450}
_CHAMELEON |= {f"IMGIMG{''.join(_LETTERS[int(d)] for d in str(i))}Z": 300 + i for i in range(64)}
_EMU = {"<image>": 450, "<|extra_200|>": 451}
_EMU |= {f"<|visual token {i:06}|>": 300 + i for i in range(64)}
_COMPASS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_HUNYUAN = {"head_dim": HEAD_WIDTH, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 16, "compress_ratio": 4}
_LAST_TWO = [-1, -2]
_IDS = "minicpmv4_6 minicpmv4_7 minicpm_ocr nemotron_h_omni"
# what the names do not tell: family -> changes
_SPECIAL: dict[str, dict] = {
    **{family: {"image_token_id": 450} for family in _IDS.split()},
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "apertus1p5": _APERTUS | {"audio_config": {"codebook_dim": WIDTH}, "vision_config": _SMALL_VQ},
    "chameleon": {
        "vocabulary_map": _CHAMELEON,
        "vq_config": _SMALL_VQ | {"num_embeddings": 64, "embed_dim": WIDTH},
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _COMPASS}}},
    "unlimited_ocr": {"vision_config": _SAM},
    "deepseek_ocr2": {"vision_config": _SAM, "text_config": _SPARSE},
    "emu3": {"vocabulary_map": _EMU, "vq_config": _SMALL_VQ | {"codebook_size": 64}},
    "gemma3": _GEMMA,
    "shieldgemma2": _GEMMA,
    "blip-2": {"image_token_id": 450, "image_token_index": 450},
    "instructblip": {"image_token_id": 450, "image_token_index": 450},
    "instructblipvideo": {"video_token_id": 450, "video_token_index": 450},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [1]}},
    "kosmos-2.5": _PATCHES,
    "pix2struct": _PATCHES,
    "llama4": {"vision_config": {"intermediate_size": 4 * WIDTH}},
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 3 * WIDTH},
        "text_config": {"cross_attention_layers": [1]},
    },
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_omni_moe_thinker": _OMNI,
    "granite4_vision": _PINPOINTS
    | {"downsample_rate": "2/4", "deepstack_layer_map": [[-2, 0], [-1, 1]]},
    "hunyuan_vl": {"text_config": _HUNYUAN},
    "llava_next": _PINPOINTS,
    "llava_next_video": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "molmo2": {"adapter_config": {"vision_feature_layer": _LAST_TWO}},
    "muse_spark": {"out_hidden_size": 4 * WIDTH, "audio_config": {"num_hidden_layers": 4}},
    "qwen4_exp": {"text_config": {f"indexer_{name}": size for name, size in _INDEXER.items()}},
    "step3p7": {"text_config": {"sliding_window": 64}},
    "vipllava": {"vision_feature_layers": _LAST_TWO, "vision_feature_layer": _LAST_TWO},
}
# parts that the default configuration lacks: family -> field -> model_type of the part
_PARTS = {
    "gemma4": {"vision_config": "gemma4_vision"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision"},
    "diffusion_gemma": {"vision_config": "gemma4_vision"},
}
# sections of the rotary embedding where the default of the model class is larger than a head
_MROPE = {
    (2, 3, 3): (
        "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v", "glmga", "glm_ocr",
        "paddleocr_vl", "qwen3_omni_moe_thinker", "lfm3_vl",
    ),
    (1, 1, 2): ("glm4v_moe", "hy_v4_vl"),
    (3, 3, 2): ("ernie4_5_vl_moe",),
}  # fmt: skip


def tiny_config(family: str) -> transformers.PreTrainedConfig:
    """The family's configuration, small; `family` is a model_type."""
    kind = CONFIG_MAPPING[family]
    parts = {
        field: CONFIG_MAPPING[part]().to_dict() for field, part in _PARTS.get(family, {}).items()
    }
    fields = _shrunk(kind().to_dict() | parts, {})
    for sections, families in _MROPE.items():
        if family in families:
            _merge(fields, {"text_config": {"rope_parameters": {"mrope_section": list(sections)}}})
    _merge(fields, _SPECIAL.get(family, {}))
    return kind.from_dict(fields)


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """The family's image-text-to-text model with random weights, in eval mode on the CPU."""
    kind = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    config = tiny_config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def _shrunk(fields: dict, tokens: dict[int, int]) -> dict:
    """The fields of a configuration with small sizes; `tokens` maps the ids of special tokens."""
    small = {}
    for name, value in fields.items():
        if isinstance(value, dict) and name != "id2label":
            small[name] = _shrunk(value, tokens)
        elif (
            isinstance(name, str)
            and re.fullmatch(r"\w*token(s|_ids?|_index)|\w*_id", name)
            and name != "model_type"
        ):
            small[name] = _token(value, tokens)
        else:
            small[name] = _size(name, value)
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if fields.get("qk_rope_head_dim") and fields.get("head_dim"):
        small["head_dim"] = (
            fields["head_dim"] * small["qk_rope_head_dim"] // fields["qk_rope_head_dim"]
        )
    _shorten_lists(small)
    return small


def _token(value, tokens: dict[int, int]):
    if isinstance(value, list):
        return [_token(one, tokens) for one in value]
    if isinstance(value, bool) or not isinstance(value, int) or value < _FIRST_TOKEN:
        return value
    return tokens.setdefault(value, _FIRST_TOKEN + len(tokens))


def _size(name: str, value):
    if type(value) is not int or value == 0 or not isinstance(name, str):
        return value
    size = next((size for names, size in _SIZES if re.fullmatch(names, name)), value)
    return size if value > 0 else value


def _shorten_lists(fields: dict) -> None:
    """Lists with an entry a layer: one of every kind is kept, the number of layers follows."""
    kinds = fields.get("layer_types")
    count = LAYERS
    if isinstance(kinds, list) and kinds:
        first = [kind for i, kind in enumerate(kinds) if kinds.index(kind) == i]
        kept = first if len(first) >= LAYERS else (kinds[:1] * LAYERS)
        fields["layer_types"], count = kept, len(kept)
        for name in ("num_hidden_layers", "num_layers"):
            if name in fields:
                fields[name] = count
    for name, value in fields.items():
        if isinstance(value, list) and name != "layer_types" and len(value) > 8:
            fields[name] = value[:count]
    if "mrope_section" in fields:
        fields["mrope_section"] = [2, 3, 3]
    if isinstance(fields.get("per_layer_config"), dict):
        changes = {int(index): change for index, change in fields["per_layer_config"].items()}
        fields["per_layer_config"] = {i: changes[i] for i in sorted(changes) if i < count}


def _merge(fields: dict, changes: dict) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _merge(fields[name], value)
        else:
            fields[name] = value
