"""How transformer layers are wired, by layer class.

A wiring is written in roles ("q", "up"). A table of names puts the modules of a class into these
roles, so that classes which differ in names alone share a wiring.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["LAYER_KINDS", "OFFSET_NORMS", "LayerKind", "chain"]


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The wiring of a transformer layer, or of a projector.

    Attributes:
        sites: modules that read one input, in execution order.
        transformed: first modules of the sites that a rotation gives an online Hadamard transform.
        norms: a norm of the residual stream, and all modules that read its output, or several
            outputs side by side.
        inner_norms: the same of norms that a rotation leaves as they are.
        interleaved: the outputs of inner norms stand side by side channel by channel, not one after
            the other.
        writers: modules whose output is added to the residual stream.
        value: the module of the attention values, and the one that reads them after mixing.
        product: a module whose output is multiplied elementwise, and the reader of the product.
        expert_product: the same inside every expert.
        gated: values are multiplied elementwise after mixing: they may be scaled, not rotated.
        last_norm: end of the path of a norm in the tower that all its output passes.
        packed: tokens have no fixed place in a row: pictures have any size, or stand in one row.
        no_rotation: why the residual stream cannot be rotated; empty where it can.

    The source of `value` and `product` may be fused with others: its last outputs count then. The
    path of a list of modules, one an expert, stands for all of them.
    """

    sites: tuple[tuple[str, ...], ...]
    transformed: tuple[str, ...] = ()
    norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    inner_norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    interleaved: bool = False
    writers: tuple[str, ...] = ()
    value: tuple[str, str] | None = None
    product: tuple[str, str] | None = None
    expert_product: tuple[str, str] | None = None
    gated: bool = False
    last_norm: str = ""
    packed: bool = False
    no_rotation: str = ""

    def named(self, names: Mapping[str, str]) -> "LayerKind":
        """Returns this wiring with paths below the layer in place of roles."""

        def all_of(roles: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names[role] for role in roles)

        return replace(
            self,
            sites=tuple(map(all_of, self.sites)),
            transformed=all_of(self.transformed),
            norms=tuple((names[norm], all_of(readers)) for norm, readers in self.norms),
            inner_norms=tuple((names[norm], all_of(readers)) for norm, readers in self.inner_norms),
            writers=all_of(self.writers),
            value=self.value and (names[self.value[0]], names[self.value[1]]),
            product=self.product and (names[self.product[0]], names[self.product[1]]),
            expert_product=self.expert_product
            and (names[self.expert_product[0]], names[self.expert_product[1]]),
        )


_QKV = ("q", "k", "v")

