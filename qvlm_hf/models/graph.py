"""Which modules of a model family are quantized, and which of them share an input: data, and the walk that reads it.

A family is a row in a table. `resolve` lays the rows over a real model and returns its segments in
execution order, each a tuple of layers, each a tuple of sites (one input tensor and the linear
modules that read it). Whatever is an nn.Linear of the model and in no row stays in full precision;
the report lists it. `rotation_plan` reads from the same rows what a rotation must touch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvlm_hf.format.hadamard import largest_block

__all__ = [
    "Layer",
    "RotationPlan",
    "ScalePath",
    "Segment",
    "Site",
    "ValuePath",
    "canonical_name",
    "full_precision_modules",
    "get_linear",
    "matches",
    "output_head",
    "resolve",
    "rotation_plan",
    "scale_paths",
    "shared_inputs",
    "why_empty",
]


@dataclass(frozen=True)
class Site:
    """One input tensor and the linear modules that read it. Names are canonical module names.

    Attributes:
        modules: the readers.
        hadamard: block size of the Hadamard transform that the input goes through at run time, or
            None.
    """

    modules: tuple[str, ...]
    hadamard: int | None = None

    @property
    def name(self) -> str:
        """The first module's name: unique, and what a user would search for."""
        return self.modules[0]


@dataclass(frozen=True)
class Layer:
    """One transformer layer (or the whole projector).

    `dead`: its output reaches nothing (see `vision_feature_layer`).
    """

    name: str
    sites: tuple[Site, ...]
    dead: bool = False


@dataclass(frozen=True)
class Segment:
    """Layers that run one after the other on hidden states of one shape; component is "vision", "projector" or "language"."""

    component: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class ValuePath:
    """The way of the attention values: out of `value`, mixed over positions head by head, into `output`."""

    value: str
    output: str
    head_dim: int


@dataclass(frozen=True)
class ScalePath:
    """The way of a site's input, channel by channel: what `source` (a norm or a linear module) writes, `readers` read.

    Attributes:
        source: its output channels can take a factor that the columns of the readers' weights undo.
        readers: everything that reads them.
        width: channels that stay together where the source's are repeated for several readers'
            (grouped queries): a head, or all.
    """

    source: str
    readers: tuple[str, ...]
    width: int


@dataclass(frozen=True, kw_only=True)
class RotationPlan:
    """What a rotation folds into the weights of a model.

    Attributes:
        norms: normalisation -> the linear modules that read its output and nothing else.
        embeddings: the token embeddings, the first writer of the language model's residual stream.
        writers: linear modules whose output is added to that stream (or, for the projector's, takes
            the place of embeddings).
        readers: linear modules that read it through a norm.
        values: value paths of every attention layer.
        head: the output head, one of `readers`.
    """

    norms: dict[str, tuple[str, ...]]
    embeddings: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    values: tuple[ValuePath, ...]
    head: str


@dataclass(frozen=True, kw_only=True)
class _Family:
    vision_layers: str
    projector: str
    language_layers: str
    embeddings: str
    final_norm: str
    head: str


@dataclass(frozen=True, kw_only=True)
class _LayerKind:
    """A kind of transformer layer (or projector); names are relative to it.

    `sites`: which modules share an input, in execution order. `transformed`: sites (by first
    module) that a rotation gives an online
    Hadamard transform. `norms`: norm -> its readers. `writers`: modules that add to the residual
    stream. `value`: modules of a ValuePath.
    `product`: a module that an elementwise product passes on unchanged but for a factor, and its
    reader.
    """

    sites: tuple[tuple[str, ...], ...]
    transformed: tuple[str, ...] = ()
    norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    writers: tuple[str, ...] = ()
    value: tuple[str, str] | None = None
    product: tuple[str, str] | None = None


