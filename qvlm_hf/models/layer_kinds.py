"""How transformer layers are wired, by layer class.

A wiring is written in roles ("q", "up"). A table of names puts the modules of a class into these
roles, so that classes which differ in names alone share a wiring.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LAYER_KINDS", "TWO_LINEARS", "LayerKind"]


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The wiring of a transformer layer, or of a projector.

    Attributes:
        sites: modules that read one input, in execution order.
        transformed: first modules of the sites that a rotation gives an online Hadamard transform.
        norms: a norm, and all modules that read its output.
        writers: modules whose output is added to the residual stream.
        value: the module of the attention values, and the one that reads them after mixing.
        product: a module whose output is multiplied elementwise, and the reader of the product.
    """

    sites: tuple[tuple[str, ...], ...]
    transformed: tuple[str, ...] = ()
    norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    writers: tuple[str, ...] = ()
    value: tuple[str, str] | None = None
    product: tuple[str, str] | None = None

    def named(self, names: Mapping[str, str]) -> "LayerKind":
        """Returns this wiring with paths below the layer in place of roles."""

        def all_of(roles: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(names[role] for role in roles)

        return LayerKind(
            sites=tuple(map(all_of, self.sites)),
            transformed=all_of(self.transformed),
            norms=tuple((names[norm], all_of(readers)) for norm, readers in self.norms),
            writers=all_of(self.writers),
            value=self.value and (names[self.value[0]], names[self.value[1]]),
            product=self.product and (names[self.product[0]], names[self.product[1]]),
        )


_QKV = ("q", "k", "v")

# norm -> attention, norm -> two linears with an activation between them
_ENCODER = LayerKind(
    sites=(_QKV, ("attention_out",), ("up",), ("down",)),
    transformed=("q", "up", "down"),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("up",))),
    value=("v", "attention_out"),
)
# norm -> attention, norm -> gated MLP
_DECODER = LayerKind(
    sites=(_QKV, ("attention_out",), ("gate", "up"), ("down",)),
    transformed=("down",),
    norms=(("attention_norm", _QKV), ("mlp_norm", ("gate", "up"))),
    writers=("attention_out", "down"),
    value=("v", "attention_out"),
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
_LLAMA = _ATTENTION | {
    "attention_norm": "input_layernorm",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

# A class of layer is one line. Its norms must multiply by `weight` as it is, not by 1 + weight.
LAYER_KINDS = {
    "CLIPEncoderLayer": _ENCODER.named(_CLIP),
    "LlamaDecoderLayer": _DECODER.named(_LLAMA),
}

# A projector of two linears, the second of which writes into the language model's embeddings.
TWO_LINEARS = LayerKind(
    sites=(("linear_1",), ("linear_2",)),
    transformed=("linear_1", "linear_2"),
    writers=("linear_2",),
)
