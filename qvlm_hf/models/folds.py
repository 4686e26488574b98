"""Where rotation and scales fold into weights: the paths between the modules of a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from qvlm_hf.models.find_parts import find_layers, find_parts, get_module, module_paths, path_below
from qvlm_hf.models.graph import Layer, Segment, get_linear, head_name
from qvlm_hf.models.layer_kinds import OFFSET_NORMS
from qvlm_hf.models.parts import is_norm

__all__ = [
    "RotationPlan",
    "ScalePath",
    "ValuePath",
    "norm_offset",
    "rotation_plan",
    "scale_paths",
    "why_not_rotatable",
]


@dataclass(frozen=True)
class ValuePath:
    """The way of the attention values: from `value`, mixed over positions by head, to `output`.

    Attributes:
        value: its last `channels` outputs are the values.
        output: reads them.
        head_dim: channels of a head.
        channels: of all heads.
    """

    value: nn.Linear
    output: nn.Linear
    head_dim: int
    channels: int


@dataclass(frozen=True)
class ScalePath:
    """The way of a site's input, channel by channel.

    Attributes:
        source: a norm or linear module; a factor on an output channel is undone in the readers.
        readers: all modules that read the channels.
        width: channels that stay together where the readers' input repeats the source's: a head
            of grouped queries, one, or all.
        channels: the last outputs of the source, which the readers read.
    """

    source: nn.Module
    readers: tuple[nn.Linear, ...]
    width: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class RotationPlan:
    """What a rotation folds into the weights of a model.

    Attributes:
        norms: normalisation, and the linear modules that read its output and nothing else.
        embeddings: of tokens, the first writer of the language model's residual stream.
        written: parameters that stand in that stream like embeddings.
        writers: linear modules that add to that stream, or take the place of embeddings.
        readers: linear modules that read the stream through a norm, the head among them.
        values: value paths of every attention layer that does not gate them.
        head: the output head.
    """

    norms: tuple[tuple[nn.Module, tuple[nn.Linear, ...]], ...]
    embeddings: Any
    written: tuple[nn.Parameter, ...]
    writers: tuple[nn.Linear, ...]
    readers: tuple[nn.Linear, ...]
    values: tuple[ValuePath, ...]
    head: nn.Linear


def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its `weight` before it multiplies by it."""
    return 1.0 if type(norm).__name__ in OFFSET_NORMS else 0.0


def why_not_rotatable(model: nn.Module) -> str:
    """Says which layers keep a rotation from a model, and why; empty where it can be rotated.

    Raises:
        ValueError: as `resolve`.
    """
    parts = find_parts(model)
    writing = [(projector, parts.projector_kind) for projector in parts.projectors]
    return next(
        (
            f"{type(layer).__name__} cannot be rotated, because {kind.no_rotation}"
            for layer, kind in (*writing, *find_layers(parts.language))
            if kind.no_rotation
        ),
        "",
    )


def rotation_plan(model: nn.Module) -> RotationPlan:
    """Finds what a rotation touches in a model.

    Raises:
        ValueError: the residual stream cannot be rotated, or as `resolve`.
    """
    parts = find_parts(model)
    names = {module: name for name, module in model.named_modules()}

    def linears(layer: nn.Module, paths: Sequence[str]) -> tuple[nn.Linear, ...]:
        return _linears(model, layer, paths, names[layer])

    if reason := why_not_rotatable(model):
        raise ValueError(f"rotation='hadamard': {reason}: use rotation=None.")
    decoder = find_layers(parts.language)
    head = get_linear(model, head_name(model))
    norms: list[tuple[nn.Module, tuple[nn.Linear, ...]]]
    norms = [(next(filter(is_norm, parts.language.children())), (head,))]
    projectors = [(projector, parts.projector_kind) for projector in parts.projectors]
    writers = [linear for layer, kind in projectors for linear in linears(layer, kind.writers)]
    readers: list[nn.Linear] = []
    values = []
    for part, layers in (
        (parts.vision, [*chain(*parts.vision_layers), *projectors]),
        (parts.language, decoder),
    ):
        for layer, kind in layers:
            for norm, paths in kind.norms:
                found = linears(layer, paths)
                norms.append((layer.get_submodule(norm), found))
                readers += found if part is parts.language else ()
            writers += linears(layer, kind.writers) if part is parts.language else ()
            if kind.value is not None and not kind.gated:
                value, output = linears(layer, kind.value)
                channels = _value_channels(value, output)
                values.append(ValuePath(value, output, _head_dim(output, part.config), channels))
    return RotationPlan(
        norms=tuple(norms),
        embeddings=parts.embeddings,
        written=parts.written,
        writers=tuple(writers),
        readers=(*readers, head),
        values=tuple(values),
        head=head,
    )


