"""Layer by layer: what enters a layer, what leaves it, and which tokens are valid.

`capture_inputs` runs the model up to some layers and records their inputs. From there `run_layer`
moves hidden states through one layer at a time, so that no more than one layer's work is alive.
Hooks are context managers and leave nothing behind.

Legend: B samples (or pictures) of a batch, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvlm_hf.calibration.samples import Batch
from qvlm_hf.models.graph import Layer, Segment

__all__ = [
    "LayerInput",
    "capture_inputs",
    "count_tokens",
    "frozen",
    "live_layers",
    "observe_inputs",
    "observe_outputs",
    "recomputed",
    "run_layer",
    "run_model",
    "run_until",
    "valid_tokens",
    "working_precision",
]


@dataclass(frozen=True)
class LayerInput:
    """The input of a layer for one batch.

    Attributes:
        hidden: [B, T, H] in the compute dtype.
        args, kwargs: the layer's other arguments (masks, position embeddings).
        valid: bool [B, T], the tokens that are no padding; None is all.
        origins: where the samples came from, for messages.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    valid: Tensor | None
    origins: tuple[str, ...]

    def require_finite(self, values: Tensor, what: str) -> None:
        """Raises ValueError if values of this batch hold NaN or infinity."""
        if not torch.isfinite(values).all():
            raise ValueError(
                f"{what} holds NaN or infinity for the samples {', '.join(self.origins)}: "
                f"check weights and data."
            )


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """The last module asked for has been entered; what comes after it need not run."""


def live_layers(segment: Segment) -> list[Layer]:
    """The layers of a segment whose output reaches the answer."""
    return [layer for layer in segment.layers if not layer.dead]


def run_model(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch, on the model's device and without a cache."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.inputs.items()}
    return model(**inputs, use_cache=False)


def capture_inputs(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]
) -> dict[str, list[LayerInput]]:
    """Runs the model on every batch until the last of `layers` and records what enters each.

    Args:
        model: in eval mode; nothing of it is changed.
        batches: a batch without a picture does not reach the vision encoder.
        layers: module names in execution order.

    Raises:
        ValueError: hidden states that enter a layer are not finite.
    """
    captured: dict[str, list[LayerInput]] = {name: [] for name in layers}
    modules = {name: model.get_submodule(name) for name in layers}
    for batch in batches:

        def record(
            name: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch = batch
        ) -> None:
            captured[name].append(_layer_input(name, args, kwargs, batch))
            if name == layers[-1]:
                raise _Reached

        with observe_inputs(modules, record), torch.no_grad(), suppress(_Reached):
            run_model(model, batch)
    return captured


def _layer_input(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
) -> LayerInput:
    """Layers take the hidden states first, by position or as `hidden_states`."""
    kwargs = dict(kwargs)
    hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
    mask = batch.inputs.get("attention_mask")
    valid = mask.bool() if mask is not None and mask.shape == hidden.shape[:2] else None
    # 16-bit arithmetic is slow and coarser on a CPU
    dtype = torch.float32 if hidden.device.type == "cpu" else hidden.dtype
    entry = LayerInput(
        hidden.detach().to(dtype), _cast(args, dtype), _cast(kwargs, dtype), valid, batch.origins
    )
    entry.require_finite(hidden, f"the input of {name}")
    return entry


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
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


def run_layer(
    layer: nn.Module, inputs: Sequence[LayerInput], hidden: Sequence[Tensor]
) -> list[Tensor]:
    """Moves hidden states, per batch [B, T, H], through one layer in the compute dtype.

    Masks and position embeddings of `inputs` are those of every layer of the segment.
    """
    with torch.no_grad():
        return [
            _hidden_states(layer(h, *entry.args, **entry.kwargs))
            for entry, h in zip(inputs, hidden, strict=True)
        ]


def run_until(layer: nn.Module, module: nn.Module, entry: LayerInput, hidden: Tensor) -> Tensor:
    """Runs a layer on a batch [B, T, H] until it enters `module`; returns what enters there."""
    entered: list[Tensor] = []

    def see(_: Any, args: tuple[Any, ...], __: Any) -> None:
        entered.append(args[0])
        raise _Reached

    with observe_inputs({None: module}, see), suppress(_Reached):
        run_layer(layer, [entry], [hidden])
    return entered[0]


def valid_tokens(hidden: Tensor, valid: Tensor | None) -> Tensor:
    """[B, T, H] -> [tokens, H] without padding; all tokens where `valid` does not fit the shape."""
    fits = valid is not None and valid.shape == hidden.shape[:2]
    return hidden[valid] if fits else hidden.flatten(0, -2)


def count_tokens(inputs: Sequence[LayerInput]) -> int:
    """Valid tokens of all batches."""
    return sum(
        int(entry.valid.sum()) if entry.valid is not None else entry.hidden.shape[:-1].numel()
        for entry in inputs
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the context: only hidden states do."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


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


@contextmanager
def observe_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the layers' outputs while the model runs; the first one starts the graph."""
    outputs: dict[str, Tensor] = {}

    def collect(name: str, output: Any) -> None:
        hidden = _hidden_states(output)
        if not hidden.requires_grad:
            hidden.requires_grad_(True)
        outputs[name] = hidden

    with ExitStack() as stack:
        for name in names:
            hook = lambda _module, _args, output, name=name: collect(name, output)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield outputs


@contextmanager
def recomputed(segments: Iterable[Segment]) -> Iterator[None]:
    """Live layers keep their inputs alone for the backward pass and run again in it."""
    modules = [layer.module for segment in segments for layer in live_layers(segment)]
    own = [vars(module).get("forward") for module in modules]  # Accelerate's hooks set one
    try:
        for module in modules:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value.detach()
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def _hidden_states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
