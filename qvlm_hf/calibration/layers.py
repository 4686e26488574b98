"""Layer by layer: what enters a layer, what leaves it, and which tokens are valid.

`capture_inputs` runs the model and records what enters its segments. From there `run_layer` moves
hidden states through one layer at a time, so that no more than one layer's work is alive.
Hooks are context managers and leave nothing behind.

Legend: B samples (or pictures) of a batch, T tokens, H hidden size.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.samples import Batch, moved
from qvlm_hf.models.experts import rows_of
from qvlm_hf.models.graph import Layer, Segment

__all__ = [
    "LayerInput",
    "NotFiniteError",
    "Reached",
    "capture_inputs",
    "count_tokens",
    "hidden_states",
    "live_layers",
    "model_inputs",
    "observe_inputs",
    "routed",
    "run_layer",
    "run_model",
    "valid_tokens",
    "working_precision",
]


class NotFiniteError(ValueError):
    """Values of a batch hold NaN or infinity.

    Attributes:
        origins: of its samples.
    """

    def __init__(self, message: str, origins: tuple[str, ...]) -> None:
        super().__init__(message)
        self.origins = origins


class _LayerCall(NamedTuple):
    """How the model calls a layer behind the first, and what it adds to the hidden states before.

    Kinds of layers differ in masks and windows. Pictures may enter between layers.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    added: Tensor | None


@dataclass(frozen=True)
class LayerInput:
    """The input of a segment's first layer for one batch.

    Attributes:
        hidden: [B, T, H], or [T, H] of packed pictures, in the compute dtype.
        args, kwargs: the layer's other arguments (masks, position embeddings).
        valid: bool [B, T], the tokens that are no padding; None is all.
        origins: where the samples came from, for messages.
        calls: by layer behind the first; a layer that is not in it gets `args` and `kwargs`, and
            one with None is passed over, as the model does.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    valid: Tensor | None
    origins: tuple[str, ...]
    calls: Mapping[nn.Module, _LayerCall | None] = field(default_factory=dict)

    def require_finite(self, values: Tensor, what: str) -> None:
        """Raises NotFiniteError if values of this batch hold NaN or infinity."""
        if not torch.isfinite(values).all():
            raise NotFiniteError(
                f"{what} holds NaN or infinity for the samples {', '.join(self.origins)}: "
                f"check weights and data.",
                self.origins,
            )


class Reached(Exception):  # noqa: N818 - control flow, not an error
    """The last module asked for has been entered; what comes after it need not run."""


def live_layers(segment: Segment) -> list[Layer]:
    """The layers of a segment whose output reaches the answer."""
    return [layer for layer in segment.layers if not layer.dead]


def run_model(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """The model's output for a batch, on the model's device and without a cache.

    Without `logits` the head, the widest layer, runs on one token only.
    """
    inputs = model_inputs(model, batch)
    if not logits and "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=1)
    return model(**inputs, use_cache=False)


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch on the model's device, floating ones in its dtype."""
    # packed weights are integers: the first floating parameter tells dtype and device
    floating = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    dtype = getattr(model, "dtype", floating.dtype)
    return moved(batch.inputs, floating.device, dtype)


def capture_inputs(
    model: nn.Module, batches: Sequence[Batch], segments: Sequence[Segment]
) -> dict[str, list[LayerInput]]:
    """Runs the model on every batch until the last layer of `segments` and records what enters.

    The segment that runs last comes last. A batch without a picture does not reach the vision
    encoder.

    Raises:
        ValueError: hidden states that enter a segment are not finite.
    """
    captured: dict[str, list[LayerInput]] = {segment.name: [] for segment in segments}
    for batch in batches:
        with ExitStack() as stack:
            for segment in segments:
                seen = captured[segment.name].append
                recorder = _Recorder(segment, batch, seen, last=segment is segments[-1])
                stack.enter_context(recorder.attached())
            stack.enter_context(torch.no_grad())
            stack.enter_context(suppress(Reached))
            run_model(model, batch)
    return captured


