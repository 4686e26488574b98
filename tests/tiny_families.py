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
    DeepseekVLHybridImageProcessorPil,
    DeepseekVLHybridProcessor,
    Exaone4_5_Processor,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Glm46VImageProcessorPil,
    Glm46VProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MllamaImageProcessorPil,
    MllamaProcessor,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    Siglip2ImageProcessorPil,
    VideoLlama3ImageProcessorPil,
    VideoLlama3Processor,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

__all__ = [
    "DECODERS",
    "FAMILIES",
    "GRID",
    "TOWERS",
    "WORDS",
    "family_tokenizer",
    "tiny_family",
    "tiny_family_processor",
]

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


class _EvenPictures(Siglip2ImageProcessorPil):
    """An even number of patches in each direction, as the real class, which needs torchvision."""

    def resize(self, image, size, **options):
        edges = {
            name: max(1, getattr(size, name) // (2 * PATCH_SIZE)) * 2 * PATCH_SIZE
            for name in ("height", "width")
        }
        return super().resize(image, size=type(size)(**edges), **options)


class _NaflexProcessor(LlavaProcessor):
    """Pictures of their own proportions, four patches in one."""

    def replace_image_token(self, image_inputs, image_idx, **_):
        height, width = (int(size) // 2 for size in image_inputs["spatial_shapes"][image_idx])
        return self.image_token * (height * width)


class _GemmaProcessor(_MergingProcessor):
    """Tells the tokens of pictures, which see each other."""

    def __call__(self, *args, **kwargs):
        inputs = super().__call__(*args, **kwargs)
        inputs["token_type_ids"] = (inputs["input_ids"] == self.image_token_id).long()
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


class _GlmLists(_WithoutVideos):
    """NumPy warns of tensors."""

    def create_mm_token_type_ids(self, input_ids):
        return super().create_mm_token_type_ids(
            [torch.as_tensor(row).tolist() for row in input_ids]
        )


class _Exaone45Processor(_WithoutVideos, Exaone4_5_Processor):
    pass


class _Glm4vProcessor(_GlmLists, Glm4vProcessor):
    pass


class _Glm46VProcessor(_GlmLists, Glm46VProcessor):
    pass


class _VideoLlama3Processor(_WithoutVideos, VideoLlama3Processor):
    pass


# Pictures of any size, in one row.
_PACKING_PROCESSORS = {
    "exaone4_5": (_Exaone45Processor, Qwen2VLImageProcessorPil),
    "glm46v": (_Glm46VProcessor, Glm46VImageProcessorPil),
    "glm4v": (_Glm4vProcessor, Glm4vImageProcessorPil),
    "glm_ocr": (_Glm46VProcessor, Glm46VImageProcessorPil),
    "paddleocr_vl": (PaddleOCRVLProcessor, PaddleOCRVLImageProcessorPil),
    "qwen2_vl": (_Qwen2VLProcessor, Qwen2VLImageProcessorPil),
    "qwen2_5_vl": (_Qwen25VLProcessor, Qwen2VLImageProcessorPil),
    "qwen3_vl": (_Qwen3VLProcessor, Qwen2VLImageProcessorPil),
    "qwen3_vl_moe": (_Qwen3VLProcessor, Qwen2VLImageProcessorPil),
    "qwen3_5": (_Qwen3VLProcessor, Qwen2VLImageProcessorPil),
    "video_llama_3": (_VideoLlama3Processor, VideoLlama3ImageProcessorPil),
}


def _tower(model_type, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    return {"model_type": model_type, **sizes, **more}


def _qwen_tower(model_type, **more):
    sizes = {"hidden_size": 40, "intermediate_size": 44, "depth": 3, "num_heads": 2}
    sizes |= {"patch_size": PATCH_SIZE, "out_hidden_size": 48, "num_position_embeddings": 16}
    return {"model_type": model_type, **sizes, **more}


def _sam_tower(model_type, **more):
    return _tower(model_type, mlp_dim=40, global_attn_indexes=[1], **more)


_NORMS = {"use_qk_norm": True, "norm_type": "rms_norm"}
_LLAMA_4 = {"projector_input_dim": 40, "projector_output_dim": 40, "vision_output_dim": 40}
_TILES = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
_TILES |= {"num_global_layers": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 96}
_TABLE = {"vocab_size": 60, "num_visual_indicator_tokens": 5, "tokenize_function": "softmax"}
_WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
TOWERS = {
    "clip": _tower("clip_vision_model", projection_dim=32),
    "siglip": _tower("siglip_vision_model"),
    "pixtral": _tower("pixtral", head_dim=16),
    "idefics3": _tower("idefics3_vision"),
    "smolvlm": _tower("smolvlm_vision"),
    "internvl": _tower("internvl_vision", **_NORMS),
    # Transformers takes the inner width for that of merged patches too
    "llama4": _tower("llama4_vision_model", **_LLAMA_4) | {"intermediate_size": 4 * 32},
    "qianfan_ocr": _tower("qianfan_ocr_vision", use_qk_norm=True, drop_path_rate=0.1),
    "exaone4_5": _qwen_tower("exaone4_5_vision", num_key_value_heads=1, **_WINDOWS),
    "glm4v": _qwen_tower("glm4v_vision", image_size=IMAGE_SIZE),
    "glm_ocr": _qwen_tower("glm_ocr_vision", image_size=IMAGE_SIZE),
    "paddleocr_vl": _tower("paddleocr_vl_vision"),
    "video_llama_3": _tower("video_llama_3_vision"),
    "siglip2": _tower("siglip2_vision_model", num_patches=16),
    "mllama": _tower("mllama_vision_model", attention_heads=2, **_TILES),
    "janus": _tower("janus_vision_model", mlp_ratio=1.25, projection_dim=48),
    "ovis2": _tower("ovis2_vision", hidden_stride=2, **_TABLE),
    # These two stand for a timm tower: what they give has its shape.
    "sam": _sam_tower("sam_vision_model", output_channels=32, window_size=2),
    "timm_like": _tower("clip_vision_model", model_args={"embed_dim": 32}),
    "got_ocr2": _sam_tower("got_ocr2_vision", output_channels=24, window_size=3),
    "qwen2_vl": _qwen_tower("qwen2_vl_vision", embed_dim=40, mlp_ratio=3) | {"hidden_size": 48},
    "qwen2_5_vl": _qwen_tower("qwen2_5_vl_vision", **_WINDOWS),
    "qwen3_vl": _qwen_tower("qwen3_vl_vision", deepstack_visual_indexes=[0, 1]),
    "qwen3_vl_moe": _qwen_tower("qwen3_vl_moe_vision", deepstack_visual_indexes=[0, 1]),
    "qwen3_5": _qwen_tower("qwen3_5_vision"),
}


def _rope(*sections, share=None):
    """Sections of a head's channels by time, height and width; the share of them that is turned."""
    turned = {} if share is None else {"partial_rotary_factor": share}
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)} | turned


def _decoder(model_type, **more):
    sizes = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    sizes |= {"max_position_embeddings": 512, "tie_word_embeddings": False}
    tokens = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    ids = {name: WORDS.index(word) for name, word in tokens.items()}
    return {"model_type": model_type, **sizes, **ids, **more}


_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_TIED = {"tie_word_embeddings": True}
_MIXED = {"num_experts": 6, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
_LINEAR |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_EXPERTS = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "num_local_experts": 4}
DECODERS = {
    "llama": _decoder("llama"),
    "mistral": _decoder("mistral", head_dim=16, sliding_window=None),
    "qwen2": _decoder("qwen2"),
    "qwen3": _decoder("qwen3", head_dim=16),
    "gemma": _decoder("gemma", head_dim=16, **_TIED),
    "gemma2": _decoder("gemma2", head_dim=16, **_TIED),
    "gemma3": _decoder("gemma3_text", head_dim=16, **_TIED, **_LAYERS),
    "cohere2": _decoder("cohere2", **_TIED, **_LAYERS),
    "phi3": _decoder("phi3"),
    "phi": _decoder("phi"),
}
# Decoders of one family; positions of Qwen's have three dimensions.
OWN_DECODERS = {
    "llama4": _decoder(
        "llama4_text", head_dim=16, intermediate_size_mlp=56, num_hidden_layers=3, **_EXPERTS,
        intermediate_size=40,
    ),
    "exaone4": _decoder("exaone4", head_dim=16, **_LAYERS),
    "glm4v": _decoder("glm4v_text", rope_parameters=_rope(2, 2, 2, share=1.0)),
    "glm_ocr": _decoder("glm_ocr_text", head_dim=16, rope_parameters=_rope(4, 2, 2, share=1.0)),
    "paddleocr_vl": _decoder("paddleocr_vl_text", head_dim=16, rope_parameters=_rope(4, 2, 2)),
    "lfm2": _decoder(
        "lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"], **_TIED
    ),
    "mllama": _decoder(
        "mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen2_vl": _decoder("qwen2_vl_text", rope_parameters=_rope(2, 2, 2)),
    "qwen2_5_vl": _decoder("qwen2_5_vl_text", rope_parameters=_rope(2, 2, 2)),
    "qwen3_vl": _decoder(
        "qwen3_vl_text", head_dim=16, num_hidden_layers=3, rope_parameters=_rope(4, 2, 2)
    ),
    "qwen3_vl_moe": _decoder(
        "qwen3_vl_moe_text", head_dim=16, num_hidden_layers=3, moe_intermediate_size=40, **_MIXED,
        rope_parameters=_rope(4, 2, 2),
    ),
    "qwen3_5": _decoder(
        "qwen3_5_text", head_dim=32, num_hidden_layers=3, **_LINEAR,
        rope_parameters=_rope(2, 1, 1, share=0.25),
    ),
}  # fmt: skip
_LAST = {"vision_feature_layer": -1}
_WIDE = {"downsample_factor": 2, "alignment_intermediate_size": 56}
_DEFAULT = _LAST | {"vision_feature_select_strategy": "default"}
_TEXT_SIZES = {"hidden_size": 48, "vocab_size": 128}
_OF_THE_LAST_LAYER = (
    "exaone4_5 fast_vlm glm46v glm4v glm_ocr got_ocr2 janus llama4 mllama paddleocr_vl qwen2_5_vl "
    "qwen2_vl qwen3_5 qwen3_vl qwen3_vl_moe video_llama_3"
)
FAMILIES = dict.fromkeys(_OF_THE_LAST_LAYER.split(), _LAST) | {
    "aya_vision": _WIDE,
    "cohere2_vision": _LAST | _WIDE,
    "deepseek_vl": {},
    "deepseek_vl_hybrid": _LAST | {"high_res_vision_config": TOWERS["sam"]},
    "gemma3": _LAST | {"mm_tokens_per_image": 4},
    "idefics3": {"scale_factor": 2},
    "internvl": _DEFAULT,
    "lfm2_vl": _LAST | {"projector_hidden_size": 40},
    "lighton_ocr": _LAST | {"spatial_merge_size": 2},
    "mistral3": _LAST | {"spatial_merge_size": 2},
    "ovis2": _LAST | _TEXT_SIZES | {"visual_indicator_token_ids": [100, 101, 102, 103, 104]},
    "perception_lm": _LAST | {"projector_pooling_ratio": 2},
    "paligemma": _TEXT_SIZES | {"projection_dim": 48},
    "qianfan_ocr": _DEFAULT,
    "smolvlm": {"scale_factor": 2},
    "llava": {"image_seq_length": 16},
    "llava_next": {"image_grid_pinpoints": GRID},
    "llava_next_video": {"image_grid_pinpoints": GRID},
    "llava_onevision": _LAST | {"image_grid_pinpoints": GRID},
    "video_llava": {"image_seq_length": 16, "video_seq_length": 136},
    # earlier versions of Transformers know it by its second name
    "vipllava": {name: [-2, -1, 1] for name in ("vision_feature_layer", "vision_feature_layers")},
}
# Families that merge patches: how many into one.
_BY_FOUR = (
    "aya_vision cohere2_vision gemma3 idefics3 internvl llama4 ovis2 perception_lm qianfan_ocr "
    "smolvlm"
)
_MERGED = dict.fromkeys(_BY_FOUR.split(), 4) | {"got_ocr2": 16}
_STACKED = ("idefics3", "perception_lm", "smolvlm")


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
        "tokenizer": family_tokenizer(image),
        "chat_template": CHAT_TEMPLATE.replace("<image>", image),
        "image_token": image,
    }
    if tower == "pixtral":
        edge = PATCH_SIZE * (2 if family in ("lighton_ocr", "mistral3") else 1)
        pixels = PixtralImageProcessorPil(size={"longest_edge": IMAGE_SIZE}, patch_size=edge)
        processor = _PixtralProcessor(image_processor=pixels, patch_size=PATCH_SIZE, **common)
        processor.side = edge // PATCH_SIZE
        return processor
    if family in _PACKING_PROCESSORS:
        kind, pixels_kind = _PACKING_PROCESSORS[family]
        edges = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": 4 * IMAGE_SIZE**2}
        pixels = pixels_kind(size=edges, patch_size=PATCH_SIZE)
        del common["image_token"]  # the tokenizer's
        # positions are counted anew for every run of picture tokens
        common["chat_template"] = CHAT_TEMPLATE.replace(image, f"{image}[IMG_END]")
        return kind(image_processor=pixels, **common)
    if family == "deepseek_vl_hybrid":
        pixels = DeepseekVLHybridImageProcessorPil(size=sizes, high_res_size=sizes)
        del common["image_token"]
        return DeepseekVLHybridProcessor(image_processor=pixels, num_image_tokens=16, **common)
    if family == "lfm2_vl":
        pixels = _EvenPictures(patch_size=PATCH_SIZE, max_num_patches=20)
        return _NaflexProcessor(image_processor=pixels, patch_size=PATCH_SIZE, **common)
    if family == "mllama":
        del common["image_token"]
        pixels = MllamaImageProcessorPil(size=sizes, max_image_tiles=2)
        return MllamaProcessor(image_processor=pixels, **common)
    common["vision_feature_select_strategy"] = _strategy(tower)
    if family == "llava_onevision":
        pixels = LlavaOnevisionImageProcessorPil(size=sizes, image_grid_pinpoints=GRID)
        return _OnevisionProcessor(image_processor=pixels, num_image_tokens=16, **common)
    common |= {"patch_size": PATCH_SIZE, "num_additional_image_tokens": int(tower == "clip")}
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": sizes}
    if family in ("llava_next", "llava_next_video"):
        pixels = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=GRID)
        return LlavaNextProcessor(image_processor=pixels, **common)
    pixels = CLIPImageProcessorPil(**size)
    if family in _MERGED:
        kind = _GemmaProcessor if family == "gemma3" else _MergingProcessor
        processor = kind(image_processor=pixels, **common)
        processor.merged, processor.stacked = _MERGED[family], family in _STACKED
        return processor
    return LlavaProcessor(image_processor=pixels, **common)


def _image(tower):
    return "[IMG]" if tower == "pixtral" else "<image>"


def _strategy(tower):
    return "default" if tower == "clip" else "full"


def family_tokenizer(image):
    """Splits at blanks; `image` stands for a picture."""
    words = Tokenizer(
        WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", WORDS.index("<s>"))]
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
