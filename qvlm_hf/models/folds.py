"""Where rotation and scales fold into weights: the paths between the modules of a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvlm_hf.models.families import find_layers, find_parts
from qvlm_hf.models.graph import Segment, get_linear, head_name
from qvlm_hf.models.layer_kinds import LayerKind

__all__ = ["RotationPlan", "ScalePath", "ValuePath", "rotation_plan", "scale_paths"]


@dataclass(frozen=True)
class ValuePath:
    """The way of the attention values: from `value`, mixed over positions by head, to `output`."""

    value: nn.Linear
    output: nn.Linear
    head_dim: int


@dataclass(frozen=True)
class ScalePath:
    """The way of a site's input, channel by channel.

    Attributes:
        source: a norm or linear module; a factor on an output channel is undone in the readers.
        readers: all modules that read the channels.
        width: channels that stay together where grouped queries repeat the source's: a head, or
            all.
    """

    source: nn.Module
    readers: tuple[nn.Linear, ...]
    width: int


@dataclass(frozen=True, kw_only=True)
class RotationPlan:
    """What a rotation folds into the weights of a model.

    Attributes:
        norms: normalisation, and the linear modules that read its output and nothing else.
        embeddings: of tokens, the first writer of the language model's residual stream.
        writers: linear modules that add to that stream, or take the place of embeddings.
        readers: linear modules that read the stream through a norm, the head among them.
        values: value paths of every attention layer.
        head: the output head.
    """

    norms: tuple[tuple[nn.Module, tuple[nn.Linear, ...]], ...]
    embeddings: Any
    writers: tuple[nn.Linear, ...]
    readers: tuple[nn.Linear, ...]
    values: tuple[ValuePath, ...]
    head: nn.Linear


def rotation_plan(model: nn.Module) -> RotationPlan:
    """Finds what a rotation touches in a model.

    Raises:
        ValueError: as `resolve`.
    """
    parts = find_parts(model)
    names = {module: name for name, module in model.named_modules()}

    def linears(layer: nn.Module, paths: Sequence[str]) -> tuple[nn.Linear, ...]:
        return tuple(get_linear(model, f"{names[layer]}.{path}") for path in paths)

    head = get_linear(model, head_name(model))
    norms: list[tuple[nn.Module, tuple[nn.Linear, ...]]] = [(parts.final_norm, (head,))]
    writers = [*linears(parts.projector, parts.projector_kind.writers)]
    readers: list[nn.Linear] = []
    values = []
    for part in (parts.vision, parts.language):
        for layer, kind in find_layers(part):
            for norm, paths in kind.norms:
                found = linears(layer, paths)
                norms.append((layer.get_submodule(norm), found))
                readers += found if part is parts.language else ()
            writers += linears(layer, kind.writers) if part is parts.language else ()
            if kind.value is not None:
                value, output = linears(layer, kind.value)
                values.append(ValuePath(value, output, _head_dim(part.config)))
    return RotationPlan(
        norms=tuple(norms),
        embeddings=parts.embeddings,
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
        for layer in (layer for layer in segment.layers if not layer.dead):
            plain = {site.name for site in layer.sites if site.hadamard is None}
            for source, paths, width in _sources(layer.kind, _head_dim(config)):
                if f"{layer.name}.{paths[0]}" in plain:
                    readers = tuple(get_linear(layer.module, path) for path in paths)
                    width = width or readers[0].in_features
                    found.append(ScalePath(layer.module.get_submodule(source), readers, width))
    return tuple(found)


def _sources(kind: LayerKind, head_dim: int) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """What writes the input of a site, its readers, and the width if it is not all channels."""
    for norm, readers in kind.norms:
        yield norm, readers, None
    if kind.value is not None:
        yield kind.value[0], kind.value[1:], head_dim
    if kind.product is not None:
        yield kind.product[0], kind.product[1:], None


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