class _Recorder:
    """Records how the model calls the layers of a segment, on one batch.

    Args:
        segment: whose layers run one after the other.
        batch: that the model runs on.
        see: gets the `LayerInput`, whose calls are filled while the model runs on.
        last: whether the model need not run further than these layers.
    """

    def __init__(
        self, segment: Segment, batch: Batch, see: Callable[[LayerInput], None], *, last: bool
    ) -> None:
        self._segment, self._batch, self._see, self._last = segment, batch, see, last
        self._entry: LayerInput | None = None
        behind = segment.layers[1:]
        self._calls: dict[nn.Module, _LayerCall | None] = {layer.module: None for layer in behind}
        self._output: Any = None  # of the layer before
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}  # layers share masks and the like

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model may run."""
        modules = {layer: layer.module for layer in self._segment.layers}
        with observe_inputs(modules, self._enter), ExitStack() as stack:
            for module in modules.values():
                stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layers take the hidden states first, by position or by a name like `hidden_states`."""
        if self._entry is not None and layer is self._segment.layers[0]:
            return  # of a projector that runs picture by picture the first one counts
        kwargs = dict(kwargs)
        name = next((name for name in kwargs if name.startswith("hidden_state")), "")
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop(name), ())
        # 16-bit arithmetic is slow and coarser on a CPU
        dtype = torch.float32 if hidden.device.type == "cpu" else hidden.dtype
        if self._entry is None:
            mask = self._batch.inputs.get("attention_mask")
            valid = mask.bool() if mask is not None and mask.shape == hidden.shape[:-1] else None
            self._entry = LayerInput(
                keep(hidden.detach().to(dtype)),
                self._cast(args, dtype),
                self._cast(kwargs, dtype),
                valid,
                self._batch.origins,
                self._calls,
            )
            self._entry.require_finite(hidden, f"the input of {layer.name}")
            self._see(self._entry)
        else:
            added = None
            if hidden is not self._output:
                added = hidden.to(dtype) - self._output.to(hidden.device, dtype)
            self._calls[layer.module] = _LayerCall(
                self._cast(args, dtype),
                self._cast(kwargs, dtype),
                added if added is not None and added.any() else None,
            )
        if self._last and layer is self._segment.layers[-1]:
            raise Reached

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._output = hidden_states(output)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._casts:
                own = value.detach()
                own = own.to(dtype) if own.is_floating_point() else own
                self._casts[id(value)] = (value, keep(own))
            return self._casts[id(value)][1]
        if isinstance(value, tuple):
            return tuple(self._cast(item, dtype) for item in value)
        if isinstance(value, dict):
            return {key: self._cast(item, dtype) for key, item in value.items()}
        return value


@contextmanager
def working_precision(layers: Iterable[Layer], inputs: Sequence[LayerInput]) -> Iterator[None]:
    """Inside, the layers' floating parameters have the dtype of `inputs`."""
    dtype = inputs[0].hidden.dtype
    stored = [
        (parameter, parameter.data)
        for layer in layers
        for parameter in layer.module.parameters()
        if parameter.is_floating_point() and parameter.dtype != dtype
    ]
    try:
        for parameter, data in stored:
            parameter.data = keep(data.to(dtype))
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


def run_layer(
    layer: nn.Module, inputs: Sequence[LayerInput], hidden: Sequence[Tensor]
) -> list[Tensor]:
    """Moves hidden states, per batch [B, T, H], through one layer in the compute dtype."""
    outputs = []
    for entry, h in zip(inputs, hidden, strict=True):
        call = entry.calls.get(layer, _LayerCall(entry.args, entry.kwargs, None))
        if call is None:
            outputs.append(h)
            continue
        entering = h if call.added is None else h + call.added
        with torch.no_grad():
            outputs.append(keep(hidden_states(layer(entering, *call.args, **call.kwargs))))
    return outputs


def valid_tokens(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """[..., H] -> [tokens, H] without padding; all tokens where `valid` does not fit the shape."""
    fits = valid is not None and valid.shape == hidden.shape[:-1]
    return hidden[valid] if fits else hidden.flatten(0, -2)


def routed(values: Tensor | None, module: nn.Module, x: Tensor) -> Tensor | None:
    """What belongs to the rows that enter a module, of values [B, T] that belong to tokens.

    Args:
        values: of every token; None stays None.
        module: an expert gets some tokens, other modules get them all.
        x: its input, [B, T, in], or [rows, in] where the layer has put all tokens in one row.

    Returns:
        Of the shape of `x` without its last dimension; None where the rows are no tokens.
    """
    if values is None or x.shape[:-1] == values.shape:
        return values
    rows = rows_of(module)
    flat = values.flatten() if rows is None else values.flatten()[rows]
    return flat if flat.shape == x.shape[:-1] else None


def count_tokens(inputs: Sequence[LayerInput]) -> int:
    """Valid tokens of all batches."""
    return sum(
        int(entry.valid.sum()) if entry.valid is not None else entry.hidden.shape[:-1].numel()
        for entry in inputs
    )


@contextmanager
def observe_inputs(
    modules: Mapping[Any, nn.Module], see: Callable[[Any, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Inside, `see` is called with the key and the arguments of every module that runs."""
    with ExitStack() as stack:
        for key, module in modules.items():
            hook = lambda _module, args, kwargs, key=key: see(key, args, kwargs)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def hidden_states(output: Any) -> Tensor:
    """Of what a layer returns, alone or with others behind them."""
    return output[0] if isinstance(output, tuple) else output
