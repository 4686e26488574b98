"""A model of a family without a row, read by running it once: its segments, layers and sites.

Hooks on every nn.Linear see the tensors that enter it. Linear modules that read the very same
tensor form a site, the repeated entries of a ModuleList form layers, and `get_encoder("image")` and
`get_decoder()` tell vision from language; what lies between is the projector. Where a module of
experts ran, all its experts count as run, whoever got tokens. No fold and no rotation follows from
that, sites alone. What is not quantized is listed with the reason.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.graph import EVERYTHING, Layer, Segment, Selection, Site, get_linear
from qvlm_hf.models.parts import PartNames
from qvlm_hf.models.tracing import Recorder, Trace
from qvlm_hf.models.trial_runs import run_all_parts

__all__ = ["Structure", "StructureError", "read_structure"]


_Place = tuple[str, str, str]  # component, segment, layer


class StructureError(ValueError):
    """Running the model did not reach all of it; the message lists what was found and what not."""


@dataclass(frozen=True)
class Structure:
    """What one run of a model tells about it.

    Attributes:
        segments: as `graph.resolve` gives them; names are those of the model's modules.
        left_out: linear module that no site holds -> why.
        run: what was run: "model" or "parts" (picture and text apart).
        inputs: keyword arguments of the model that it ran on as a whole; empty if it did not.
    """

    segments: tuple[Segment, ...]
    left_out: Mapping[str, str]
    run: str
    inputs: Mapping[str, Any]


def read_structure(model: nn.Module, selection: Selection = EVERYTHING) -> Structure:
    """Runs a model once and tells its segments, layers and sites.

    Args:
        model: of any family, in eval mode, with weights or on the meta device; not changed.
        selection: of its modules; the projector is what lies between vision encoder and language
            model.

    Raises:
        StructureError: the language model could not be run, or the vision encoder could not and is
            to be quantized.
        ValueError: a pattern matches no module.
    """
    with experts_split(model):
        selection.check(model)
    parts = PartNames.of(model)
    recorder = Recorder(model)
    run, ran, problems = run_all_parts(model, recorder, parts)
    trace = recorder.trace
    reached = {parts.component(name) for name in trace.linears}
    tower = model.get_submodule(parts.vision).modules() if parts.vision is not None else ()
    needs_tower = selection.quantize_vision and any(type(module) is nn.Linear for module in tower)
    needed = ("language", "vision") if needs_tower else ("language",)
    missing = [component for component in needed if component not in reached]
    if missing:
        raise StructureError(_message(model, parts, trace, missing, problems))
    with experts_split(model):
        trace.add_experts(model)
        left_out, places = {}, _places(trace, parts)
        for name, (component, _, _) in places.items():
            if reason := _why_not(model, trace, name, selection):
                left_out[name] = reason
            elif not selection.wants(component):
                left_out[name] = f"quantize_{component}=False"
        chosen = {name: place for name, place in places.items() if name not in left_out}
        segments = _segments(model, trace, chosen)
        if not segments:
            raise ValueError("modules_to_not_convert: leaves no module to quantize: shorten it.")
        left_out |= {
            name: "the run did not call it"
            for name, module in model.named_modules()
            if type(module) is nn.Linear and name not in trace.linears
        }
        return Structure(segments, left_out, run, ran)


def _places(trace: Trace, parts: PartNames) -> dict[str, _Place]:
    """Component, segment and layer of every linear module that ran."""
    tower = (
        calls.first
        for name, calls in trace.linears.items()
        if name in trace.layer_of and name.startswith(f"{parts.vision}.")
    )
    after = min(tower, default=math.inf)  # the first call inside a layer of the vision encoder
    return {name: _place(trace, parts, name, after) for name in trace.linears}


def _place(trace: Trace, parts: PartNames, name: str, after: float) -> _Place:
    component = parts.component(name)
    if (layer := trace.layer_of.get(name)) is not None:
        return component, layer.rpartition(".")[0], layer
    prefixes = {"vision": parts.vision, "language": parts.language}
    prefix = prefixes.get(component, parts.between) or ""
    rest = name[len(prefix) + 1 :] if prefix else name
    first, *others = rest.split(".")
    if others and others[0].isdigit() and len(others) > 1:
        first = f"{first}.{others[0]}"
    alone = f"{prefix}.{first}" if prefix else first
    if component == "vision" and trace.linears[name].first > after:
        component = "projector"  # a merger inside the tower
    return component, alone, alone


def _segments(model: nn.Module, trace: Trace, places: Mapping[str, _Place]) -> tuple[Segment, ...]:
    """Sites in layers in segments, each in the order of their first call."""
    tree: dict[tuple[str, str], dict[str, dict[Any, list[str]]]] = {}
    for name in sorted(places, key=lambda one: trace.linears[one].first):
        component, segment, layer = places[name]
        layers = tree.setdefault((component, segment), {})
        layers.setdefault(layer, {}).setdefault(trace.linears[name].inputs, []).append(name)

    def made(layer: str, groups: Iterable[list[str]]) -> Layer:
        linears = ((group, tuple(get_linear(model, name) for name in group)) for group in groups)
        sites = tuple(Site(tuple(group), linears=found) for group, found in linears)
        return Layer(layer, sites, layer in trace.dead)

    return tuple(
        Segment(component, tuple(made(layer, sites.values()) for layer, sites in layers.items()))
        for (component, _), layers in tree.items()
    )


def _why_not(model: nn.Module, trace: Trace, name: str, selection: Selection) -> str | None:
    """Why a linear module that ran stays as it is, or None."""
    if selection.excludes(name):
        return "modules_to_not_convert"
    linear = model.get_submodule(name)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if linear is head:
        return "output head"
    if name in trace.shared:
        return f"its weight is that of {trace.shared[name]} too"
    if linear.weight is next(p for p in model.parameters() if p.is_floating_point()):
        return "the model takes its dtype from this weight"
    if name in trace.read_directly:
        return "the model reads its weight itself"
    return None


def _message(
    model: nn.Module,
    parts: PartNames,
    trace: Trace,
    missing: Sequence[str],
    problems: Sequence[str],
) -> str:
    """What ran and what did not, of every part; and what can be done about it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    parts_of = {
        name: parts.component(name)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    total = Counter(parts_of.values())
    ran = Counter(part for name, part in parts_of.items() if name in trace.linears)
    counts = ", ".join(f"{part} {ran[part]} of {total[part]}" for part in sorted(total))
    first = next(
        (n for n, part in parts_of.items() if part in missing and n not in trace.linears), None
    )
    last = f" The last attempt: {problems[-1]}." if problems else ""
    remedy = "leave that part out (quantize_vision=False), or " if missing == ["vision"] else ""
    return (
        f"{type(model).__name__} has no row in the table of families, and running it did not reach "
        f"its {' and '.join(missing)} part (vision encoder at {parts.vision!r}, language model at "
        f"{parts.language!r}). Linear modules that ran: {counts}; missing is {first!r} first."
        f"{last} To quantize it, {remedy}add a row (docs/contributing.md)."
    )
