"""Bytes of a model on disk and in memory, before and after quantizing, from shapes alone.

Counts exactly the tensors of the format, "Tensors of one quantized linear module"; a test compares
the sum with saved safetensors, to the byte. The model may lie on the meta device, so a laptop can
size a 13-billion-parameter one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.replace import quantized_modules

__all__ = [
    "COMPONENTS",
    "Footprint",
    "FootprintRow",
    "component_of",
    "count_parameters",
    "footprint",
    "linear_bytes",
]

COMPONENTS = ("vision", "projector", "language", "embeddings", "head", "other")
# First match wins; path components of canonical names.
_PARTS = (
    ("vision_tower", "vision"),
    ("multi_modal_projector", "projector"),
    ("embed_tokens", "embeddings"),
    ("lm_head", "head"),
    ("language_model", "language"),
)


@dataclass(frozen=True, kw_only=True)
class FootprintRow:
    """One component: how many parameters, and bytes in full precision and quantized."""

    component: str
    parameters: int
    full_precision_bytes: int
    quantized_bytes: int

    @property
    def ratio(self) -> float:
        """Full precision over quantized: how many times smaller it gets."""
        return self.full_precision_bytes / self.quantized_bytes if self.quantized_bytes else 1.0


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One row per component that has parameters, in the order of `COMPONENTS`."""

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
        lines = [
            f"{'component':<11}{'parameters':>15}{'full precision':>17}{'quantized':>12}{'ratio':>7}"
        ]
        for row in (*self.rows, self.total):
            full, packed = (
                f"{size / 2**20:.1f} MiB"
                for size in (row.full_precision_bytes, row.quantized_bytes)
            )
            lines.append(
                f"{row.component:<11}{row.parameters:>15,}{full:>17}{packed:>12}{row.ratio:>7.2f}"
            )
        return "\n".join(lines)


def footprint(
    model: nn.Module,
    modules: Mapping[str, QuantScheme],
    *,
    positions: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Footprint:
    """Sizes a model before and after quantizing.

    Args:
        model: in full precision; its tensors may be on the meta device.
        modules: canonical names of the modules to quantize, and how.
        positions: component -> calibrated positions, for modules with granularity "token".
        dtype: of everything in full precision.

    Returns:
        The rows; tensors that several modules share count once.

    Raises:
        ValueError: `modules` names something that is no linear module of the model, or `positions`
            lacks a component.
    """
    linears = {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    if unknown := sorted(set(modules) - set(linears)):
        raise ValueError(
            f"modules: {unknown[0]!r} is no linear module of the model: use names as in "
            f"named_modules()."
        )
    parameters, full, packed = (dict.fromkeys(COMPONENTS, 0) for _ in range(3))
    for name, tensor in _stored(model):
        component = component_of(name)
        parameters[component] += tensor.numel()
        full[component] += (size := _bytes(tensor, dtype))
        module, _, kind = name.rpartition(".")
        if module not in modules or kind != "weight":
            packed[component] += size  # biases of quantized modules too
            continue
        linear = linears[module]
        packed[component] += linear_bytes(
            linear.in_features,
            linear.out_features,
            modules[module],
            _positions(module, modules[module], positions),
        )
    return Footprint(
        rows=tuple(
            FootprintRow(
                component=c,
                parameters=parameters[c],
                full_precision_bytes=full[c],
                quantized_bytes=packed[c],
            )
            for c in COMPONENTS
            if parameters[c]
        )
    )


def linear_bytes(
    in_features: int, out_features: int, scheme: QuantScheme, positions: int | None = None
) -> int:
    """Bytes of one quantized module without its bias.

    Args:
        in_features: inputs.
        out_features: outputs.
        scheme: of the module.
        positions: calibrated positions; required by granularity "token".
    """
    weight = 4 * out_features * scheme.words(in_features)
    groups = out_features * scheme.groups(in_features)
    parameters = groups * (2 if scheme.symmetric else 3)  # bfloat16 scale, uint8 zero point
    statics = {"channel": in_features, "token": positions or 0}.get(scheme.granularity, 0)
    return weight + parameters + 8 * statics  # float32 scale, int32 zero point


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model that was quantized: a packed weight counts as what it stands for, scales and zero points not at all."""
    sizes: dict[int, int] = {}
    for _, module in quantized_modules(model):
        own = dict(module.named_parameters(recurse=False))
        sizes |= {id(parameter): 0 for part, parameter in own.items() if part != "bias"}
        sizes[id(module.tensors["weight"])] = module.in_features * module.out_features
    return sum(sizes.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def component_of(name: str) -> str:
    """The component that a module or tensor belongs to, by its canonical name or its name in a checkpoint; "other" if none is known."""
    parts = name.split(".")
    return next((component for part, component in _PARTS if part in parts), "other")


def _stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Canonical name and tensor of everything that is saved; shared tensors under their first name."""
    seen: set[int] = set()
    stored = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            stored.append((canonical_name(name), tensor))
    return stored


def _bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * (
        dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
    )


def _positions(module: str, scheme: QuantScheme, positions: Mapping[str, int] | None) -> int | None:
    if scheme.granularity != "token":
        return None
    if (count := (positions or {}).get(component_of(module))) is None:
        raise ValueError(
            f"{module}: granularity 'token' needs the number of positions: pass "
            f"positions={{{component_of(module)!r}: 577}}."
        )
    return count
