"""What is quantized of a model: segments of layers of sites, in execution order.

A site is one input tensor and the linear modules that read it. The same module of all experts of a
layer is one site too, each reading the tokens that it gets. `resolve` lays the tables (families.py,
layer_kinds.py) over a model. An nn.Linear that is in no site stays in full precision,
and the report lists it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import nn

from qvlm_hf.format.hadamard import largest_block
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.families import has_row
from qvlm_hf.models.find_parts import find_layers, find_parts, get_module, module_paths, path_below
from qvlm_hf.models.wirings import LayerKind

__all__ = [
    "Layer",
    "Segment",
    "Selection",
    "Site",
    "canonical_name",
    "full_precision_modules",
    "get_linear",
    "head_name",
    "matches",
    "output_head",
    "resolve",
    "shared_inputs",
    "why_empty",
]


@dataclass(frozen=True)
class Site:
    """One input tensor and the linear modules that read it.

    Attributes:
        modules: canonical names of the readers.
        hadamard: block size of the Hadamard transform of the input at run time, or None.
        linears: the readers, as they were when the model was resolved.
        experts: whether every reader is an expert's, and reads the tokens that this one gets.
    """

    modules: tuple[str, ...]
    hadamard: int | None = None
    linears: tuple[nn.Linear, ...] = field(default=(), compare=False, repr=False)
    experts: bool = False

    @property
    def name(self) -> str:
        """The first module's name: unique, and what a user would search for."""
        return self.modules[0]

    @property
    def parts(self) -> tuple["Site", ...]:
        """Sites of one input tensor: itself, or one an expert."""
        if not self.experts:
            return (self,)
        pairs = zip(self.modules, self.linears, strict=True)
        return tuple(
            replace(self, modules=(name,), linears=(linear,), experts=False)
            for name, linear in pairs
        )


@dataclass(frozen=True)
class Layer:
    """One transformer layer, or the whole projector.

    Attributes:
        name: canonical name.
        sites: in execution order; none if all are excluded.
        dead: whether the output reaches nothing (see `vision_feature_layer`).
        module: the layer itself.
        kind: its wiring.
    """

    name: str
    sites: tuple[Site, ...]
    dead: bool = False
    module: Any = field(default=None, compare=False, repr=False)
    kind: LayerKind = field(default=LayerKind(sites=()), compare=False, repr=False)


@dataclass(frozen=True)
class Segment:
    """Layers that run one after the other on hidden states of one shape.

    Attributes:
        component: "vision", "projector" or "language".
        layers: in execution order.
        packed: tokens have no fixed place in a row, so that positions mean nothing.
    """

    component: str
    layers: tuple[Layer, ...]
    packed: bool = False

    @property
    def name(self) -> str:
        """The first layer's name: a model may have several projectors."""
        return self.layers[0].name

    @property
    def sites(self) -> tuple[Site, ...]:
        """Those of all layers, in execution order."""
        return tuple(site for layer in self.layers for site in layer.sites)


def canonical_name(name: str) -> str:
    """Drops a tower's `.vision_model` from a name: Transformers versions differ in it."""
    return name.replace("_tower.vision_model.", "_tower.")


def matches(name: str, pattern: str) -> bool:
    """Tells whether `pattern` names the module `name` or a part of the model that holds it.

    A pattern is a run of whole path components: a full path, a prefix ("model.vision_tower"), a
    suffix ("mlp.down_proj") or one component ("vision_tower"); "layers.1" never matches
    "layers.10".
    """
    parts, wanted = canonical_name(name).split("."), canonical_name(pattern).split(".")
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts) - len(wanted) + 1))


