"""Tiny random models of every family, tower and decoder, and processors that fit them.

Sizes are awkward on purpose: heads that are wider than hidden / heads, grouped queries, and an
intermediate size that is no power of two. Nothing is downloaded.
"""

import torch
from tiny_models import CHAT_TEMPLATE, VOCABULARY, randomize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

__all__ = ["DECODERS", "FAMILIES", "TOWERS", "tiny_family", "tiny_family_processor"]

SPECIAL = ("<video>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
WORDS = (*VOCABULARY, *SPECIAL)
IMAGE_SIZE, PATCH_SIZE = 32, 8
GRID = [[32, 64], [64, 32]]


# Transformers 5.24.0 asks the answer of Llama 4's decoder for a field that it does not have.
if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    MoeCausalLMOutputWithPast.image_outputs = None


# The real classes of these two need torchvision.
class _PixtralProcessor(LlavaProcessor):
    """A placeholder per patch, a break after every row, as PixtralProcessor writes them."""

    side = 1  # patches that are merged, in each direction

    def replace_image_token(self, image_inputs, image_idx, **_):
        edge = PATCH_SIZE * self.side
        height, width = (int(size) // edge for size in image_inputs["image_sizes"][image_idx])
        row = self.image_token * width
        return "[IMG_BREAK]".join([row] * height) + "[IMG_END]"


class _MergingProcessor(LlavaProcessor):
    """A placeholder for `merged` patches; Idefics' pictures have one more dimension."""

    merged, stacked = 4, False

    def replace_image_token(self, image_inputs, image_idx, **_):
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * (height * width // PATCH_SIZE**2 // self.merged)

    def __call__(self, *args, **kwargs):
        inputs = super().__call__(*args, **kwargs)
        if self.stacked and "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"][:, None]
        return inputs


class _WithoutVideos:
    """A processor of videos needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is not None:
            return super().check_argument_for_proper_class(argument_name, argument)
        return None


class _OnevisionProcessor(_WithoutVideos, LlavaOnevisionProcessor):
    pass


class _Qwen2VLProcessor(_WithoutVideos, Qwen2VLProcessor):
    pass


class _Qwen25VLProcessor(_WithoutVideos, Qwen2_5_VLProcessor):
    pass


class _Qwen3VLProcessor(_WithoutVideos, Qwen3VLProcessor):
    pass


_QWEN_PROCESSORS = {
    "qwen2_vl": _Qwen2VLProcessor,
    "qwen2_5_vl": _Qwen25VLProcessor,
    "qwen3_vl": _Qwen3VLProcessor,
    "qwen3_vl_moe": _Qwen3VLProcessor,
    "qwen3_5": _Qwen3VLProcessor,
}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_QWEN_VISION = {
    "hidden_size": 40,
    "intermediate_size": 44,
    "depth": 3,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
}
TOWERS = {
    "clip": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
    "siglip": _VISION | {"model_type": "siglip_vision_model"},
    "pixtral": _VISION | {"model_type": "pixtral", "head_dim": 16},
    "idefics3": _VISION | {"model_type": "idefics3_vision"},
    "smolvlm": _VISION | {"model_type": "smolvlm_vision"},
    "internvl": _VISION
    | {"model_type": "internvl_vision", "use_qk_norm": True, "norm_type": "rms_norm"},
    "llama4": _VISION
    | {
        "model_type": "llama4_vision_model",
        "intermediate_size": 4 * 32,  # Transformers takes it for the width of merged patches too
        "projector_input_dim": 40,
        "projector_output_dim": 40,
        "vision_output_dim": 40,
    },
    "qwen2_vl": _QWEN_VISION
    | {"model_type": "qwen2_vl_vision", "embed_dim": 40, "hidden_size": 48, "mlp_ratio": 3},
    "qwen2_5_vl": _QWEN_VISION
    | {"model_type": "qwen2_5_vl_vision", "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": _QWEN_VISION
    | {"model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe": _QWEN_VISION
    | {"model_type": "qwen3_vl_moe_vision", "deepstack_visual_indexes": [0, 1]},
    "qwen3_5": _QWEN_VISION | {"model_type": "qwen3_5_vision"},
}


def _rope(*sections):
    """Sections of a head's channels by time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}


_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": WORDS.index("<s>"),
    "eos_token_id": WORDS.index("</s>"),
    "pad_token_id": WORDS.index("<pad>"),
    "tie_word_embeddings": False,
}
DECODERS = {
    "llama": _TEXT | {"model_type": "llama"},
    "mistral": _TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "qwen2": _TEXT | {"model_type": "qwen2"},
    "qwen3": _TEXT | {"model_type": "qwen3", "head_dim": 16},
    "gemma": _TEXT | {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": _TEXT | {"model_type": "gemma2", "head_dim": 16, "tie_word_embeddings": True},
    "phi3": _TEXT | {"model_type": "phi3"},
    "phi": _TEXT | {"model_type": "phi"},
}
# Decoders of one family: mixtures of experts, and those whose positions have three dimensions.
OWN_DECODERS = {
    "llama4": _TEXT
    | {
        "model_type": "llama4_text",
        "head_dim": 16,
        "intermediate_size": 40,
        "intermediate_size_mlp": 56,
        "num_hidden_layers": 3,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "num_local_experts": 4,
    },
    "qwen2_vl": _TEXT | {"model_type": "qwen2_vl_text", "rope_parameters": _rope(2, 2, 2)},
    "qwen2_5_vl": _TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": _rope(2, 2, 2)},
    "qwen3_vl": _TEXT
    | {
        "model_type": "qwen3_vl_text",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "rope_parameters": _rope(4, 2, 2),
    },
    "qwen3_vl_moe": _TEXT
    | {
        "model_type": "qwen3_vl_moe_text",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "rope_parameters": _rope(4, 2, 2),
    },
    "qwen3_5": _TEXT
    | {
        "model_type": "qwen3_5_text",
        "head_dim": 32,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "rope_parameters": _rope(2, 1, 1) | {"partial_rotary_factor": 0.25},
    },
}
_QWEN = {"vision_feature_layer": -1}
FAMILIES = {
    "deepseek_vl": {},
    "idefics3": {"scale_factor": 2},
    "internvl": {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
    "llama4": {"vision_feature_layer": -1},
    "mistral3": {"vision_feature_layer": -1, "spatial_merge_size": 2},
    "paligemma": {"projection_dim": 48, "hidden_size": 48, "vocab_size": 128},
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "smolvlm": {"scale_factor": 2},
    "llava": {"image_seq_length": 16},
    "llava_next": {"image_grid_pinpoints": GRID},
    "llava_next_video": {"image_grid_pinpoints": GRID},
    "llava_onevision": {"image_grid_pinpoints": GRID, "vision_feature_layer": -1},
    "video_llava": {"image_seq_length": 16, "video_seq_length": 136},
    # earlier versions of Transformers know it by its second name
    "vipllava": {name: [-2, -1, 1] for name in ("vision_feature_layer", "vision_feature_layers")},
}


def tiny_family(family="llava", tower="clip", decoder="llama", seed=0, **options):
    """The model, in eval mode; `options` are fields of its configuration."""
    text = (DECODERS | OWN_DECODERS)[decoder]
    fields = {
        "vision_config": TOWERS[tower] | ({"projection_dim": 48} if family == "paligemma" else {}),
        "text_config": text,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": _strategy(tower),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "video_token_id": WORDS.index("<video>"),
        **FAMILIES[family],
        **options,
    }
    name = "image_token_index" if family == "paligemma" else "image_token_id"
    config = AutoConfig.for_model(family, **{name: WORDS.index(_image(tower))}, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        randomize(model)
    return model.eval()


def tiny_family_processor(family="llava", tower="clip"):
    """A processor for the model: the family's own, where nothing but torchvision hinders."""
    image, sizes = _image(tower), {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    common = {
        "tokenizer": _tokenizer(image),
        "chat_template": CHAT_TEMPLATE.replace("<image>", image),
        "image_token": image,
    }
    if tower == "pixtral":
        edge = PATCH_SIZE * (2 if family == "mistral3" else 1)
        pixels = PixtralImageProcessorPil(size={"longest_edge": IMAGE_SIZE}, patch_size=edge)
        processor = _PixtralProcessor(image_processor=pixels, patch_size=PATCH_SIZE, **common)
        processor.side = edge // PATCH_SIZE
        return processor
    if family in _QWEN_PROCESSORS:
        edges = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": 4 * IMAGE_SIZE**2}
        pixels = Qwen2VLImageProcessorPil(size=edges, patch_size=PATCH_SIZE)
        del common["image_token"]  # the tokenizer's
        # positions are counted anew for every run of picture tokens
        common["chat_template"] = CHAT_TEMPLATE.replace(image, f"{image}[IMG_END]")
        return _QWEN_PROCESSORS[family](image_processor=pixels, **common)
    common["vision_feature_select_strategy"] = _strategy(tower)
    if family == "llava_onevision":
        pixels = LlavaOnevisionImageProcessorPil(size=sizes, image_grid_pinpoints=GRID)
        return _OnevisionProcessor(image_processor=pixels, num_image_tokens=16, **common)
    common |= {
        "patch_size": PATCH_SIZE,
        "num_additional_image_tokens": int(tower == "clip"),
    }
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": sizes}
    if family in ("llava_next", "llava_next_video"):
        pixels = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=GRID)
        return LlavaNextProcessor(image_processor=pixels, **common)
    pixels = CLIPImageProcessorPil(**size)
    if family in ("idefics3", "smolvlm", "internvl", "llama4"):
        processor = _MergingProcessor(image_processor=pixels, **common)
        processor.stacked = family in ("idefics3", "smolvlm")
        return processor
    return LlavaProcessor(image_processor=pixels, **common)


def _image(tower):
    return "[IMG]" if tower == "pixtral" else "<image>"


def _strategy(tower):
    return "default" if tower == "clip" else "full"


def _tokenizer(image):
    words = Tokenizer(
        WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", *SPECIAL],
        extra_special_tokens={"image_token": image, "video_token": "<video>"},
        padding_side="left",
    )
