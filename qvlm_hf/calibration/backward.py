"""A backward pass through a model: no gradients of weights, and little that is kept for it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qvlm_hf.calibration.layers import hidden_states, live_layers
from qvlm_hf.models.graph import Segment

__all__ = ["frozen", "observe_outputs", "recomputed", "running"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the context: only hidden states do.

    Transformers gives the head a slice of the hidden states. For a weight without gradient PyTorch
    would multiply that row by row with copies of the weight: 15 s instead of .2 for a vocabulary of
    196,608 and 4 rows, and 3.2 GB. The head therefore gets a contiguous copy of the slice.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output_embeddings = getattr(model, "get_output_embeddings", lambda: None)
    head = output_embeddings() or nn.Identity()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def observe_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the layers' first outputs while the model runs; the first one starts the graph."""
    outputs: dict[str, Tensor] = {}

    def collect(name: str, output: Any) -> None:
        hidden = hidden_states(output)
        if not hidden.requires_grad:
            hidden.requires_grad_(True)
        outputs.setdefault(name, hidden)

    with ExitStack() as stack:
        for name in names:
            hook = lambda _module, _args, output, name=name: collect(name, output)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield outputs


@contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, the modules run these functions; afterwards what they ran before."""
    own = {module: vars(module).get("forward") for module in forwards}  # Accelerate's hooks set one
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


def recomputed(segments: Iterable[Segment]) -> AbstractContextManager[None]:
    """Inside, live layers keep their inputs alone for the backward pass and run again in it."""
    modules = [layer.module for segment in segments for layer in live_layers(segment)]
    return running({m: partial(checkpoint, m.forward, use_reentrant=False) for m in modules})
