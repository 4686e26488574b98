"""Wirings of transformer layers and projectors: which modules share an input, a norm, a product.

A wiring is written in roles ("q", "up"); the names of a class (layer_kinds.py) put modules into
these roles, so that classes which differ in names alone share a wiring.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["LayerKind", "chain"]


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


QKV = ("q", "k", "v")

# norm -> attention, norm -> two linears with an activation between them
ENCODER = LayerKind(
    sites=(QKV, ("attention_out",), ("up",), ("down",)),
    transformed=("q", "up", "down"),
    norms=(("attention_norm", QKV), ("mlp_norm", ("up",))),
    value=("v", "attention_out"),
)
# the same in a tower that norms its output
NORMED_ENCODER = replace(ENCODER, last_norm="post_layernorm")
# the same, with q/k/v that have no bias to take the norm's
BIASLESS_ENCODER = replace(
    ENCODER, norms=(("mlp_norm", ("up",)),), inner_norms=(("attention_norm", QKV),)
)
# the same with q/k/v in one module
FUSED_ENCODER = replace(
    ENCODER,
    sites=(("qkv",), ("attention_out",), ("up",), ("down",)),
    transformed=("qkv", "up", "down"),
    norms=(("attention_norm", ("qkv",)), ("mlp_norm", ("up",))),
    value=("qkv", "attention_out"),
    packed=True,
)
# the same with a gated MLP
FUSED_GATED_ENCODER = replace(
    FUSED_ENCODER,
    sites=(("qkv",), ("attention_out",), ("gate", "up"), ("down",)),
    transformed=("qkv", "gate", "down"),
    norms=(("attention_norm", ("qkv",)), ("mlp_norm", ("gate", "up"))),
    product=("up", "down"),
)
# the same over windows, which are padded behind the norm
WINDOWED_ENCODER = replace(
    FUSED_ENCODER, norms=(("mlp_norm", ("up",)),), inner_norms=(("attention_norm", ("qkv",)),)
)
# the same over pictures of any size
PACKED_ENCODER = replace(NORMED_ENCODER, packed=True)
# norm -> attention, norm -> gated MLP
DECODER = LayerKind(
    sites=(QKV, ("attention_out",), ("gate", "up"), ("down",)),
    transformed=("down",),
    norms=(("attention_norm", QKV), ("mlp_norm", ("gate", "up"))),
    writers=("attention_out", "down"),
    value=("v", "attention_out"),
    product=("up", "down"),
)
# the same in a vision tower
GATED_ENCODER = replace(DECODER, transformed=("q", "gate", "down"), writers=(), packed=True)
# the same over pictures of one size
OVIS2_ENCODER = replace(GATED_ENCODER, last_norm="transformer.rms_norm", packed=False)
# the same with q/k/v in one module, and gate/up in one
FUSED_DECODER = replace(
    DECODER,
    sites=(("qkv",), ("attention_out",), ("gate_up",), ("down",)),
    norms=(("attention_norm", ("qkv",)), ("mlp_norm", ("gate_up",))),
    value=("qkv", "attention_out"),
    product=("gate_up", "down"),
)
# the same with an attention that gates its output
GATED_DECODER = replace(DECODER, transformed=("attention_out", "down"), gated=True)
# the same with linear attention, which norms and gates its output
DELTA_INPUTS = ("qkv", "z", "b", "a")
DELTA_DECODER = replace(
    GATED_DECODER,
    sites=(DELTA_INPUTS, *DECODER.sites[1:]),
    norms=(("attention_norm", DELTA_INPUTS), ("mlp_norm", ("gate", "up"))),
    inner_norms=(("value_norm", ("attention_out",)),),
    value=None,
)
# the same with a short convolution in the place of attention
CONV_DECODER = replace(
    DECODER,
    sites=(("mixed",), *DECODER.sites[1:]),
    transformed=("attention_out", "down"),
    norms=(("attention_norm", ("mixed",)), ("mlp_norm", ("gate", "up"))),
    value=None,
)
# the same with keys and values that read pictures
CROSS_DECODER = replace(
    DECODER,
    sites=(("q",), ("k", "v"), *DECODER.sites[1:]),
    transformed=("k", "down"),
    norms=(("attention_norm", ("q",)), ("mlp_norm", ("gate", "up"))),
)
# the same with a norm behind attention and behind the MLP
POST_NORM_DECODER = replace(
    DECODER, no_rotation="norms scale channels on their way into the residual stream"
)
# the same without a norm before them
LATE_NORM_DECODER = replace(POST_NORM_DECODER, norms=())
# norm -> attention, norm -> a router and its experts
EXPERTS = replace(
    DECODER,
    sites=(QKV, ("attention_out",), ("expert_up",), ("expert_down",)),
    transformed=("expert_down",),
    norms=(("attention_norm", QKV), ("mlp_norm", ("router", "expert_up"))),
    writers=("attention_out", "expert_down"),
    product=None,
    expert_product=("expert_up", "expert_down"),
)
# the same with an expert for all tokens beside them
SHARED_EXPERTS = replace(
    EXPERTS,
    sites=(*EXPERTS.sites, ("gate", "up"), ("down",)),
    transformed=("expert_down", "down"),
    norms=(("attention_norm", QKV), ("mlp_norm", ("router", "expert_up", "gate", "up"))),
    writers=("attention_out", "expert_down", "down"),
    product=("up", "down"),
)
# the same with gate/up in one module
FUSED_POST_NORM_DECODER = replace(
    POST_NORM_DECODER,
    sites=(QKV, ("attention_out",), ("gate_up",), ("down",)),
    norms=(("attention_norm", QKV), ("mlp_norm", ("gate_up",))),
    product=("gate_up", "down"),
)
# one norm -> attention beside two linears
PARALLEL_DECODER = LayerKind(
    sites=((*QKV, "up"), ("attention_out",), ("down",)),
    norms=(("norm", (*QKV, "up")),),
    value=("v", "attention_out"),
    no_rotation="its norms subtract a mean, which a rotation would change",
)
# the same beside a gated MLP
GATED_PARALLEL_DECODER = replace(
    PARALLEL_DECODER,
    sites=((*QKV, "gate", "up"), ("attention_out",), ("down",)),
    norms=(("norm", (*QKV, "gate", "up")),),
    product=("up", "down"),
)


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
