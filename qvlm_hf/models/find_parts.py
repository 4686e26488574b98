"""A family's row laid over a model: its parts, and its layers with how each is wired."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from types import SimpleNamespace
from typing import Any

from torch import nn

from qvlm_hf.models.families import FAMILIES, check_row, has_row
from qvlm_hf.models.layer_kinds import LAYER_KINDS
from qvlm_hf.models.parts import PartNames
from qvlm_hf.models.wirings import LayerKind

__all__ = [
    "Parts",
    "component_finder",
    "find_layers",
    "find_parts",
    "get_module",
    "layer_kind",
    "module_paths",
    "path_below",
]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The modules of a model that a row and Transformers name.

    Attributes:
        vision: the vision tower.
        vision_layers: its layers, list by list in execution order; none if it is left out.
        projector: between tower and decoder.
        projector_kind: its wiring.
        feature_norm: the norm in the tower whose output the projector alone reads, if there is one.
        further: a list of projectors like it, which write into later layers; may be empty.
        language: the decoder.
        embeddings: of tokens.
        written: parameters that stand in the residual stream like embeddings.
        head: the output head; None for a model without one.
    """

    vision: Any
    vision_layers: tuple[list[tuple[nn.Module, LayerKind]], ...]
    projector: nn.Module
    projector_kind: LayerKind
    feature_norm: nn.Module | None
    further: nn.ModuleList
    language: Any
    embeddings: Any
    written: tuple[nn.Parameter, ...]
    head: nn.Module | None

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        """All of them, the one that writes embeddings first."""
        return (self.projector, *self.further)


def find_parts(model: Any) -> Parts:
    """Finds the parts of a model, with or without its output head.

    Raises:
        ValueError: the family has no row, or a part is missing.
    """
    check_row(model)
    family = FAMILIES[model.config.model_type]
    projector = get_module(model.base_model, family.projector)
    _check_named(projector, family.projector_kind)
    vision = model.get_encoder("image")
    left_out = {get_module(model.base_model, path) for path in family.unquantized}
    vision_layers = () if vision in left_out else _layer_lists(vision)
    return Parts(
        vision=vision,
        vision_layers=vision_layers,
        projector=projector,
        projector_kind=family.projector_kind,
        feature_norm=_last_norm(vision, vision_layers) if family.reads_output else None,
        further=_get_list(model.base_model, family.further),
        language=_without_head(model.get_decoder()),
        embeddings=model.get_input_embeddings(),
        written=tuple(map(model.base_model.get_parameter, family.written)),
        head=model.get_output_embeddings(),
    )


def _without_head(decoder: Any) -> Any:
    """Llama 4 answers with a decoder that has the output head."""
    return getattr(decoder, "model", decoder)


def _check_named(projector: nn.Module, kind: LayerKind) -> None:
    """Refuses a projector of more linear modules than its row names: its last one writes."""
    named = {path for site in kind.sites for path in site}
    for path, module in projector.named_modules():
        if isinstance(module, nn.Linear) and path not in named:
            raise ValueError(_unsupported(f"{path} of a {type(projector).__name__}", sorted(named)))


def find_layers(decoder: Any) -> list[tuple[nn.Module, LayerKind]]:
    """Finds the layers of a decoder in execution order, and how each is wired.

    Raises:
        ValueError: none is of a known class, or some are not.
    """
    return [layer for layers in _layer_lists(decoder) for layer in layers]


def _layer_lists(part: Any) -> tuple[list[tuple[nn.Module, LayerKind]], ...]:
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    lists = [layers for layers in lists if any(map(layer_kind, layers))] or lists[:1]
    found = [[(layer, layer_kind(layer)) for layer in layers] for layers in lists]
    unknown = [layer for layers in found for layer, known in layers if known is None]
    if unknown or not any(found):
        layer_class = type((unknown or [part])[0]).__name__
        raise ValueError(
            _unsupported(f"{layer_class} (of a {part.config.model_type!r})", LAYER_KINDS)
        )
    return tuple([(layer, known) for layer, known in layers if known] for layers in found)


def layer_kind(layer: nn.Module) -> LayerKind | None:
    """How a layer is wired; None where no line of the table is for it."""
    for line, kind in LAYER_KINDS.items():
        name, _, part = line.partition(".")
        with suppress(AttributeError):
            if name == type(layer).__name__ and layer.get_submodule(part):
                return kind
    return None


def module_paths(layer: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Paths below a layer; a list of modules (experts that are split) stands for all of them."""
    found: list[str] = []
    for path in paths:
        with suppress(AttributeError):
            if isinstance(every := layer.get_submodule(path), nn.ModuleList):
                found += (f"{path}.{index}" for index in range(len(every)))
                continue
        found.append(path)
    return tuple(found)


def component_finder(model: Any) -> Callable[[str], str]:
    """Makes a function from a name to its component, "other" if it has none.

    A projector is found by its row alone.

    Returns:
        It takes canonical names, and names of tensors as files hold them in other layouts.

    Raises:
        ValueError: as `find_parts`.
    """
    parts = find_parts(model) if has_row(model) else _parts_without_row(model)
    found = {  # the first match counts: one part may lie in another
        parts.projector: "projector",
        parts.further: "projector",
        parts.vision: "vision",
        parts.embeddings: "embeddings",
        parts.head: "head",
        parts.language: "language",
    }
    paths = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    marks = {paths[module]: component for module, component in found.items() if module in paths}

    def component_of(name: str) -> str:
        path = name.split(".")
        return next((component for mark, component in marks.items() if mark in path), "other")

    return component_of


def _parts_without_row(model: Any) -> Any:
    where, embeddings = PartNames.of(model), None
    with suppress(NotImplementedError):  # of models that read more than one kind of token
        embeddings = model.get_input_embeddings()
    return SimpleNamespace(
        vision=None if where.vision is None else model.get_submodule(where.vision),
        projector=None,
        further=None,
        language=model.get_submodule(where.language),
        embeddings=embeddings,
        head=model.get_output_embeddings(),
    )


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path.

    Raises:
        ValueError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no module {path!r}, where this version looks for it: load "
            f"the model with AutoModelForImageTextToText."
        ) from error


def path_below(name: str, path: str) -> str:
    """The path of a module below another, which may be that one itself: ""."""
    return f"{name}.{path}" if path else name


def _last_norm(tower: nn.Module, lists: tuple[list[tuple[nn.Module, LayerKind]], ...]) -> Any:
    """The norm behind the last layer, if there is one: versions differ in its path's beginning."""
    *_, (_, kind) = (layer for layers in lists for layer in layers)
    ends = (f".{name}".endswith(f".{kind.last_norm}") for name, _ in tower.named_modules())
    return next(compress(tower.modules(), ends), None) if kind.last_norm else None


def _get_list(model: nn.Module, path: str) -> nn.ModuleList:
    """The list at a path, an empty one without a path."""
    return get_module(model, path) if path else nn.ModuleList()  # type: ignore[return-value]


def _unsupported(what: str, known: Any) -> str:
    """Says what is not in a table, for messages."""
    return (
        f"{what} is not supported: this version knows {', '.join(sorted(known))} "
        f"(docs/contributing.md shows how to add one)."
    )
