"""How much of a model is quantized: percent of its weights, and why the rest is not."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvlm_hf.models.families import FAMILIES
from qvlm_hf.models.find_parts import component_finder
from qvlm_hf.models.graph import EVERYTHING, Selection, canonical_name

__all__ = ["Coverage", "Kept", "left_out_by_row", "measure_coverage"]


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
class Coverage:
    """How much of a model is quantized.

    Attributes:
        parameters: numbers in the whole model; shared ones count once.
        kept: everything that stays in full precision.
    """

    parameters: int
    kept: tuple[Kept, ...]

    @property
    def percent(self) -> float:
        """Share of the weights that are quantized."""
        kept = sum(part.parameters for part in self.kept)
        return 100 * (1 - kept / self.parameters) if self.parameters else 0.0

    def summary(self) -> dict[str, Any]:
        """What config.json and the report say: percent quantized, percent kept by reason."""
        kept: Counter[str] = Counter()
        for part in self.kept:
            kept[part.reason] += part.parameters
        shares = {
            reason: round(100 * count / self.parameters, 1) for reason, count in kept.most_common()
        }
        return {
            "percent": round(self.percent, 1),
            "kept": {reason: share for reason, share in shares.items() if share},
        }


def measure_coverage(
    model: nn.Module, quantized: Collection[str], left_out: Mapping[str, str]
) -> Coverage:
    """Counts the weights of a model, before it is quantized or after.

    `left_out`: path of a part of the model -> why it stays; the longest path counts.
    """
    quantized, seen = set(quantized), set[int]()
    kept, total = [], 0

    def why(path: str, otherwise: str) -> str:
        parts = path.split(".")
        paths = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((left_out[path] for path in paths if path in left_out), otherwise)

    for name, module in model.named_modules():
        own = {part: p for part, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen |= set(map(id, own.values()))
        if canonical_name(name) in quantized:
            linear: Any = module
            total += int(linear.in_features) * int(linear.out_features)  # some are tensors
            kept += [Kept(name, "bias", p.numel()) for part, p in own.items() if part == "bias"]
        elif "weight" in own or "bias" in own:
            count = sum(p.numel() for p in own.values())
            kept.append(Kept(name, why(name, _kind(module)), count))
        else:
            for part, parameter in own.items():
                path = f"{name}.{part}".lstrip(".")
                bare = f"a bare parameter of {parameter.dim()} dimensions"
                kept.append(Kept(path, why(path, bare), parameter.numel()))
    return Coverage(total + sum(part.parameters for part in kept), tuple(kept))


def left_out_by_row(model: Any, selection: Selection = EVERYTHING) -> dict[str, str]:
    """Says which parts of a family with a row stay, and why; arguments as of `graph.resolve`.

    Raises:
        ValueError: as `resolve`.
    """
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    unquantized = FAMILIES[model.config.model_type].unquantized
    found = {f"{base}.{path}".lstrip("."): reason for path, reason in unquantized.items()}
    component_of = component_finder(model)
    for name, module in model.named_modules():
        component = component_of(name)
        if not isinstance(module, nn.Linear):
            continue
        if selection.excludes(name):
            found[name] = "modules_to_not_convert"
        elif component == "head":
            found[name] = "output head"
        elif not selection.wants(component):
            found[name] = f"quantize_{component}=False"
    return found


def _kind(module: nn.Module) -> str:
    """What a module is, where that says why it stays."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in kind.lower():
        return "norm"
    if "Conv" in kind:
        return "convolution"
    if type(module) is nn.Linear:
        return "outside of the layers"
    return f"a {kind}, no nn.Linear"
