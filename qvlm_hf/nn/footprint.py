"""Bytes of a model on disk and in memory, before and after quantizing, from shapes alone.

Counts the tensors of docs/format.md, "Tensors of one quantized linear module". A test compares the
sum with saved files, to the byte. On the meta device a laptop can size a model of any size.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.experts import experts_split
from qvlm_hf.models.find_parts import component_finder
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.replace import quantized_modules

__all__ = ["Footprint", "FootprintRow", "count_parameters", "footprint"]

_ORDER = ("vision", "projector", "language", "embeddings", "head", "other")


@dataclass(frozen=True, kw_only=True)
class FootprintRow:
    """One component: how many parameters, and bytes in full precision and quantized."""

    component: str
    parameters: int
    full_precision_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller it gets."""
        return self.full_precision_bytes / self.quantized_bytes if self.quantized_bytes else 1.0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One row per component that has parameters: vision, projector, language, then the rest."""

    rows: tuple[FootprintRow, ...]

    @property
    def total(self) -> FootprintRow:
        """All components together."""
        return FootprintRow(
            component="total",
            parameters=sum(row.parameters for row in self.rows),
            full_precision_bytes=sum(row.full_precision_bytes for row in self.rows),
            quantized_bytes=sum(row.quantized_bytes for row in self.rows),
        )

    def __str__(self) -> str:
        titles = ("component", "parameters", "full precision", "quantized", "ratio")
        lines = ["{:<11}{:>15}{:>17}{:>12}{:>7}".format(*titles)]
        for row in (*self.rows, self.total):
            full = f"{row.full_precision_bytes / 2**20:.1f} MiB"
            packed = f"{row.quantized_bytes / 2**20:.1f} MiB"
            lines.append(
                f"{row.component:<11}{row.parameters:>15,}{full:>17}{packed:>12}{row.ratio:>7.2f}"
            )
        return "\n".join(lines)


def footprint(
    model: nn.Module, modules: Mapping[str, QuantScheme], *, dtype: torch.dtype = torch.bfloat16
) -> Footprint:
    """Sizes a model before and after quantizing. Tensors that several modules share count once.

    Raises:
        ValueError: `modules` names something that is no linear module of the model, or has
            granularity "token", whose number of positions only a calibration knows.
    """
    with experts_split(model):
        tensors = _stored(model)
        linears = {
            canonical_name(name): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
    if unknown := sorted(set(modules) - set(linears)):
        raise ValueError(
            f"modules: {unknown[0]!r} is no linear module of the model: use names as in "
            "named_modules()."
        )
    component_of = component_finder(model)
    parameters, full, packed = Counter[str](), Counter[str](), Counter[str]()
    for name, tensor in tensors:
        component = component_of(name)
        module, _, part = name.rpartition(".")
        itemsize = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        size = tensor.numel() * itemsize
        parameters[component] += tensor.numel()
        full[component] += size
        if part == "weight" and (scheme := modules.get(module)):
            linear = linears[module]
            if scheme.granularity == "token":
                raise ValueError(
                    "granularity 'token': the calibrated positions are known to files alone."
                )
            size = scheme.module_bytes(linear.out_features, linear.in_features)
        packed[component] += size
    return Footprint(
        rows=tuple(
            FootprintRow(
                component=component,
                parameters=parameters[component],
                full_precision_bytes=full[component],
                quantized_bytes=packed[component],
            )
            for component in _ORDER
            if parameters[component]
        )
    )


def count_parameters(model: nn.Module) -> int:
    """Counts the parameters that `model` had before it was quantized."""
    sizes: dict[int, int] = {}
    for _, module in quantized_modules(model):
        own = dict(module.named_parameters(recurse=False))
        sizes |= {id(parameter): 0 for part, parameter in own.items() if part != "bias"}
        sizes[id(module.tensors["weight"])] = module.in_features * module.out_features
    return sum(sizes.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def _stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Canonical name and tensor of all that is saved; shared tensors under their first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (canonical_name(name), tensor))
    return list(first.values())