# norm -> attention, norm -> two linears with an activation between them
_ENCODER = LayerKind(
    sites=(_QKV, ("attention_out",), ("up",), ("down",)),
    transformed=("q", "up", "down"),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("up",))),
    value=("v", "attention_out"),
)
# the same in a tower that norms its output
_NORMED_ENCODER = replace(_ENCODER, last_norm="post_layernorm")
# the same, with q/k/v that have no bias to take the norm's
_BIASLESS_ENCODER = replace(
    _ENCODER, norms=(("mlp_norm", ("up",)),), inner_norms=(("attention_norm", _QKV),)
)
# the same with q/k/v in one module
_FUSED_ENCODER = replace(
    _ENCODER,
    sites=(("qkv",), ("attention_out",), ("up",), ("down",)),
    transformed=("qkv", "up", "down"),
    norms=(("attention_norm", ("qkv",)), ("mlp_norm", ("up",))),
    value=("qkv", "attention_out"),
    packed=True,
)
# the same with a gated MLP
_FUSED_GATED_ENCODER = replace(
    _FUSED_ENCODER,
    sites=(("qkv",), ("attention_out",), ("gate", "up"), ("down",)),
    transformed=("qkv", "gate", "down"),
    norms=(("attention_norm", ("qkv",)), ("mlp_norm", ("gate", "up"))),
    product=("up", "down"),
)
# the same over windows, which are padded behind the norm
_WINDOWED_ENCODER = replace(
    _FUSED_ENCODER,
    norms=(("mlp_norm", ("up",)),),
    inner_norms=(("attention_norm", ("qkv",)),),
)
# the same over pictures of any size
_PACKED_ENCODER = replace(_NORMED_ENCODER, packed=True)
# norm -> attention, norm -> gated MLP
_DECODER = LayerKind(
    sites=(_QKV, ("attention_out",), ("gate", "up"), ("down",)),
    transformed=("down",),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("gate", "up"))),
    writers=("attention_out", "down"),
    value=("v", "attention_out"),
    product=("up", "down"),
)
# the same in a vision tower
_GATED_ENCODER = replace(_DECODER, transformed=("q", "gate", "down"), writers=(), packed=True)
# the same over pictures of one size
_OVIS2_ENCODER = replace(_GATED_ENCODER, last_norm="transformer.rms_norm", packed=False)
# the same with q/k/v in one module, and gate/up in one
_FUSED_DECODER = replace(
    _DECODER,
    sites=(("qkv",), ("attention_out",), ("gate_up",), ("down",)),
    norms=(("attention_norm", ("qkv",)), ("mlp_norm", ("gate_up",))),
    value=("qkv", "attention_out"),
    product=("gate_up", "down"),
)
# the same with an attention that gates its output
_GATED_DECODER = replace(_DECODER, transformed=("attention_out", "down"), gated=True)
# the same with linear attention, which norms and gates its output
_DELTA_INPUTS = ("qkv", "z", "b", "a")
_DELTA_DECODER = replace(
    _GATED_DECODER,
    sites=(_DELTA_INPUTS, *_DECODER.sites[1:]),
    norms=(("attention_norm", _DELTA_INPUTS), ("mlp_norm", ("gate", "up"))),
    inner_norms=(("value_norm", ("attention_out",)),),
    value=None,
)
# the same with a short convolution in the place of attention
_CONV_DECODER = replace(
    _DECODER,
    sites=(("mixed",), *_DECODER.sites[1:]),
    transformed=("attention_out", "down"),
    norms=(("attention_norm", ("mixed",)), ("mlp_norm", ("gate", "up"))),
    value=None,
)
# the same with keys and values that read pictures
_CROSS_DECODER = replace(
    _DECODER,
    sites=(("q",), ("k", "v"), *_DECODER.sites[1:]),
    transformed=("k", "down"),
    norms=(("attention_norm", ("q",)), ("mlp_norm", ("gate", "up"))),
)
# the same with a norm behind attention and behind the MLP
_POST_NORM_DECODER = replace(
    _DECODER, no_rotation="norms scale channels on their way into the residual stream"
)
# the same without a norm before them
_LATE_NORM_DECODER = replace(_POST_NORM_DECODER, norms=())
# norm -> attention, norm -> a router and its experts
_EXPERTS = replace(
    _DECODER,
    sites=(_QKV, ("attention_out",), ("expert_up",), ("expert_down",)),
    transformed=("expert_down",),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("router", "expert_up"))),
    writers=("attention_out", "expert_down"),
    product=None,
    expert_product=("expert_up", "expert_down"),
)
# the same with an expert for all tokens beside them
_SHARED_EXPERTS = replace(
    _EXPERTS,
    sites=(*_EXPERTS.sites, ("gate", "up"), ("down",)),
    transformed=("expert_down", "down"),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("router", "expert_up", "gate", "up"))),
    writers=("attention_out", "expert_down", "down"),
    product=("up", "down"),
)
# the same with gate/up in one module
_FUSED_POST_NORM_DECODER = replace(
    _POST_NORM_DECODER,
    sites=(_QKV, ("attention_out",), ("gate_up",), ("down",)),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("gate_up",))),
    product=("gate_up", "down"),
)
# one norm -> attention beside two linears
_PARALLEL_DECODER = LayerKind(
    sites=((*_QKV, "up"), ("attention_out",), ("down",)),
    norms=(("norm", (*_QKV, "up")),),
    value=("v", "attention_out"),
    no_rotation="its norms subtract a mean, which a rotation would change",
)
# the same beside a gated MLP
_GATED_PARALLEL_DECODER = replace(
    _PARALLEL_DECODER,
    sites=((*_QKV, "gate", "up"), ("attention_out",), ("down",)),
    norms=(("norm", (*_QKV, "gate", "up")),),
    product=("up", "down"),
)

