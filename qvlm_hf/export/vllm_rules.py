"""What vLLM asks of a LLaVA in compressed-tensors' format: a table, read from vLLM's source."""

from dataclasses import dataclass

__all__ = ["RULES", "VLLM_VERSION", "Rule"]

VLLM_VERSION = "0.33.0"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule, and the files below vllm/model_executor that it was read from."""

    name: str
    source: str
    says: str


RULES = (
    Rule(
        name="model",
        source="models/llava.py",
        says="LlavaForConditionalGeneration with a CLIP, SigLIP or Pixtral vision encoder.",
    ),
    Rule(
        name="names",
        source="models/llava.py, models/clip.py, models/siglip.py",
        says="language_model.model.*, language_model.lm_head, multi_modal_projector.*, "
        "vision_tower.vision_model.* (Pixtral: "
        "vision_tower.*), or as models/llava.py renames; every tensor has a place and every place "
        "a tensor.",
    ),
    Rule(
        name="scheme",
        source="layers/quantization/compressed_tensors/compressed_tensors.py",
        says="Integer weights, static: pack-quantized of 2-8 bits with a scale per channel or "
        "group and floating-point inputs; or "
        "int-quantized of 8 bits, symmetric, with a scale per channel or tensor, and 8-bit inputs, "
        "dynamic per token or static per tensor.",
    ),
    Rule(
        name="fused",
        source="layers/quantization/compressed_tensors/utils.py, "
        "layers/quantization/utils/config_utils.py",
        says="q/k/v and gate/up are one module each: all of a trio or pair ignored or none, and "
        "all in one config group.",
    ),
    Rule(
        name="tensors",
        source="layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py, "
        "compressed_tensors_w8a8_int8.py",
        says="weight_packed int32 [out, in*bits/32], weight_scale [out, groups], weight_shape "
        "int64 [2], weight_zero_point int32 "
        "[out*bits/32, groups]; or weight int8 [out, in], weight_scale [out, 1].",
    ),
    Rule(
        name="groups",
        source="layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py",
        says="Whole groups: the group size divides the inputs, those of one device where they are "
        "split (o_proj, down_proj, out_proj, fc2, "
        "linear_2); rows of packed zero points fill whole words in every fused part.",
    ),
    Rule(
        name="parallel",
        source="layers/linear.py, models/clip.py, models/llama.py",
        says="The number of devices divides heads, split inputs and outputs; key-value heads are "
        "divided or repeated.",
    ),
    Rule(
        name="kernel",
        source="kernels/linear/__init__.py, kernels/linear/mixed_precision/marlin.py, humming.py, "
        "cpu.py",
        says="CUDA: Marlin runs 4 and 8 bits symmetric and 4 bits asymmetric in groups of 32, 64, "
        "128 or rows (others: Humming), and pads "
        "outputs to 64 and inputs to 128; CPU: 4 bits alone, inputs and outputs multiples of 32, "
        "even groups, not in float32.",
    ),
)
