"""Layer by layer: what enters a layer, what leaves it, and which tokens count.

`capture_inputs` runs the model up to some layers and records what enters them; from there
`run_layer` moves hidden states through one layer at a time, so that no more than a layer's work is
ever alive. Hooks are context managers and leave nothing behind.

Legend: B samples (or pictures) of a batch, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.models.graph import Layer

__all__ = [
    "LayerInput", "calibrating", "capture_inputs", "compute_dtype", "count_tokens", "frozen", "kept", "layer_output", "layer_outputs",
    "run_layer",
    "working_precision",
]  # fmt: skip


@dataclass(frozen=True)
class LayerInput:
    """What enters a layer for one batch.

    Attributes:
        hidden: [B, T, H] in the compute dtype.
        args, kwargs: the layer's other arguments (masks, position embeddings), as the model passed
            them.
        keep: bool [B, T], the tokens that the attention mask keeps; None is all.
        origins: where the samples came from, for messages.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keep: Tensor | None
    origins: tuple[str, ...]


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """The last layer asked for has been entered; the rest of the model need not run."""


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that layers calibrate in: float32 on a CPU, where 16-bit arithmetic is slow and coarser, else the model's own."""
    return torch.float32 if device.type == "cpu" else dtype


@contextmanager
def working_precision(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The layer's floating parameters in `dtype` inside the context; afterwards the very tensors it had."""
    kept_tensors = [
        (p, p.data) for p in layer.parameters() if p.is_floating_point() and p.dtype != dtype
    ]
    try:
        for parameter, data in kept_tensors:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in kept_tensors:
            parameter.data = data


@contextmanager
def calibrating(
    model: nn.Module, layers: Sequence[Layer], inputs: Sequence[LayerInput]
) -> Iterator[None]:
    """`working_precision` for layers of `model`, in the dtype of the hidden states that enter them."""
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(
                working_precision(model.get_submodule(layer.name), inputs[0].hidden.dtype)
            )
        yield


def capture_inputs(
    model: nn.Module, batches: Sequence[Any], layers: Sequence[str]
) -> dict[str, list[LayerInput]]:
    """Runs the model on every batch until the last of `layers` is entered and records what enters each of them.

    Args:
        model: in eval mode; nothing of it is changed.
        batches: each with `inputs` (keyword arguments of the model), `origins`.
        layers: module names in execution order.

    Returns:
        Layer name -> one LayerInput for every batch that reached it (a batch without a picture does
        not reach the vision encoder).

    Raises:
        ValueError: hidden states that enter a layer are not finite; the message names the layer and
            the samples.
    """
    captured: dict[str, list[LayerInput]] = {name: [] for name in layers}
    for batch in batches:
        mask = batch.inputs.get("attention_mask")

        def record(
            name: str,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            batch: Any = batch,
            mask: Tensor | None = mask,
        ) -> None:
            hidden, args, kwargs = _split(args, kwargs)
            if not torch.isfinite(hidden).all():
                raise ValueError(
                    f"the input of {name} holds NaN or infinity for the samples "
                    f"{', '.join(batch.origins)}: check weights and data."
                )
            dtype = compute_dtype(hidden.device, hidden.dtype)
            keep = mask.bool() if mask is not None and mask.shape == hidden.shape[:2] else None
            captured[name].append(
                LayerInput(
                    hidden.detach().to(dtype),
                    _cast(args, dtype),
                    _cast(kwargs, dtype),
                    keep,
                    batch.origins,
                )
            )
            if name == layers[-1]:
                raise _Reached

        with _pre_hooks(model, layers, record), torch.no_grad():
            try:
                device = next(model.parameters()).device
                model(
                    **{key: value.to(device) for key, value in batch.inputs.items()},
                    use_cache=False,
                )
            except _Reached:
                pass
    return captured


def run_layer(
    layer: nn.Module, inputs: Sequence[LayerInput], hidden: Sequence[Tensor]
) -> list[Tensor]:
    """Moves hidden states through one layer.

    Args:
        layer: in the compute dtype (see `working_precision`).
        inputs: the batches; their masks and position embeddings are those of every layer of the
            segment.
        hidden: per batch [B, T, H].

    Returns:
        Per batch [B, T, H'].
    """
    with torch.no_grad():
        return [layer_output(layer, entry, h) for entry, h in zip(inputs, hidden, strict=True)]


def layer_output(layer: nn.Module, entry: LayerInput, hidden: Tensor) -> Tensor:
    """What leaves a layer for one batch, [B, T, H'] of [B, T, H], with gradients where they are asked for."""
    return _first(layer(hidden, *entry.args, **entry.kwargs))


def kept(hidden: Tensor, keep: Tensor | None) -> Tensor:
    """[B, T, H] -> [tokens, H], the tokens that count."""
    return hidden.flatten(0, -2) if keep is None else hidden[keep]


def count_tokens(inputs: Sequence[LayerInput]) -> int:
    """Tokens that count, over all batches."""
    return sum(
        int(entry.keep.sum()) if entry.keep is not None else entry.hidden.shape[:-1].numel()
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
def layer_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the layers' outputs while the model runs; the first one starts the graph."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def collect(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = _first(output)
            if not hidden.requires_grad:
                hidden.requires_grad_(True)
            outputs[name] = hidden

        return collect

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _pre_hooks(model: nn.Module, layers: Sequence[str], record: Any) -> Iterator[None]:
    handles = []
    try:
        for name in layers:
            hook = lambda _module, args, kwargs, name=name: record(name, args, kwargs)  # noqa: E731
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states, and the other arguments.

    Layers take them first, by position or as `hidden_states`.
    """
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value.detach()
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
