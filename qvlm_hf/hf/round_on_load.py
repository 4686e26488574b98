"""Rounding while loading: the float model is never in memory as a whole.

For schemes that need no data. The skeleton holds quantized modules whose `weight` still has the
float shape. Transformers hands every such weight to `RoundOnLoad` and puts the packed tensors into
the module. Of experts it hands over the weights of all, as one parameter: modules take its place.
The plan and the result are those of `quantize_without_data` on the loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.calibration.without_data import rounding_report, rounding_schemes
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.experts import find_experts, split_projection
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.linear import QVLMLinear, rounded_tensors
from qvlm_hf.nn.replace import replace_modules

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["RoundOnLoad", "planned_report", "rounding_skeleton"]


class RoundOnLoad(ConversionOps):
    """One float weight in, the tensors of the quantized module out.

    Args:
        errors: gets a line for every weight that cannot be quantized; raising here would end in a
            page of Transformers' own report.
        modules: canonical module name -> scheme.
    """

    def __init__(self, errors: list[str], modules: Mapping[str, QuantScheme]) -> None:
        self.errors, self.modules = errors, modules

    def convert(  # type: ignore[override]  # the base class takes more as keywords
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **_: object,
    ) -> dict[str, Tensor]:
        """`input_dict` holds the weight, [out, in], alone or in a list, under any name.

        That of experts has three dimensions. Where files hold several weights as one, it holds
        them all, under their names in the model.
        """
        weights = {name: w[0] if isinstance(w, list) else w for name, w in input_dict.items()}
        if len(weights) == 1:
            weights = dict.fromkeys([full_layer_name], *weights.values())
        if weights[full_layer_name].dim() == 3:
            self._replace_experts(full_layer_name, weights[full_layer_name], model)
            (missing_keys or set()).discard(full_layer_name)
            return {}
        loaded: dict[str, Tensor] = {}
        for path, weight in weights.items():
            name = path.rpartition(".")[0]
            module: Any = model.get_submodule(name)
            if weight.shape != module.weight.shape:
                self.errors.append(
                    f"{path}: is {list(weight.shape)} in the files, must be "
                    f"{list(module.weight.shape)}: download the model again."
                )
            if isinstance(module, QVLMLinear):
                tensors = self._rounded(name, weight, module.scheme)
                loaded |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
            else:
                loaded[path] = weight
        return loaded

    def _replace_experts(self, name: str, weight: Tensor, model: PreTrainedModel) -> None:
        parent, _, projection = name.rpartition(".")
        linears: Any = split_projection(model.get_submodule(parent), projection, weight)
        for index, linear in enumerate(linears):
            path = f"{name}.{index}"
            if (scheme := self.modules.get(canonical_name(path))) is not None:
                tensors = self._rounded(path, linear.weight.detach(), scheme)
                linears[index] = QVLMLinear.from_packed(linear, scheme, tensors)
            else:
                own = linear.weight.detach().clone(memory_format=torch.contiguous_format)
                linear.weight = nn.Parameter(own, requires_grad=False)
                linear._is_hf_initialized = linear.weight._is_hf_initialized = True

    def _rounded(self, name: str, weight: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
        try:
            return rounded_tensors(weight, scheme)
        except ValueError as error:
            self.errors.append(f"{name}: {error}")
            return rounded_tensors(torch.zeros_like(weight), scheme)


def planned_report(model: nn.Module, settings: CalibrationSettings) -> CalibrationReport:
    """The report that `quantize_without_data` gives, made before the weights are there."""
    segments = resolve_segments(model, settings)
    schemes = rounding_schemes(model, segments, settings)
    return rounding_report(model, segments, schemes, settings)


def rounding_skeleton(model: nn.Module, modules: Mapping[str, QuantScheme]) -> frozenset[str]:
    """Replaces modules (on the meta device) by quantized ones that wait for a float weight.

    Returns:
        Names of the parameters of experts, if one of them is to be quantized.
    """
    replaced = {}
    found = find_experts(model)
    experts = tuple(f"{name}." for name in found)
    for name, scheme in modules.items():
        if name.startswith(experts):  # their parameters stay what Transformers knows
            continue
        linear: Any = model.get_submodule(name)
        module = QVLMLinear(
            linear.in_features, linear.out_features, scheme, bias=linear.bias is not None,
            dtype=linear.weight.dtype, device="meta",
        )  # fmt: skip
        weight = nn.Parameter(torch.empty_like(linear.weight), requires_grad=False)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # as every tensor of ours
        module.register_parameter("weight", weight)
        replaced[name] = module
    replace_modules(model, replaced)
    if not any(name.startswith(experts) for name in modules):
        return frozenset()
    return frozenset(
        f"{name}.{part}" for name, module in found.items() for part in module._parameters
    )