_ATTENTION = {role: f"self_attn.{role}_proj" for role in _QKV}
_CLIP = _ATTENTION | {
    "attention_norm": "layer_norm1",
    "attention_out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_JANUS = _CLIP | {"attention_out": "self_attn.projection_layer"}
_INTERNVL = {
    **{role: f"attention.{role}_proj" for role in _QKV},
    "attention_norm": "layernorm_before",
    "attention_out": "attention.projection_layer",
    "mlp_norm": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_PIXTRAL = {
    **{role: f"attention.{role}_proj" for role in _QKV},
    "attention_norm": "attention_norm",
    "attention_out": "attention.o_proj",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.gate_proj",
    "up": "feed_forward.up_proj",
    "down": "feed_forward.down_proj",
}
_OVIS2 = {
    **{role: f"attention.{role}_proj" for role in _QKV},
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
    **{role: f"cross_attn.{role}_proj" for role in _QKV},
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
    **{role: f"linear_attn.in_proj_{role}" for role in _DELTA_INPUTS},
    "value_norm": "linear_attn.norm",
    "attention_out": "linear_attn.out_proj",
}

# A class of layer is one line. Where its layers differ, a module that one kind has follows a dot,
# and the first line that fits counts.
LAYER_KINDS = {
    "CLIPEncoderLayer": _ENCODER.named(_CLIP),
    "SiglipEncoderLayer": _NORMED_ENCODER.named(_CLIP),
    "Idefics3EncoderLayer": _NORMED_ENCODER.named(_CLIP),
    "SmolVLMEncoderLayer": _NORMED_ENCODER.named(_CLIP),
    "InternVLVisionLayer": _ENCODER.named(_INTERNVL),
    "QianfanOCRVisionLayer": _ENCODER.named(_INTERNVL),
    "JanusVisionEncoderLayer": _NORMED_ENCODER.named(_JANUS),
    "MllamaVisionEncoderLayer": _BIASLESS_ENCODER.named(_MLLAMA_VISION),
    "Siglip2EncoderLayer": _PACKED_ENCODER.named(_CLIP),
    "PaddleOCRVisionEncoderLayer": _PACKED_ENCODER.named(_CLIP),
    "VideoLlama3VisionEncoderLayer": _PACKED_ENCODER.named(_CLIP),
    "Ovis2VisionEncoderLayer": _OVIS2_ENCODER.named(_OVIS2),
    "Glm4vVisionBlock": _FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "Exaone4_5_VisionBlock": _FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "GlmOcrVisionBlock": _FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "GotOcr2VisionLayer": _WINDOWED_ENCODER.named(_SAM),
    "PixtralAttentionLayer": _GATED_ENCODER.named(_PIXTRAL),
    "Llama4VisionEncoderLayer": _ENCODER.named(_LLAMA4_VISION),
    "Qwen2VLVisionBlock": _FUSED_ENCODER.named(_QWEN2_VISION),
    "Qwen2_5_VLVisionBlock": _FUSED_GATED_ENCODER.named(_QWEN2_5_VISION),
    "Qwen3VLVisionBlock": _FUSED_ENCODER.named(_QWEN3_VISION),
    "Qwen3VLMoeVisionBlock": _FUSED_ENCODER.named(_QWEN3_VISION),
    "Qwen3_5VisionBlock": _FUSED_ENCODER.named(_QWEN3_VISION),
    "LlamaDecoderLayer": _DECODER.named(_LLAMA),
    "MistralDecoderLayer": _DECODER.named(_LLAMA),
    "Qwen2DecoderLayer": _DECODER.named(_LLAMA),
    "Qwen3DecoderLayer": _DECODER.named(_LLAMA),
    "Llama4TextDecoderLayer.feed_forward.experts": _SHARED_EXPERTS.named(_LLAMA4_EXPERTS),
    "Llama4TextDecoderLayer": _DECODER.named(_LLAMA4),
    "Qwen2VLDecoderLayer": _DECODER.named(_LLAMA),
    "Qwen2_5_VLDecoderLayer": _DECODER.named(_LLAMA),
    "Qwen3VLTextDecoderLayer": _DECODER.named(_LLAMA),
    "Qwen3VLMoeTextDecoderLayer.mlp.experts": _EXPERTS.named(_QWEN3_EXPERTS),
    "Qwen3VLMoeTextDecoderLayer": _DECODER.named(_LLAMA),
    "Qwen3_5DecoderLayer.self_attn": _GATED_DECODER.named(_LLAMA),
    "Qwen3_5DecoderLayer.linear_attn": _DELTA_DECODER.named(_DELTA),
    "GemmaDecoderLayer": _DECODER.named(_LLAMA),
    "Gemma2DecoderLayer": _POST_NORM_DECODER.named(_GEMMA2),
    "Gemma3DecoderLayer": _POST_NORM_DECODER.named(_GEMMA2),
    "Exaone4DecoderLayer": _LATE_NORM_DECODER.named(_LLAMA),
    "Cohere2DecoderLayer": _GATED_PARALLEL_DECODER.named(_COHERE),
    "MllamaSelfAttentionDecoderLayer": _DECODER.named(_LLAMA),
    "MllamaCrossAttentionDecoderLayer": _CROSS_DECODER.named(_CROSS),
    "Lfm2DecoderLayer.self_attn": _DECODER.named(_LFM2),
    "Lfm2DecoderLayer.conv": _CONV_DECODER.named(_LFM2_CONV),
    "PaddleOCRDecoderLayer": _DECODER.named(_LLAMA),
    "Glm4vTextDecoderLayer": _FUSED_POST_NORM_DECODER.named(_PHI3),
    "GlmOcrTextDecoderLayer": _FUSED_POST_NORM_DECODER.named(_PHI3),
    "Phi3DecoderLayer": _FUSED_DECODER.named(_PHI3),
    "PhiDecoderLayer": _PARALLEL_DECODER.named(_PHI),
}

# Norms that multiply by 1 + weight. All others must multiply by `weight` as it is.
OFFSET_NORMS = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm"})


def chain(*linears: str, norm: str = "") -> LayerKind:
    """The wiring of a projector: linear modules one after the other, a norm before the first.

    The last one writes into the language model's embeddings.

    Args:
        linears: paths below the projector, "" for one that is a linear module itself.
        norm: path of a norm whose output the first one reads.
    """
    return LayerKind(
        sites=tuple((linear,) for linear in linears),
        transformed=linears,
        norms=((norm, linears[:1]),) if norm else (),
        writers=linears[-1:],
    )
