"""A model of a family without a row, read by running it once: which linear modules share an input, in which layers.

Hooks on every nn.Linear and every norm see the tensors that enter and leave them. Linear modules
that read the very same tensor form a site, the repeated entries of a ModuleList form layers, and
`get_encoder("image")` and `get_decoder()` tell vision from language; what lies between is the
projector. No fold and no rotation follows from that, sites alone. What is not quantized is listed
with the reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qvlm_hf.models.graph import Layer, Segment, Site, matches
from qvlm_hf.models.tracing import Recorder, Trace
from qvlm_hf.models.trace_inputs import accepted, count_rows, picture_guesses, text_inputs

__all__ = ["Kept", "Structure", "StructureError", "read_structure"]


class StructureError(ValueError):
    """The model could not be read by running it; the message lists what was found and what is missing."""


@dataclass(frozen=True)
class Kept:
    """A part of the model that stays in full precision.

    Attributes:
        name: of the module or, for a bare one, of the parameter.
        reason: why, for the report.
        parameters: how many numbers it holds.
    """

    name: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class Structure:
    """What one run of a model tells about it.

    Attributes:
        segments: as `graph.resolve` gives them; names are those of the model's modules.
        norms: norm -> the linear modules that read its output, all of them in full view of the run.
        kept: everything with weights that no site holds.
        parameters: numbers in the whole model; shared ones count once.
        run: what was run: "inputs" (the caller's), "model" or "parts" (picture and text apart).
        inputs: keyword arguments of the model that it ran on as a whole; empty if it did not.
    """

    segments: tuple[Segment, ...]
    norms: dict[str, tuple[str, ...]]
    kept: tuple[Kept, ...]
    parameters: int
    run: str
    inputs: Mapping[str, Any]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all linear modules of all sites, in execution order."""
        return tuple(
            name
            for segment in self.segments
            for layer in segment.layers
            for site in layer.sites
            for name in site.modules
        )

    @property
    def percent(self) -> float:
        """Share of the weights that lie in sites."""
        kept = sum(part.parameters for part in self.kept)
        return 100 * (1 - kept / self.parameters) if self.parameters else 0.0


def read_structure(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    quantize_vision: bool = True,
    quantize_projector: bool = True,
    modules_to_not_convert: Sequence[str] = (),
) -> Structure:
    """Runs a model once and tells its segments, layers and sites.

    Args:
        model: of any family, in eval mode, with weights or on the meta device; not changed.
        inputs: keyword arguments of the model with a picture and text, as its processor makes them;
            None guesses them from the configuration.
        quantize_vision: include the vision encoder.
        quantize_projector: include what lies between vision encoder and language model.
        modules_to_not_convert: patterns (see `graph.matches`) of modules that stay as they are.

    Raises:
        StructureError: the language model could not be run, or the vision encoder could not and is
            to be quantized.
        ValueError: a pattern matches no module.
    """
    _check_patterns(model, modules_to_not_convert)
    parts = _Parts.of(model)
    recorder = Recorder(model)
    run, ran, problems = _run(model, recorder, parts, inputs)
    trace = recorder.trace
    reached = {parts.component(name) for name in trace.linears}
    wanted = ["language", *(["vision"] if quantize_vision and _has_linears(model, parts.vision) else [])]
    missing = [component for component in wanted if component not in reached]
    if missing:
        raise StructureError(_message(model, parts, trace, missing, problems))
    left_out = {
        name: reason
        for name in trace.linears
        if (reason := _why_not(model, trace, name, modules_to_not_convert))
        or (reason := _unwanted(parts.place(trace, name)[0], quantize_vision, quantize_projector))
    }
    segments = _segments(trace, parts, [name for name in trace.linears if name not in left_out])
    if not segments:
        raise ValueError("modules_to_not_convert: leaves no module to quantize: shorten it.")
    held = {name for s in segments for la in s.layers for site in la.sites for name in site.modules}
    kept, total = _kept(model, trace, held, left_out)
    norms = {norm: tuple(readers) for norm, readers in trace.norms.items() if readers}
    return Structure(segments, norms, kept, total, run, ran)


def _run(
    model: nn.Module, recorder: Recorder, parts: "_Parts", inputs: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], list[str]]:
    """Runs the model until every part was seen; returns how, on what, and what went wrong."""
    if inputs is not None:
        extra = accepted(model.forward, {"use_cache": False})
        recorder.run(lambda: model(**{**extra, **inputs}))
        return "inputs", dict(inputs), []
    problems: list[str] = []

    def attempt(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        try:
            return recorder.run(lambda: function(**arguments))
        except Exception as error:  # noqa: BLE001 - a guess that does not fit fails in any way
            problems.append(" ".join(f"{type(error).__name__}: {error}".split())[:160])
            return None

    forward = model.forward
    base = getattr(model, "base_model", model)
    features = [f for owner in dict.fromkeys((model, base)) if (f := _picture_function(owner))]
    picture: tuple[Callable[..., Any], dict[str, Any]] | None = None
    for function in features:
        for guess in picture_guesses(model, function):
            recorder.forget()
            answer = attempt(function, guess)
            if answer is None:
                continue
            picture, seen = picture or (function, guess), recorder.trace.linears.keys()
            whole = {**text_inputs(model, forward, count_rows(answer)), **accepted(forward, guess)}
            recorder.forget()
            if attempt(model, whole) is not None and seen <= recorder.trace.linears.keys():
                return "model", whole, problems
    if not features:
        for guess in picture_guesses(model, forward) if parts.vision else ():
            for tokens in dict.fromkeys(_token_counts(model, guess)):
                recorder.forget()
                whole = {**guess, **text_inputs(model, forward, tokens)}
                if attempt(model, whole) is not None and (
                    parts.vision is None or _seen(recorder.trace, parts.vision)
                ):
                    return "model", whole, problems
        encoder = model.get_submodule(parts.vision) if parts.vision else None
        for guess in picture_guesses(model, encoder.forward) if encoder is not None else ():
            recorder.forget()
            if attempt(encoder, guess) is not None:
                picture = (encoder, guess)
                break
    recorder.forget()
    if picture is not None:
        attempt(*picture)
    text = text_inputs(model, forward, 0)
    if attempt(model, text) is None:
        text = {}
        decoder = model.get_submodule(parts.language) if parts.language else model
        attempt(decoder, text_inputs(model, decoder.forward, 0))
    return "parts", text, problems


def _picture_function(owner: Any) -> Callable[..., Any] | None:
    """`get_image_features` of a model, if it says what it takes."""
    function = getattr(owner, "get_image_features", None)
    return function if function is not None and accepted(function, {"pixel_values": 0, "flattened_patches": 0}) else None


def _token_counts(model: nn.Module, guess: Mapping[str, Any]) -> Iterator[int]:
    """How many tokens a picture may become."""
    config: Any = model.config
    for name in ("image_seq_length", "mm_tokens_per_image", "num_image_tokens", "latent_query_num", "num_query_tokens"):
        if isinstance(value := getattr(config, name, None), int):
            yield value
    vision = getattr(config, "vision_config", None)
    pixels, patch = guess.get("pixel_values"), getattr(vision, "patch_size", None)
    if pixels is not None and isinstance(patch, int) and pixels.dim() >= 4:
        side = pixels.shape[-1] // patch
        yield side * side
        yield side * side // 4
    yield 0


def _seen(trace: Trace, prefix: str) -> bool:
    return any(name.startswith(f"{prefix}.") for name in trace.linears)


@dataclass(frozen=True)
class _Parts:
    """Names of the vision encoder and the language model in a model, "" for the model itself."""

    vision: str | None
    language: str
    between: str
    others: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, model: Any) -> "_Parts":
        names = {id(module): name for name, module in model.named_modules()}
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        encoder = model.get_encoder("image") if hasattr(model, "get_encoder") else None
        language = names.get(id(decoder), "")
        vision = names.get(id(encoder)) or None
        if vision is not None and (language == vision or language.startswith(f"{vision}.")):
            vision = None
        if vision is None:  # a picture model is said so by its class
            vision = next(
                (
                    name
                    for name, module in model.named_modules()
                    if name
                    and getattr(module, "main_input_name", None) in ("pixel_values", "flattened_patches")
                    and not (language == name or language.startswith(f"{name}."))
                ),
                None,
            )
        if vision is not None and language == "":
            shared = ""
        else:
            shared = _common(vision or language, language)
        return cls(vision, language, shared)

    def component(self, name: str) -> str:
        """The part of the model that a module lies in, by its name alone."""
        inside = [
            (len(prefix), part)
            for part, prefix in (("vision", self.vision), ("language", self.language))
            if prefix is not None and (prefix == "" or name == prefix or name.startswith(f"{prefix}."))
        ]
        return max(inside)[1] if inside else "projector"

    def place(self, trace: Trace, name: str) -> tuple[str, str, str]:
        """Component, segment and layer of a linear module that ran."""
        component = self.component(name)
        if (layer := trace.layer_of.get(name)) is not None:
            return component, layer.rpartition(".")[0], layer
        prefix = {"vision": self.vision, "language": self.language}.get(component, self.between) or ""
        rest = name[len(prefix) + 1 :] if prefix else name
        first, *others = rest.split(".")
        if others and others[0].isdigit() and len(others) > 1:
            first = f"{first}.{others[0]}"
        alone = f"{prefix}.{first}" if prefix else first
        after = trace.first_layer.get(self.vision or "")
        if component == "vision" and after is not None and trace.linears[name].first > after:
            component = "projector"  # a merger inside the tower
        return component, alone, alone


