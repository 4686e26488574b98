"""A backward pass layer by layer, of many directions at once, with one layer's graph alive.

`cut_at_layers` lets a model run so that its graph ends at the inputs of its layers: of what is
inside a layer nothing is kept. `pull_back` then goes from the last layer to the first. It runs each
once more, takes every direction back through it, and frees it. So a layer runs twice, however many
directions there are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qvlm_hf.calibration.backward import running
from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.models.graph import Segment

__all__ = ["LayerRun", "cut_at_layers", "pull_back"]


@dataclass(frozen=True)
class LayerRun:
    """One call of a layer.

    Attributes:
        layer: its name.
        forward: what was called.
        arguments: positional and by name, as a tree.
        entering: the tensors among them that gradients go to, ends of the graph before the layer.
        leaving: its floating-point outputs, where the graph behind it starts.
    """

    layer: str
    forward: Callable[..., Any]
    arguments: Any
    entering: list[Tensor]
    leaving: list[Tensor]


@contextmanager
def cut_at_layers(segments: Iterable[Segment]) -> Iterator[list[LayerRun]]:
    """Inside, live layers run without a graph and are recorded, in the order of their calls."""
    layers = [layer for segment in segments for layer in live_layers(segment)]
    runs: list[LayerRun] = []
    with running({it.module: partial(_record, runs, it.name, it.module.forward) for it in layers}):
        yield runs


def pull_back(
    runs: list[LayerRun], outputs: Tensor, directions: Iterable[Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """Takes directions of the outputs back to every layer, from the last to the first.

    Args:
        runs: from `cut_at_layers`; empty at the end.
        outputs: what the model made of them.
        directions: in the shape of `outputs`; one is alive at a time.

    Yields:
        Name of a layer and, per direction, the gradient with respect to its output. Of a layer that
        ran more than once, the first output counts.
    """
    starts = [leaf for run in runs for leaf in run.leaving]
    found: dict[int, list[Tensor]] = {id(leaf): [] for leaf in starts}  # sums, per direction
    count = 0
    for count, direction in enumerate(directions, 1):
        _add(found, starts, [outputs], [direction], count)
    while runs:
        run = runs.pop()
        gradients = [found.pop(id(leaf)) for leaf in run.leaving]
        del starts[len(starts) - len(run.leaving) :]
        for leaf, own in zip(run.leaving, gradients, strict=True):
            own += [torch.zeros_like(leaf) for _ in range(count - len(own))]
        if all(before.layer != run.layer for before in runs):
            yield run.layer, gradients[0]
        if not (run.entering and starts):
            continue
        inputs, leaving = _run_again(run)
        # a layer may ignore an argument that others read, as the states of a cross-attention
        reached = [place for place, output in enumerate(leaving) if output.requires_grad]
        for draw in range(count) if reached else ():
            back = torch.autograd.grad(
                [leaving[place] for place in reached],
                inputs,
                [gradients[place][draw] for place in reached],
                retain_graph=draw + 1 < count,
                allow_unused=True,
                materialize_grads=True,
            )
            _add(found, starts, run.entering, back, draw + 1)


def _record(
    runs: list[LayerRun], name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    flat, _ = pytree.tree_flatten((args, kwargs))
    entering = [value for value in flat if isinstance(value, Tensor) and value.requires_grad]
    with torch.no_grad():
        output = forward(*args, **kwargs)
    values = output if isinstance(output, tuple) else (output,)
    values = tuple(
        keep(value.detach()).requires_grad_() if _floats(value) else value for value in values
    )
    leaving = [value for value in values if _floats(value)]
    runs.append(LayerRun(name, forward, (args, kwargs), entering, leaving))
    return values if isinstance(output, tuple) else values[0]


def _run_again(run: LayerRun) -> tuple[list[Tensor], list[Tensor]]:
    """The layer's inputs, cut off from what is before them, and its outputs with their graph."""
    inputs = {id(value): value.detach().requires_grad_() for value in run.entering}
    args, kwargs = pytree.tree_map(lambda value: inputs.get(id(value), value), run.arguments)
    with torch.enable_grad():
        output = run.forward(*args, **kwargs)
    values = output if isinstance(output, tuple) else (output,)
    return [inputs[id(value)] for value in run.entering], [v for v in values if _floats(v)]


def _add(
    found: dict[int, list[Tensor]],
    starts: Sequence[Tensor],
    ends: Sequence[Tensor],
    gradients: Sequence[Tensor],
    count: int,
) -> None:
    """Adds gradients of `ends`, of the direction with number `count`, to those of `starts`."""
    back = torch.autograd.grad(ends, starts, gradients, retain_graph=True, allow_unused=True)
    for leaf, gradient in zip(starts, back, strict=True):
        if gradient is None:
            continue
        sums = found[id(leaf)]
        sums += [torch.zeros_like(leaf) for _ in range(count - 1 - len(sums))]
        if len(sums) < count:
            sums.append(gradient)
        else:
            sums[count - 1] = sums[count - 1] + gradient


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
