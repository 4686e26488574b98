"""One run of a model under hooks: which tensors enter its linear modules.

A tensor is known by its memory, its place in it and its version, so that a reshaped view is the
same input as the tensor, and one that was written to in between is not. Tensors of a layer are held
while it runs and no longer: memory that is given away cannot be mistaken for another tensor.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qvlm_hf.models.experts import find_experts
from qvlm_hf.models.parts import layers_of, shared_weights

__all__ = ["LinearCalls", "Recorder", "Trace"]

_HARMLESS = {"size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "data_ptr"}
# fields of a weight that hang on its being float
_TELLING = {"dtype", "data", "T", "mT", "H", "mH"}


@dataclass
class LinearCalls:
    """The calls of one linear module.

    Attributes:
        first: place of the first call among all calls.
        inputs: a number for the tensor that entered, one a call.
    """

    first: int
    inputs: tuple[int, ...] = ()


@dataclass
class Trace:
    """What was seen.

    Attributes:
        linears: name -> calls of every nn.Linear that ran.
        layer_of: linear module -> the repeated entry of a ModuleList that holds it.
        shared: linear module -> another module that has the same weight.
        read_directly: linear modules whose weight something else than their own forward reads.
        dead: layers whose output reaches nothing, as far as the run tells.
        experts: module of experts that ran -> place of its first call among those of the linears.
        live: identities of the parameters that a result is computed from.
        calls, tensors: of linear modules, and that entered them; both are numbered.
    """

    linears: dict[str, LinearCalls] = field(default_factory=dict)
    layer_of: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    read_directly: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    experts: dict[str, int] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    calls: int = 0
    tensors: int = 0

    def add_experts(self, model: nn.Module) -> None:
        """Adds the linear modules of the experts that ran, now that they are split."""
        layers = layers_of(model)
        for name, module in model.named_modules():
            experts = name.rpartition(".")[0].rpartition(".")[0]
            if experts in self.experts and type(module) is nn.Linear:
                own = (-len(self.linears),)  # no other module has the same input
                self.linears[name] = LinearCalls(self.experts[experts], own)
                if name in layers:
                    self.layer_of[name] = layers[name]


class Recorder:
    """Runs parts of a model and keeps what was seen in `trace`; the model is left as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layer_of = layers_of(model)
        self._shared = shared_weights(model)
        self._layers = dict.fromkeys(self._layer_of.values())
        self.forget()

    def forget(self) -> None:
        """Drops what was seen."""
        self.trace = Trace(layer_of=self._layer_of, shared=self._shared)

    def run(self, function: Callable[[], Any]) -> Any:
        """Calls the function under hooks and adds what was seen to `trace`; nothing if it fails."""
        try:
            with _gradients(self._model):
                answer, trace = self._watched(function)
                trace.live |= _reached(_result(answer))
        except RuntimeError as error:
            if "grad" not in str(error):
                raise
            with torch.no_grad():  # code that a gradient cannot pass: nothing is known to be dead
                answer, trace = self._watched(function)
        trace.dead = self._dead(trace)
        self.trace = trace
        return answer

    def _watched(self, function: Callable[[], Any]) -> tuple[Any, Trace]:
        trace = copy.deepcopy(self.trace)
        watch = _Watch(self._model, self._layers, trace)
        with watch.hooks(), watch:
            return function(), trace

    def _dead(self, trace: Trace) -> set[str]:
        """Layers that ran and that no result hangs on, where another layer of the list is alive."""
        ran = {self._layer_of[name] for name in trace.linears if name in self._layer_of}
        alive = {
            layer
            for layer in ran
            if any(id(p) in trace.live for p in self._model.get_submodule(layer).parameters())
        }
        lists = {layer.rpartition(".")[0] for layer in alive}
        return {layer for layer in ran - alive if layer.rpartition(".")[0] in lists}


class _Watch(TorchFunctionMode):
    """Adds to a trace what hooks see in one run; as a mode it also sees who touches a weight."""

    def __init__(self, model: nn.Module, layers: dict[str, None], trace: Trace) -> None:
        super().__init__()
        self._model, self._layers, self._trace = model, layers, trace
        self._experts = find_experts(model)
        self._known: dict[Any, tuple[int, Tensor]] = {}
        self._marks: list[list[Any]] = []
        self._running: list[str] = []
        self._weights = {
            id(module.weight): name
            for name, module in model.named_modules()
            if type(module) is nn.Linear
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            name = self._weights.get(id(value)) if isinstance(value, nn.Parameter) else None
            if name is not None and name not in self._running and not _harmless(func):
                self._trace.read_directly.add(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._known.clear)
            for name, module in self._model.named_modules():
                before, after = module.register_forward_pre_hook, module.register_forward_hook
                handles = []
                if type(module) is nn.Linear:
                    handles.append(before(partial(self._enter, name), with_kwargs=True))
                    handles.append(after(lambda *_: self._running.pop() and None))
                elif name in self._experts:
                    handles.append(before(partial(self._enter_experts, name)))
                if name in self._layers:
                    handles.append(before(lambda *_: self._marks.append([])))
                    handles.append(after(self._leave_layer))
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _enter(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["input"]
        with torch._C.DisableTorchFunction():
            calls = self._trace.linears.setdefault(name, LinearCalls(self._trace.calls))
            calls.inputs += (self._number(x),)
        self._trace.calls += 1
        self._running.append(name)

    def _enter_experts(self, name: str, *_: Any) -> None:
        self._trace.experts.setdefault(name, self._trace.calls)

    def _leave_layer(self, *_: Any) -> None:
        for key in self._marks.pop():
            self._known.pop(key, None)

    def _number(self, x: Tensor) -> int:
        """The same number for the same numbers in memory, as long as nobody wrote to them."""
        version = 0 if x.is_inference() else x._version
        key = (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), version, x.shape[-1])
        if key not in self._known:
            self._known[key] = (self._trace.tensors, x)
            self._trace.tensors += 1
            if self._marks:
                self._marks[-1].append(key)
        return self._known[key][0]


def _harmless(func: Any) -> bool:
    """Whether a function asks a weight for what stays true when it is packed."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _TELLING
    return getattr(func, "__name__", "") in _HARMLESS


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Every float parameter asks for a gradient, and the graph keeps no tensor."""
    changed = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    nothing: Any = lambda _: None  # noqa: E731
    drop = torch.autograd.graph.saved_tensors_hooks(nothing, nothing)
    try:
        for parameter in changed:
            parameter.requires_grad_(True)
        with torch.enable_grad(), drop:
            yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


def _result(answer: Any) -> list[Tensor]:
    """The tensors that a run is for, out of an answer that may hold all hidden states."""
    for name in ("logits", "pooler_output", "last_hidden_state"):
        value = getattr(answer, name, None)
        if value is not None:
            return _tensors(value)
    return _tensors(answer)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if hasattr(value, "values") else value
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        return []
    return [tensor for part in values for tensor in _tensors(part)]


def _reached(results: list[Tensor]) -> set[int]:
    """Identities of the parameters that the results are computed from."""
    found: set[int] = set()
    nodes = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        fresh = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= fresh
        nodes += fresh
    return found
