"""Mixtures of experts: their 3-D parameters as linear modules, one an expert.

Transformers keeps one projection of all experts in one parameter. `split_experts` puts a ModuleList
of nn.Linear in its place: the weight of expert 3 is that of `experts.gate_up_proj.3`. From there on
an expert is quantized, packed, saved and counted like any linear module, and `join_experts` makes
parameters of them again.

Routing stays Transformers' own. Most families hand tokens, experts and weights to an experts
function: theirs is then `routed_experts` (hf/runtime/experts.py registers it). Llama 4 sorts its
tokens by expert beforehand: its module of experts becomes `SortedExperts`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "IMPLEMENTATION",
    "SortedExperts",
    "experts_split",
    "find_experts",
    "has_split_experts",
    "join_experts",
    "routed_experts",
    "rows_of",
    "split_experts",
    "split_projection",
]

IMPLEMENTATION = "qvlm"  # name of `routed_experts` among Transformers' experts functions


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the modules of experts that are split, or can be: name -> module, in model order."""
    return {name: module for name, module in model.named_modules() if _projections(module)}


def has_split_experts(model: nn.Module) -> bool:
    """Tells whether experts of a model are split."""
    return any("_unsplit" in vars(module) for module in model.modules())


def split_experts(model: nn.Module) -> None:
    """Makes linear modules of the parameters of all experts, in place; they share memory."""
    for module in find_experts(model).values():
        for name in _projections(module):
            if (stacked := module._parameters.get(name)) is not None:
                split_projection(module, name, stacked)


def join_experts(model: nn.Module) -> None:
    """Makes parameters of the experts again, unless one of them is quantized: then all stay apart.

    Those that stay apart in full precision get memory of their own.
    """
    split = [module for module in find_experts(model).values() if "_unsplit" in vars(module)]
    linears = [linear for module in split for every in _lists(module) for linear in every]
    if any(type(linear) is not nn.Linear for linear in linears):
        for linear in linears:
            if type(linear) is nn.Linear:
                linear.weight.data = linear.weight.detach().clone(
                    memory_format=torch.contiguous_format
                )
        return
    for module in split:
        _join(module)


def _join(module: Any) -> None:
    lists = dict(zip(_projections(module), _lists(module), strict=True))
    original = vars(module).pop("_unsplit")
    module.__class__ = original["class"]
    if original["config"] is not None:
        module.config = original["config"]
    for name, linears in lists.items():
        delattr(module, name)
        weights = [one.weight.T if _transposed(module) else one.weight for one in linears]
        module.register_parameter(name, _stacked(weights))
        if linears[0].bias is not None:
            module.register_parameter(f"{name}_bias", _stacked([one.bias for one in linears]))


def _lists(module: Any) -> list[Any]:
    return [getattr(module, name) for name in _projections(module)]


@contextmanager
def experts_split(model: nn.Module, *, keep: bool = False) -> Iterator[None]:
    """Inside, experts are split; afterwards the model has its old parameters again.

    With `keep` that is so after an error alone; else `join_experts` decides.
    """
    before = [
        (module, type(module), dict(vars(module)), dict(module._parameters), dict(module._modules))
        for module in find_experts(model).values()
    ]

    def restore() -> None:
        for module, kind, attributes, parameters, modules in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes, _parameters=parameters, _modules=modules)

    split_experts(model)
    try:
        yield
    except BaseException:
        restore()
        raise
    if keep:
        join_experts(model)
    else:
        restore()


def split_projection(module: Any, name: str, stacked: Tensor) -> nn.ModuleList:
    """Puts the linear modules of one projection in the place of its parameter.

    Args:
        module: of experts.
        name: of the parameter.
        stacked: its values: [E, out, in] or, where the module holds them so, [E, in, out].
    """
    bias = module._parameters.pop(f"{name}_bias", None)
    del module._parameters[name]
    values = stacked.detach().transpose(1, 2) if _transposed(module) else stacked.detach()
    linears = nn.ModuleList(
        _linear(weight, None if bias is None else bias.detach()[expert])
        for expert, weight in enumerate(values)
    )
    setattr(module, name, linears.train(module.training))
    if "_unsplit" not in vars(module):
        config = getattr(module, "config", None)
        vars(module)["_unsplit"] = {"class": type(module), "config": config}
        # Transformers would give missing parameters random values
        module._is_hf_initialized = True
        if _is_sorted(module):
            module.__class__ = SortedExperts
        else:  # a copy: the configuration's other modules go on as they are
            module.config = copy.copy(config)
            module.config._experts_implementation = {"": IMPLEMENTATION}
    return linears


def routed_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts function of Transformers, for modules that were split.

    Args:
        self: the module of experts.
        hidden_states: [tokens, H].
        top_k_index: [tokens, k], the experts of each token.
        top_k_weights: [tokens, k], what their outputs are multiplied by.

    Returns:
        [tokens, H].
    """
    chosen, order = top_k_index.flatten().sort(stable=True)
    counts = chosen.bincount(minlength=self.num_experts).tolist()
    weights, output = top_k_weights.flatten(), torch.zeros_like(hidden_states)
    for expert, places in enumerate(order.split(counts)):
        if len(places):
            rows = places // top_k_index.shape[1]
            y = _run(self, expert, hidden_states[rows], rows) * weights[places, None]
            output.index_add_(0, rows, y.to(output.dtype))
    return output


class SortedExperts(nn.Module):
    """Split experts that get all tokens once for every expert, the tokens of others as zeros."""

    has_gate, has_post_expert_norm = True, False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[E * tokens, H] -> [E * tokens, H]."""
        sorted_states = hidden_states.unflatten(0, (self.num_experts, -1))
        output = torch.zeros_like(sorted_states)
        for expert, states in enumerate(sorted_states):
            rows = states.any(-1).nonzero().flatten()
            if len(rows):
                output[expert, rows] = _run(self, expert, states[rows], rows)
        return output.flatten(0, 1)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.act_fn(gate)  # type: ignore[operator]


# classes whose tokens come sorted; they hold [E, in, out]
_SORTED = ("Llama4TextExperts",)


def rows_of(linear: nn.Module) -> Tensor | None:
    """Which tokens an expert in full precision was last called with, [rows] int64; else None."""
    return vars(linear).get("rows")


def _run(self: Any, expert: int, x: Tensor, rows: Tensor) -> Tensor:
    first, down = (
        (self.gate_up_proj if self.has_gate else self.up_proj)[expert],
        self.down_proj[expert],
    )
    for linear in (first, down):
        if type(linear) is nn.Linear:  # calibration asks for it
            vars(linear)["rows"] = rows
    y = first(x)
    y = down(self._apply_gate(y) if self.has_gate else self.act_fn(y))
    return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y


def _projections(module: Any) -> tuple[str, ...]:
    """Names of the projections of a module of experts; none of any other module."""
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    if "_unsplit" in vars(module):
        return names
    if not (_is_sorted(module) or hasattr(module, "is_transposed")):
        return ()
    biases = [f"{name}_bias" for name in names] if getattr(module, "has_bias", False) else []
    own = module._parameters
    plain = own.keys() == {*names, *biases} and all(own[name].dim() == 3 for name in names)
    return names if plain else ()


def _is_sorted(module: nn.Module) -> bool:
    return type(module).__name__ in _SORTED


def _transposed(module: Any) -> bool:
    return getattr(module, "is_transposed", True)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _stacked(tensors: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))