def scale_paths(model: nn.Module, segments: Sequence[Segment]) -> tuple[ScalePath, ...]:
    """Finds the paths of all live sites that have one and no online transform, in execution order.

    Raises:
        ValueError: as `resolve`.
    """
    parts = find_parts(model)
    found = []
    for segment in segments:
        config = (parts.vision if segment.component == "vision" else parts.language).config
        feature_norm = parts.feature_norm if segment.component == "projector" else None
        for layer in (layer for layer in segment.layers if not layer.dead):
            plain = {site.name for site in layer.sites if site.hadamard is None}
            for path, names in _scale_paths(layer, config, feature_norm):
                if any(path_below(layer.name, name) in plain for name in names):
                    found.append(path)
    return tuple(found)


def _scale_paths(
    layer: Layer, config: Any, feature_norm: nn.Module | None
) -> Iterator[tuple[ScalePath, tuple[str, ...]]]:
    """The paths of a layer, and the names of their readers below it."""

    def linears(names: Sequence[str]) -> tuple[nn.Linear, ...]:
        return _linears(layer.module, layer.module, names)

    norms = [
        (layer.module.get_submodule(norm), names)
        for norm, names in (*layer.kind.norms, *layer.kind.inner_norms)
    ]
    if feature_norm is not None:
        norms.append((feature_norm, layer.kind.sites[0]))
    for source, names in norms:
        channels = source.get_parameter("weight").numel()
        width = 1 if layer.kind.interleaved else channels
        yield ScalePath(source, linears(names), width, channels), module_paths(layer.module, names)
    if layer.kind.value is not None:
        value, output = linears(layer.kind.value)
        channels, width = _value_channels(value, output), _head_dim(output, config)
        yield ScalePath(value, (output,), width, channels), layer.kind.value[1:]
    if layer.kind.product is not None:
        factor, reader = linears(layer.kind.product)
        width = reader.in_features
        yield ScalePath(factor, (reader,), width, width), layer.kind.product[1:]
    if layer.kind.expert_product is not None:
        first, last = (module_paths(layer.module, [path]) for path in layer.kind.expert_product)
        for source, reader in zip(linears(first), linears(last), strict=True):
            width = reader.in_features
            yield ScalePath(source, (reader,), width, width), last


def _linears(
    model: nn.Module, layer: nn.Module, paths: Sequence[str], prefix: str = ""
) -> tuple[nn.Linear, ...]:
    """The linear modules at paths below a layer; a router may be of a class of its own."""
    found = []
    for path in module_paths(layer, paths):
        module: Any = get_module(layer, path)
        router = type(module) is not nn.Linear and "Router" in type(module).__name__
        found.append(module if router else get_linear(model, f"{prefix}.{path}".lstrip(".")))
    return tuple(found)


def _value_channels(value: nn.Linear, output: nn.Linear) -> int:
    """Channels of the values; queries, keys and values in one module have more than queries."""
    fused = value.out_features > output.in_features
    return (value.out_features - output.in_features) // 2 if fused else value.out_features


def _head_dim(output: nn.Linear, config: Any) -> int:
    """Channels of a head: `output` reads all heads; configurations may not tell."""
    return output.in_features // config.num_attention_heads