def _common(a: str, b: str) -> str:
    """The longest path that two module names share, short of the names themselves."""
    first, second = a.split(".")[:-1], b.split(".")[:-1]
    shared = [x for x, y in zip(first, second, strict=False) if x == y]
    return ".".join(shared)


def _segments(trace: Trace, parts: _Parts, names: Sequence[str]) -> tuple[Segment, ...]:
    """Sites in layers in segments, each in the order of their first call."""
    tree: dict[tuple[str, str], dict[str, dict[Any, list[str]]]] = {}
    for name in sorted(names, key=lambda one: trace.linears[one].first):
        component, segment, layer = parts.place(trace, name)
        site = (trace.linears[name].inputs, trace.linears[name].width)
        tree.setdefault((component, segment), {}).setdefault(layer, {}).setdefault(site, []).append(name)
    return tuple(
        Segment(
            component,
            tuple(
                Layer(layer, tuple(Site(tuple(group)) for group in sites.values()), layer in trace.dead)
                for layer, sites in layers.items()
            ),
        )
        for (component, _), layers in tree.items()
    )


def _check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} matches no module: give a module path, a "
                f"suffix of it or a component name."
            )


def _has_linears(model: nn.Module, prefix: str | None) -> bool:
    return prefix is not None and any(
        type(module) is nn.Linear for module in model.get_submodule(prefix).modules()
    )


