"""Classes of transformer layers: the wiring of each (wirings.py), and the names of its modules."""

from qvlm_hf.models import wirings

__all__ = ["LAYER_KINDS", "OFFSET_NORMS"]

_ATTENTION = {role: f"self_attn.{role}_proj" for role in wirings.QKV}
_CLIP = _ATTENTION | {
    "attention_norm": "layer_norm1",
    "attention_out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_JANUS = _CLIP | {"attention_out": "self_attn.projection_layer"}
_INTERNVL = {
    **{role: f"attention.{role}_proj" for role in wirings.QKV},
    "attention_norm": "layernorm_before",
    "attention_out": "attention.projection_layer",
    "mlp_norm": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_PIXTRAL = {
    **{role: f"attention.{role}_proj" for role in wirings.QKV},
    "attention_norm": "attention_norm",
    "attention_out": "attention.o_proj",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
}
_OVIS2 = {
    **{role: f"attention.{role}_proj" for role in wirings.QKV},
    "attention_norm": "rms_norm1",
    "attention_out": "attention.out_proj",
    "mlp_norm": "rms_norm2",
    "gate": "ffn.gate_proj",
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
}
_SAM = {
    "qkv": "attn.qkv",
    "attention_norm": "layer_norm1",
    "attention_out": "attn.proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.lin1",
    "down": "mlp.lin2",
}
_LLAMA = _ATTENTION | {
    "attention_norm": "input_layernorm",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LLAMA4 = _LLAMA | {role: f"feed_forward.{role}_proj" for role in ("gate", "up", "down")}
_LLAMA4_EXPERTS = {
    **_LLAMA,
    **{role: f"feed_forward.shared_expert.{role}_proj" for role in ("gate", "up", "down")},
    "router": "feed_forward.router",
    "expert_up": "feed_forward.experts.gate_up_proj",
    "expert_down": "feed_forward.experts.down_proj",
}
_LLAMA4_VISION = _ATTENTION | {
    "attention_norm": "input_layernorm",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_QWEN3_EXPERTS = _LLAMA | {
    "router": "mlp.gate",
    "expert_up": "mlp.experts.gate_up_proj",
    "expert_down": "mlp.experts.down_proj",
}
_LFM2 = _ATTENTION | {
    "attention_norm": "operator_norm",
    "attention_out": "self_attn.out_proj",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
_LFM2_CONV = _LFM2 | {"mixed": "conv.in_proj", "attention_out": "conv.out_proj"}
_MLLAMA_VISION = _LLAMA | {"up": "mlp.fc1", "down": "mlp.fc2"}
_CROSS = _LLAMA | {
    **{role: f"cross_attn.{role}_proj" for role in wirings.QKV},
    "attention_out": "cross_attn.o_proj",
}
_GEMMA2 = _LLAMA | {"mlp_norm": "pre_feedforward_layernorm"}
_COHERE = _LLAMA | {"norm": "input_layernorm"}
_PHI3 = _LLAMA | {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
_PHI = _ATTENTION | {
    "norm": "input_layernorm",
    "attention_out": "self_attn.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}

_QWEN2_VISION = {
    "qkv": "attn.qkv",
    "attention_norm": "norm1",
    "attention_out": "attn.proj",
    "mlp_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_QWEN2_5_VISION = _QWEN2_VISION | {
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_QWEN3_VISION = _QWEN2_VISION | {"up": "mlp.linear_fc1", "down": "mlp.linear_fc2"}
_DELTA = _LLAMA | {
    **{role: f"linear_attn.in_proj_{role}" for role in wirings.DELTA_INPUTS},
    "value_norm": "linear_attn.norm",
    "attention_out": "linear_attn.out_proj",
}

# A class of layer is one line. Where its layers differ, a module that one kind has follows a dot,
# and the first line that fits counts.
LAYER_KINDS = {
    "CLIPEncoderLayer": wirings.ENCODER.named(_CLIP),
    "SiglipEncoderLayer": wirings.NORMED_ENCODER.named(_CLIP),
    "Idefics3EncoderLayer": wirings.NORMED_ENCODER.named(_CLIP),
    "SmolVLMEncoderLayer": wirings.NORMED_ENCODER.named(_CLIP),
    "InternVLVisionLayer": wirings.ENCODER.named(_INTERNVL),
    "QianfanOCRVisionLayer": wirings.ENCODER.named(_INTERNVL),
    "JanusVisionEncoderLayer": wirings.NORMED_ENCODER.named(_JANUS),
    "MllamaVisionEncoderLayer": wirings.BIASLESS_ENCODER.named(_MLLAMA_VISION),
    "Siglip2EncoderLayer": wirings.PACKED_ENCODER.named(_CLIP),
    "PaddleOCRVisionEncoderLayer": wirings.PACKED_ENCODER.named(_CLIP),
    "VideoLlama3VisionEncoderLayer": wirings.PACKED_ENCODER.named(_CLIP),
    "Ovis2VisionEncoderLayer": wirings.OVIS2_ENCODER.named(_OVIS2),
    "Glm4vVisionBlock": wirings.FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "Exaone4_5_VisionBlock": wirings.FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "GlmOcrVisionBlock": wirings.FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "GotOcr2VisionLayer": wirings.WINDOWED_ENCODER.named(_SAM),
    "PixtralAttentionLayer": wirings.GATED_ENCODER.named(_PIXTRAL),
    "Llama4VisionEncoderLayer": wirings.ENCODER.named(_LLAMA4_VISION),
    "Qwen2VLVisionBlock": wirings.FUSED_ENCODER.named(_QWEN2_VISION),
    "Qwen2_5_VLVisionBlock": wirings.FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "Qwen3VLVisionBlock": wirings.FUSED_ENCODER.named(_QWEN3_VISION),
    "Qwen3VLMoeVisionBlock": wirings.FUSED_ENCODER.named(_QWEN3_VISION),
    "Qwen3_5VisionBlock": wirings.FUSED_ENCODER.named(_QWEN3_VISION),
    "LlamaDecoderLayer": wirings.DECODER.named(_LLAMA),
    "MistralDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Qwen2DecoderLayer": wirings.DECODER.named(_LLAMA),
    "Qwen3DecoderLayer": wirings.DECODER.named(_LLAMA),
    "Llama4TextDecoderLayer.feed_forward.experts": wirings.SHARED_EXPERTS.named(_LLAMA4_EXPERTS),
    "Llama4TextDecoderLayer": wirings.DECODER.named(_LLAMA4),
    "Qwen2VLDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Qwen2_5_VLDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Qwen3VLTextDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Qwen3VLMoeTextDecoderLayer.mlp.experts": wirings.EXPERTS.named(_QWEN3_EXPERTS),
    "Qwen3VLMoeTextDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Qwen3_5DecoderLayer.self_attn": wirings.GATED_DECODER.named(_LLAMA),
    "Qwen3_5DecoderLayer.linear_attn": wirings.DELTA_DECODER.named(_DELTA),
    "GemmaDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Gemma2DecoderLayer": wirings.POST_NORM_DECODER.named(_GEMMA2),
    "Gemma3DecoderLayer": wirings.POST_NORM_DECODER.named(_GEMMA2),
    "Exaone4DecoderLayer": wirings.LATE_NORM_DECODER.named(_LLAMA),
    "Cohere2DecoderLayer": wirings.GATED_PARALLEL_DECODER.named(_COHERE),
    "MllamaSelfAttentionDecoderLayer": wirings.DECODER.named(_LLAMA),
    "MllamaCrossAttentionDecoderLayer": wirings.CROSS_DECODER.named(_CROSS),
    "Lfm2DecoderLayer.self_attn": wirings.DECODER.named(_LFM2),
    "Lfm2DecoderLayer.conv": wirings.CONV_DECODER.named(_LFM2_CONV),
    "PaddleOCRDecoderLayer": wirings.DECODER.named(_LLAMA),
    "Glm4vTextDecoderLayer": wirings.FUSED_POST_NORM_DECODER.named(_PHI3),
    "GlmOcrTextDecoderLayer": wirings.FUSED_POST_NORM_DECODER.named(_PHI3),
    "Phi3DecoderLayer": wirings.FUSED_DECODER.named(_PHI3),
    "PhiDecoderLayer": wirings.PARALLEL_DECODER.named(_PHI),
}

# Norms that multiply by 1 + weight. All others must multiply by `weight` as it is.
OFFSET_NORMS = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm"})