_FAMILIES = {
    "llava": _Family(
        vision_layers="model.vision_tower.encoder.layers",
        projector="model.multi_modal_projector",
        language_layers="model.language_model.layers",
        embeddings="model.language_model.embed_tokens",
        final_norm="model.language_model.norm",
        head="lm_head",
    ),
}
_PROJECTORS = {
    "llava": _LayerKind(
        sites=(("linear_1",), ("linear_2",)),
        transformed=("linear_1", "linear_2"),
        writers=("linear_2",),
    ),
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ENCODERS = {
    "clip_vision_model": _LayerKind(
        sites=(_QKV, ("self_attn.out_proj",), ("mlp.fc1",), ("mlp.fc2",)),
        transformed=("self_attn.q_proj", "mlp.fc1", "mlp.fc2"),
        norms=(("layer_norm1", _QKV), ("layer_norm2", ("mlp.fc1",))),
        value=("self_attn.v_proj", "self_attn.out_proj"),
    ),
}
_DECODERS = {
    "llama": _LayerKind(
        sites=(_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
        transformed=("mlp.down_proj",),
        norms=(
            ("input_layernorm", _QKV),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        writers=("self_attn.o_proj", "mlp.down_proj"),
        value=("self_attn.v_proj", "self_attn.o_proj"),
        product=("mlp.up_proj", "mlp.down_proj"),
    ),
}


def canonical_name(name: str) -> str:
    """The name that config.json uses: `.vision_model.` is dropped, because Transformers versions differ in it."""
    return name.replace(".vision_model.", ".")


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` names the module `name` or a part of the model that holds it.

    A pattern is a run of whole path components: a full path, a prefix ("model.vision_tower"), a
    suffix ("mlp.down_proj") or one component ("vision_tower"); "layers.1" never matches
    "layers.10".
    """
    parts, wanted = canonical_name(name).split("."), canonical_name(pattern).split(".")
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts) - len(wanted) + 1))


def resolve(
    model: nn.Module,
    *,
    quantize_vision: bool = True,
    quantize_projector: bool = True,
    modules_to_not_convert: Sequence[str] = (),
    rotated: bool = False,
) -> tuple[Segment, ...]:
    """Lays the family table over a model.

    Args:
        model: a Transformers model of a known family; its modules may be on the meta device.
        quantize_vision: include the vision encoder.
        quantize_projector: include the projector.
        modules_to_not_convert: patterns (see `matches`) of modules that stay in full precision.
        rotated: whether the sites get the online transforms that belong to a rotation.

    Returns:
        The segments in execution order. A layer all of whose sites are excluded stays in its place
        with no sites; a segment without any site is left out.

    Raises:
        ValueError: unknown family or layer kind; a pattern that matches no module; a listed module
            is missing or no nn.Linear; nothing is left to quantize.
    """
    config: Any = model.config
    family, projector, encoder, decoder = _rows(config)
    names = {
        canonical_name(name) for name, _ in model.named_modules() if name
    }  # the model itself, "", is no module to name
    for pattern in modules_to_not_convert:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} matches no module: give a module path, a "
                f"suffix of it or a component name."
            )

    def layer(name: str, kind: _LayerKind, *, dead: bool = False) -> Layer:
        kept = []
        for group in kind.sites:
            paths = (f"{name}.{module}" for module in group)
            modules = tuple(
                path
                for path in paths
                if not any(matches(path, pattern) for pattern in modules_to_not_convert)
            )
            widths = [get_linear(model, path).in_features for path in modules]
            if modules:
                kept.append(
                    Site(
                        modules,
                        largest_block(widths[0])
                        if rotated and group[0] in kind.transformed
                        else None,
                    )
                )
        return Layer(name, tuple(kept), dead)

    segments = []
    if quantize_vision:
        count = len(_get(model, family.vision_layers))  # type: ignore[arg-type]
        used = _used_layers(config.vision_feature_layer, count)
        segments.append(
            Segment(
                "vision",
                tuple(
                    layer(f"{family.vision_layers}.{i}", encoder, dead=i >= used)
                    for i in range(count)
                ),
            )
        )
    if quantize_projector:
        segments.append(Segment("projector", (layer(family.projector, projector),)))
    count = len(_get(model, family.language_layers))  # type: ignore[arg-type]
    segments.append(
        Segment(
            "language", tuple(layer(f"{family.language_layers}.{i}", decoder) for i in range(count))
        )
    )
    segments = [segment for segment in segments if any(entry.sites for entry in segment.layers)]
    if not segments:
        raise ValueError("modules_to_not_convert: leaves no module to quantize: shorten it.")
    return tuple(segments)


def rotation_plan(model: nn.Module) -> RotationPlan:
    """What a rotation touches in a model.

    Raises:
        ValueError: as `resolve`.
    """
    config: Any = model.config
    family, projector, encoder, decoder = _rows(config)
    vision = [f"{family.vision_layers}.{i}" for i in range(len(_get(model, family.vision_layers)))]  # type: ignore[arg-type]
    count = len(_get(model, family.language_layers))  # type: ignore[arg-type]
    language = [f"{family.language_layers}.{i}" for i in range(count)]
    norms: dict[str, tuple[str, ...]] = {family.final_norm: (family.head,)}
    values = []
    for names, kind, part in (
        (vision, encoder, config.vision_config),
        (language, decoder, config.text_config),
    ):
        for name in names:
            norms |= {
                f"{name}.{norm}": tuple(f"{name}.{reader}" for reader in readers)
                for norm, readers in kind.norms
            }
            head_dim = (
                getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
            )
            if kind.value is not None:
                values.append(
                    ValuePath(f"{name}.{kind.value[0]}", f"{name}.{kind.value[1]}", head_dim)
                )
    readers = [
        f"{name}.{reader}"
        for name in language
        for _, readers in decoder.norms
        for reader in readers
    ]
    writers = [f"{name}.{writer}" for name in language for writer in decoder.writers]
    return RotationPlan(
        norms=norms,
        embeddings=family.embeddings,
        writers=(*(f"{family.projector}.{writer}" for writer in projector.writers), *writers),
        readers=(*readers, family.head),
        values=tuple(values),
        head=family.head,
    )


def scale_paths(model: nn.Module, segments: Sequence[Segment]) -> tuple[ScalePath, ...]:
    """The paths of all live sites that have one and no online transform, in execution order.

    Raises:
        ValueError: as `resolve`.
    """
    config: Any = model.config
    _, _, encoder, decoder = _rows(config)
    paths = []
    for segment in segments:
        kind, part = (
            (encoder, config.vision_config)
            if segment.component == "vision"
            else (decoder, config.text_config)
        )
        for layer in segment.layers if segment.component != "projector" else ():
            plain = {site.name for site in layer.sites if site.hadamard is None and not layer.dead}
            head_dim = (
                getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
            )
            sources = [(norm, readers, None) for norm, readers in kind.norms]
            sources += [(kind.value[0], kind.value[1:], head_dim)] if kind.value else []
            sources += [(kind.product[0], kind.product[1:], None)] if kind.product else []
            for source, readers, width in sources:
                names = tuple(f"{layer.name}.{reader}" for reader in readers)
                if names[0] in plain:
                    paths.append(
                        ScalePath(
                            f"{layer.name}.{source}",
                            names,
                            width or get_linear(model, names[0]).in_features,
                        )
                    )
    return tuple(paths)


def shared_inputs(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Full names of the modules that read one tensor wherever there are several, quantized or not; empty for an unknown family.

    Args:
        model: of a family, whole or without its output head (then names lack a prefix).
    """
    config: Any = model.config
    if config.model_type not in _FAMILIES:
        return ()
    _, _, encoder, decoder = _rows(config)
    sites = dict.fromkeys(
        site for kind in (encoder, decoder) for site in kind.sites if len(site) > 1
    )
    found = [
        (name.removesuffix(site[0]), site)
        for name, _ in model.named_modules()
        for site in sites
        if name.endswith(f".{site[0]}")
    ]
    return tuple(tuple(layer + module for module in site) for layer, site in found)


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear of that name.

    Raises:
        ValueError: there is none, or it is of another class.
    """
    module = _get(model, name)
    # exact type: subclasses may read .weight themselves (attention's NonDynamicallyQuantizableLinear)
    if type(module) is not nn.Linear:
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} carries a PEFT adapter: merge or unload the adapter, and quantize the "
                f"model that is left."
            )
        kind = f"{name} is a {type(module).__name__}, not nn.Linear"
        if hasattr(module, "dequantize"):
            raise ValueError(f"{kind}, and quantized already: call model.dequantize() first.")
        raise ValueError(
            f"{kind}: only plain ones are quantized; modules_to_not_convert= leaves it out."
        )
    return module


def why_empty(module: nn.Module) -> str:
    """Why the tensors of a module lie on the meta device, and what to do, for messages."""
    if hasattr(module, "_hf_hook"):  # accelerate's, which brings them when the module runs
        return "is offloaded: load the model without offloading (no disk or cpu in device_map)"
    return (
        "has no values, it lies on the meta device: load the weights first, as from_pretrained does"
    )


def output_head(model: nn.Module) -> str:
    """Name of the output head, for `lm_head_bits`.

    Raises:
        ValueError: the head shares its weight with the embeddings.
    """
    config: Any = model.config
    name = _row(_FAMILIES, config.model_type, "model_type").head
    get_linear(model, name)
    if config.get_text_config().tie_word_embeddings or config.tie_word_embeddings:
        raise ValueError(
            f"lm_head_bits: {name} shares its weight with the embeddings and cannot be quantized: "
            f"leave it out."
        )
    return name


def full_precision_modules(model: nn.Module, segments: Sequence[Segment]) -> tuple[str, ...]:
    """Canonical names of the nn.Linear modules that no segment quantizes, in model order."""
    quantized = {
        name
        for segment in segments
        for layer in segment.layers
        for site in layer.sites
        for name in site.modules
    }
    return tuple(
        c
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (c := canonical_name(name)) not in quantized
    )


def _used_layers(vision_feature_layer: int | Sequence[int], count: int) -> int:
    """How many encoder layers reach the projector: hidden state i is the output of layer i-1, negative i count from the end."""
    indices = (
        [vision_feature_layer]
        if isinstance(vision_feature_layer, int)
        else list(vision_feature_layer)
    )
    return max(index if index >= 0 else count + 1 + index for index in indices)


def _rows(config: Any) -> tuple[_Family, _LayerKind, _LayerKind, _LayerKind]:
    """The rows of a model: family, projector, encoder layer, decoder layer."""
    family = _row(_FAMILIES, config.model_type, "model_type")
    encoder = _row(_ENCODERS, config.vision_config.model_type, "vision_config.model_type")
    decoder = _row(_DECODERS, config.text_config.model_type, "text_config.model_type")
    return family, _PROJECTORS[config.model_type], encoder, decoder


def _row(table: dict[str, Any], key: str, what: str) -> Any:
    if key not in table:
        raise ValueError(
            f"{what} {key!r} is not supported: this version knows {', '.join(sorted(table))} "
            f"(docs/contributing.md shows how to add one)."
        )
    return table[key]


def _get(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(_why_missing(model, path)) from error


def _why_missing(model: nn.Module, path: str) -> str:
    """Why a model has no module of that name: it has no head, or is something else."""
    kind = type(model).__name__
    if path.partition(".")[2] in dict(model.named_modules()):
        return (
            f"{kind} is the model without its output head: quantize the whole one, as "
            f"AutoModelForImageTextToText loads it; "
            f"what is saved loads as {kind} too."
        )
    return f"{kind} has no module {path!r}, where this version looks for it: load the model with AutoModelForImageTextToText."
