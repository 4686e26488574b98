"""Model families, one row each; find_parts.py lays a row over a model.

Transformers itself tells where the decoder, the vision tower, the embeddings and the head are. A
row names the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qvlm_hf.models.wirings import LayerKind, chain

__all__ = ["FAMILIES", "Family", "check_row", "has_row"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What Transformers does not tell of a family.

    Attributes:
        projector: path of the projector below the model without its head.
        projector_kind: its wiring.
        reads_output: whether the projector reads the tower's output, one or several side by side,
            and nothing else does.
        further: path of a list of projectors like it, which write into later layers.
        written: paths of parameters that stand in the residual stream like embeddings.
        unquantized: paths that stay in full precision, and why; the tower may be one.
    """

    projector: str = "multi_modal_projector"
    projector_kind: LayerKind = chain("linear_1", "linear_2")
    reads_output: bool = False
    further: str = ""
    written: tuple[str, ...] = ()
    unquantized: Mapping[str, str] = field(default_factory=dict)


_TILED = Family(written=("image_newline",))
_SHUFFLED = Family(
    projector="connector", projector_kind=chain("modality_projection.proj"), reads_output=True
)
_MERGED = Family(
    projector="visual.merger", projector_kind=chain("linear_fc1", "linear_fc2", norm="norm")
)
_MERGED_EARLIER = replace(_MERGED, projector_kind=chain("mlp.0", "mlp.2", norm="ln_q"))
_PATCHES = replace(
    chain("patch_merger.merging_layer", "linear_1", "linear_2"),
    inner_norms=(("norm", ("patch_merger.merging_layer",)),),
    interleaved=True,
)
_GATED = Family(
    projector="visual.merger",
    projector_kind=LayerKind(
        sites=(("proj",), ("gate_proj", "up_proj"), ("down_proj",)),
        transformed=("proj", "gate_proj", "down_proj"),
        writers=("down_proj",),
        product=("up_proj", "down_proj"),
    ),
)
_TIMM = {"vision_tower": "its layers are those of the timm package"}
# a linear module that does not write embeddings
_ALONE = replace(chain(""), writers=())

FAMILIES = {
    "aya_vision": Family(projector_kind=chain("linear_1", "linear_2", norm="layernorm")),
    "cohere2_vision": Family(reads_output=True),
    "deepseek_vl": Family(
        projector="aligner", projector_kind=chain("linear1", "linear2"), reads_output=True
    ),
    "deepseek_vl_hybrid": Family(
        projector="aligner",
        projector_kind=chain("vision_proj", "high_res_vision_proj", "proj"),
        reads_output=True,
        unquantized={"high_res_vision_model": "its layers have no line in the table"},
    ),
    "exaone4_5": _MERGED_EARLIER,
    "fast_vlm": Family(unquantized=_TIMM),
    "gemma3": Family(
        projector_kind=chain(),
        unquantized={"multi_modal_projector": "it multiplies by a bare parameter"},
    ),
    "glm46v": _GATED,
    "glm4v": _GATED,
    "glm_ocr": _GATED,
    "got_ocr2": Family(projector_kind=chain("multimodal_projector")),
    "idefics3": _SHUFFLED,
    "internvl": Family(projector_kind=chain("linear_1", "linear_2", norm="layer_norm")),
    "janus": Family(
        projector="aligner",
        projector_kind=chain("fc1", "hidden_layers.0"),
        reads_output=True,
        unquantized=dict.fromkeys(
            ("generation_aligner", "generation_head"), "no sample asks for a drawn picture"
        ),
    ),
    "lfm2_vl": Family(projector_kind=chain("linear_1", "linear_2", norm="layer_norm")),
    "lighton_ocr": Family(projector="vision_projection", projector_kind=_PATCHES),
    "llama4": Family(
        projector_kind=chain("linear_1"),
        unquantized={"vision_model.vision_adapter": "it lies inside the tower, behind its layers"},
    ),
    "llava": Family(),
    "llava_next": _TILED,
    "llava_next_video": _TILED,
    "llava_onevision": _TILED,
    "mistral3": Family(projector_kind=_PATCHES),
    "mllama": Family(projector_kind=_ALONE),
    "ovis2": Family(
        projector="vision_tower.head_linear",
        projector_kind=_ALONE,
        reads_output=True,
        written=("visual_embeddings_table.weight",),
    ),
    "paddleocr_vl": Family(
        projector="projector", projector_kind=chain("linear_1", "linear_2", norm="pre_norm")
    ),
    "paligemma": Family(projector_kind=chain("linear"), reads_output=True),
    "perception_lm": Family(unquantized=_TIMM),
    "qianfan_ocr": Family(projector_kind=chain("linear_1", "linear_2", norm="layer_norm")),
    "qwen2_5_vl": _MERGED_EARLIER,
    "qwen2_vl": _MERGED_EARLIER,
    "qwen3_5": _MERGED,
    "qwen3_vl": replace(_MERGED, further="visual.deepstack_merger_list"),
    "qwen3_vl_moe": replace(_MERGED, further="visual.deepstack_merger_list"),
    "smolvlm": _SHUFFLED,
    "video_llama_3": Family(
        projector="projector", projector_kind=chain("readout.0", "readout.2"), reads_output=True
    ),
    "video_llava": Family(unquantized={"video_tower": "samples hold no videos"}),
    "vipllava": Family(projector_kind=chain("linear_1", "linear_2", norm="projector_layernorm")),
}


def has_row(model: Any) -> bool:
    """Tells whether the table has a row for a model; others are read by structure."""
    return model.config.model_type in FAMILIES


def check_row(model: Any) -> None:
    """Refuses a model without a row.

    Raises:
        ValueError: it has none; the message says what works all the same.
    """
    if not has_row(model):
        raise ValueError(
            f"family {model.config.model_type!r} has no row: only schemes without calibration, "
            f"e.g. scheme='W8A8' with activation_granularity='dynamic_token', and no dataset, "
            f"rotation or lm_head_bits (docs/models.md)."
        )