@dataclass(frozen=True)
class Selection:
    """What of a model is to be quantized; by default all.

    Attributes:
        quantize_vision, quantize_projector: whether these parts are.
        modules_to_not_convert: patterns (see `matches`) of modules that stay in full precision.
    """

    quantize_vision: bool = True
    quantize_projector: bool = True
    modules_to_not_convert: Sequence[str] = ()

    def wants(self, component: str) -> bool:
        """Whether a part of the model is to be quantized."""
        switches = {"vision": self.quantize_vision, "projector": self.quantize_projector}
        return switches.get(component, True)

    def excludes(self, name: str) -> bool:
        """Whether a pattern is for this module."""
        return any(matches(name, pattern) for pattern in self.modules_to_not_convert)

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a pattern that matches no module."""
        names = [name for name, _ in model.named_modules() if name]
        for pattern in self.modules_to_not_convert:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"modules_to_not_convert: {pattern!r} matches no module: give a module path, a "
                    f"suffix of it or a component name."
                )


EVERYTHING = Selection()


def resolve(
    model: Any, selection: Selection = EVERYTHING, *, rotated: bool = False
) -> tuple[Segment, ...]:
    """Finds the segments of a model.

    Args:
        model: a Transformers model of a known family; its modules may be on the meta device.
        selection: of its modules.
        rotated: whether the sites get the online transforms that belong to a rotation.

    Returns:
        The segments in execution order. A layer all of whose sites are excluded stays in its place
        with no sites; a segment without any site is left out.

    Raises:
        ValueError: unknown family or layer class; a pattern that matches no module; a listed
            module is missing or no nn.Linear; nothing is left to quantize.
    """
    with experts_split(model):
        parts = find_parts(model)
        names = {module: name for name, module in model.named_modules()}
        head_name(model)  # refuses a model without one
        selection.check(model)
        packed = any(kind.packed for layers in parts.vision_layers for _, kind in layers)

        def segment(
            component: str, layers: list[tuple[nn.Module, LayerKind]], used: int
        ) -> Segment:
            made = (
                Layer(
                    canonical_name(names[module]),
                    _sites(model, names[module], kind, selection, rotated),
                    dead=index >= used,
                    module=module,
                    kind=kind,
                )
                for index, (module, kind) in enumerate(layers)
            )
            return Segment(component, tuple(made), packed and component != "language")

        segments = [
            segment("vision", layers, _used_layers(model.config, len(layers)))
            for layers in (parts.vision_layers if selection.quantize_vision else ())
        ]
        segments += [
            segment("projector", [(projector, parts.projector_kind)], 1)
            for projector in (parts.projectors if selection.quantize_projector else ())
        ]
        layers = find_layers(parts.language)
        segments.append(segment("language", layers, len(layers)))
    found = tuple(one for one in segments if one.sites)
    if not found:
        raise ValueError("modules_to_not_convert: leaves no module to quantize: shorten it.")
    return found


def _sites(
    model: nn.Module, layer: str, kind: LayerKind, selection: Selection, rotated: bool
) -> tuple[Site, ...]:
    found = []
    for group in kind.sites:
        modules = module_paths(model.get_submodule(layer), group)
        paths = [path_below(layer, module) for module in modules]
        paths = [path for path in paths if not selection.excludes(path)]
        if paths:
            linears = tuple(get_linear(model, path) for path in paths)
            transformed = rotated and group[0] in kind.transformed
            block = largest_block(linears[0].in_features) if transformed else None
            names = tuple(map(canonical_name, paths))
            found.append(Site(names, block, linears, experts=modules != group))
    return tuple(found)


def shared_inputs(model: Any) -> tuple[tuple[nn.Module, ...], ...]:
    """Finds the modules that read one tensor wherever there are several, quantized or not.

    There are none for a family without a row.
    """
    if not has_row(model):
        return ()
    parts = find_parts(model)
    projectors = [(projector, parts.projector_kind) for projector in parts.projectors]
    return tuple(
        tuple(map(layer.get_submodule, site))
        for layer, kind in chain(*parts.vision_layers, projectors, find_layers(parts.language))
        for site in kind.sites
        if len(site) > 1
    )


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """Returns the nn.Linear of that name.

    Raises:
        ValueError: there is none, or it is of another class.
    """
    module = get_module(model, name)
    # exact type: subclasses may read .weight themselves (NonDynamicallyQuantizableLinear)
    if type(module) is nn.Linear:
        return module
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"{name} carries a PEFT adapter: merge or unload the adapter, and quantize the model "
            f"that is left."
        )
    kind = f"{name} is a {type(module).__name__}, not nn.Linear"
    if hasattr(module, "dequantize"):
        raise ValueError(f"{kind}, and quantized already: call model.dequantize() first.")
    raise ValueError(
        f"{kind}: only plain ones are quantized; modules_to_not_convert= leaves it out."
    )


def why_empty(module: nn.Module) -> str:
    """Says why the tensors of a module lie on the meta device, and what to do, for messages."""
    if hasattr(module, "_hf_hook"):  # accelerate's, which brings them when the module runs
        return "is offloaded: load the model without offloading (device_map='cpu')"
    return (
        "has no values, it lies on the meta device: load the weights first, as from_pretrained does"
    )


def head_name(model: Any) -> str:
    """Returns the name of the output head.

    Raises:
        ValueError: the model has none, or as `find_parts`.
    """
    head = find_parts(model).head
    if head is None:
        kind = type(model).__name__
        raise ValueError(
            f"{kind} is the model without its output head: quantize the whole one, as "
            f"AutoModelForImageTextToText loads it; what is saved loads as {kind} too."
        )
    return next(name for name, module in model.named_modules() if module is head)


def output_head(model: Any) -> str:
    """Returns the name of the output head that `lm_head_bits` quantizes.

    Raises:
        ValueError: there is none, or it shares its weight with the embeddings.
    """
    name = head_name(model)
    get_linear(model, name)
    configs = (model.config, model.config.get_text_config())
    if any(getattr(config, "tie_word_embeddings", False) for config in configs):
        raise ValueError(
            f"lm_head_bits: {name} shares its weight with the embeddings and cannot be quantized: "
            f"leave it out."
        )
    return name


def full_precision_modules(model: nn.Module, segments: Sequence[Segment]) -> tuple[str, ...]:
    """Returns the nn.Linear modules that no segment quantizes: canonical names, in model order."""
    quantized = {name for segment in segments for site in segment.sites for name in site.modules}
    with experts_split(model):
        linears = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    return tuple(name for name in map(canonical_name, linears) if name not in quantized)


def _used_layers(config: Any, count: int) -> int:
    """How many encoder layers reach the projector: hidden state i is the output of layer i - 1."""
    old = getattr(config, "vision_feature_layers", -1)  # VipLLaVA's name for it before 5.x
    chosen = getattr(config, "vision_feature_layer", old)
    indices = [chosen] if isinstance(chosen, int) else chosen
    return max(index if index >= 0 else count + 1 + index for index in indices)