def _why_not(
    model: nn.Module, trace: Trace, name: str, patterns: Sequence[str]
) -> str | None:
    """Why a linear module that ran stays as it is, or None."""
    if any(matches(name, pattern) for pattern in patterns):
        return "modules_to_not_convert"
    linear = model.get_submodule(name)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if linear is head:
        return "output head"
    if name in trace.shared:
        return f"its weight is that of {trace.shared[name]} too"
    if name in trace.read_directly:
        return "the model reads its weight itself"
    return None


def _unwanted(component: str, vision: bool, projector: bool) -> str | None:
    if component == "vision" and not vision:
        return "quantize_vision=False"
    if component == "projector" and not projector:
        return "quantize_projector=False"
    return None


def _kept(
    model: nn.Module, trace: Trace, held: set[str], left_out: Mapping[str, str]
) -> tuple[tuple[Kept, ...], int]:
    """Everything that no site holds, module by module, and how many numbers the model has."""
    kept, seen, total = [], set(), 0
    for name, module in model.named_modules():
        own = [(part, p) for part, p in module.named_parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for _, p in own}
        total += sum(p.numel() for _, p in own)
        if name in held:
            own = [(part, p) for part, p in own if part != "weight"]
        if not own:
            continue
        count = sum(p.numel() for _, p in own)
        if name in held:
            kept.append(Kept(name, "bias", count))
        elif name in left_out:
            kept.append(Kept(name, left_out[name], count))
        elif isinstance(module, nn.Linear | nn.Embedding) or "weight" in dict(own):
            kept.append(Kept(name, _reason(name, module, trace), count))
        else:
            kept += [Kept(f"{name}.{part}".lstrip("."), _bare(p), p.numel()) for part, p in own]
    return tuple(kept), total


def _reason(name: str, module: nn.Module, trace: Trace) -> str:
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return "the run did not call it"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in kind.lower():
        return "norm"
    if "Conv" in kind:
        return "convolution"
    del name, trace
    return f"a {kind}, no nn.Linear"


def _bare(parameter: nn.Parameter) -> str:
    return f"a bare parameter of {parameter.dim()} dimensions"


def _message(
    model: nn.Module, parts: _Parts, trace: Trace, missing: Sequence[str], problems: Sequence[str]
) -> str:
    kind = type(model).__name__
    found = ", ".join(
        f"{sum(parts.component(name) == part for name in trace.linears)} linear modules of the {part} part"
        for part in ("vision", "projector", "language")
    )
    where = f"vision encoder at {parts.vision!r}, language model at {parts.language!r}"
    last = f" The last attempt: {problems[-1]}." if problems else ""
    return (
        f"{kind} has no row in the table of families, and running it did not reach its "
        f"{' and '.join(missing)} part ({where}; found {found}).{last} Give a dataset, so that its "
        f"own inputs are run, or leave the part out."
    )
