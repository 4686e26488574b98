"""`quantize_model`: what QVLMHfQuantizer does while loading, to a model that is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.offloading import map_weights
from qvlm_hf.hf.quantizer import QVLMHfQuantizer
from qvlm_hf.hf.runtime.experts import register_experts
from qvlm_hf.nn.replace import quantized_modules

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["quantize_model"]


def quantize_model(
    model: PreTrainedModel, config: QVLMConfig | Mapping[str, Any]
) -> CalibrationReport:
    """Quantizes a model in memory, in place, as `from_pretrained` does with a `QVLMConfig`.

    Args:
        model: in full precision, of a known family; what is offloaded from the CPU is mapped.
        config: as for `from_pretrained`, or its fields in a dict; not changed.

    Returns:
        The report, also at `model.hf_quantizer.report`. `model.save_pretrained` then writes a
        quantized checkpoint.

    Raises:
        ValueError: the model is quantized already, `config` lacks data, a sample is wrong, or as
            `quantize_with_data`. The model is then as it was.
        RuntimeError: the model answers differently with a key-value cache than without one:
            versions that do not go together. It is quantized and complete.
        Exception: what a callback's `on_calibration_end` raises. The model is then quantized and
            complete, and can be saved; callbacks behind that one are not called, and nothing is
            published.
    """
    from transformers import PreTrainedModel  # not at the top: it takes a second

    quantized = isinstance(model, nn.Module) and next(quantized_modules(model), None) is not None
    if quantized or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantized already: load the full-precision one, or call "
            "model.dequantize() first."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"quantize_model takes a model of Transformers, not {type(model).__name__}: give the "
            f"model inside "
            "(of PEFT: what merge_and_unload() or unload() returns)."
        )
    if isinstance(config, Mapping):
        config = QVLMConfig(**config)
    if not isinstance(config, QVLMConfig):
        raise ValueError(
            f"config={config!r} must be a QVLMConfig, or a dict of its fields: "
            f"quantize_model(model, QVLMConfig(...))."
        )
    quantizer = QVLMHfQuantizer(config, pre_quantized=False)
    quantizer.validate_environment()
    quantizer.update_dtype(model.dtype)
    map_weights(model)
    quantizer.check_processor(model)
    register_experts(model)
    quantizer.report = quantizer.calibrate(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = quantizer.quantization_config.quant_method
    for part in model.modules():
        if isinstance(config_of_part := getattr(part, "config", None), PreTrainedConfig):
            config_of_part._is_quantized = True
    model.config.quantization_config = quantizer.quantization_config
    quantizer.finish(model)
    return quantizer.report
