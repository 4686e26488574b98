"""`QVLMHfQuantizer`: what Transformers calls while it loads, saves and dequantizes a model with a `QVLMConfig`.

    full precision + dataset      load, then calibrate and pack            (samples and processor are checked first)
    full precision, no dataset    round each weight as it is loaded        (rounding.py)
    quantized checkpoint          check headers, build the skeleton, load, check values   (checks.py)

`quantize_model` does the first two to a model in memory. Left out: tensor parallelism, which is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer

from qvlm_hf.calibration.progress import ProgressBar
from qvlm_hf.calibration.report import CalibrationReport
from qvlm_hf.calibration.samples import (
    Sample,
    collate,
    dataset_name,
    hold_out,
    load_samples,
    longest_sample,
    without_too_long,
)
from qvlm_hf.calibration.samples.synthetic import SYNTHETIC, synthesize
from qvlm_hf.hf.checks import check_complete, check_files, check_loaded, check_modules, read_headers
from qvlm_hf.hf.config import FORMAT_VERSION, QVLMConfig
from qvlm_hf.hf.directory import check_index
from qvlm_hf.hf.origin import origin
from qvlm_hf.hf.processor_fit import check_processor_fits
from qvlm_hf.hf.registry import quantizer_class
from qvlm_hf.hf.round_on_load import (
    RoundOnLoad,
    planned_report,
    resolve_segments,
    rounding_skeleton,
)
from qvlm_hf.hf.runtime.compiling import compile_as_transformers_does, round_as_eager
from qvlm_hf.hf.runtime.guards import guard, unguard
from qvlm_hf.hub.publish import Published, Target
from qvlm_hf.models.graph import why_empty
from qvlm_hf.nn.footprint import count_parameters
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import dequantize_modules, quantized_modules, replace_modules
from qvlm_hf.quantize import CHECK_SAMPLES, calibrate_and_pack, round_and_pack

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["QVLMHfQuantizer", "quantize_model"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REASON = 200  # characters of a foreign error in a warning


@quantizer_class
class QVLMHfQuantizer(HfQuantizer):
    """Transformers' side of a quantized model; reached as `model.hf_quantizer`.

    Attributes:
        quantization_config: a copy of the user's `QVLMConfig`; gets `modules` and `provenance`.
        report: what quantizing measured and chose; None for a model that was loaded quantized.
        published: where `push_to_hub=True` put it; None where it did not.
    """

    requires_calibration = False  # True would refuse full-precision checkpoints
    quantization_config: QVLMConfig

    def __init__(self, quantization_config: QVLMConfig, **kwargs: Any) -> None:
        super().__init__(
            copy.deepcopy(quantization_config), **kwargs
        )  # the user's own object stays as it is
        self.report: CalibrationReport | None = None
        self.published: Published | None = None
        self._samples: list[Sample] | None = None
        self._files: tuple[str, ...] = ()  # of the checkpoint
        self._errors: list[str] = []
        self._target: Target | None = None

    @property
    def rounds_on_load(self) -> bool:
        """Whether weights are rounded one by one while they are loaded."""
        config = self.quantization_config
        # a rotation needs norms and weights together, so it waits for the whole model
        return (
            not self.pre_quantized and config.dataset is None and config.settings().rotation is None
        )

    def validate_environment(self, *args: object, device_map: Any = None, **kwargs: object) -> None:
        """Reads and checks the calibration samples, before anything of the model is read.

        May be called twice.

        Raises:
            ValueError: the scheme needs data and there is none, the processor is missing, a sample
                is wrong, a model that is to be quantized would lie on disk, or `hub_model_id`
                cannot be published to.
            OSError: the Hub refuses, or cannot be reached, and `push_to_hub` is True.
        """
        del args, kwargs
        config = self.quantization_config
        if (
            not self.pre_quantized
            and isinstance(device_map, dict)
            and "disk" in device_map.values()
        ):
            raise ValueError(
                "device_map offloads to disk, where weights cannot be quantized: quantize without "
                "it, save, and load the result with it."
            )
        settings = config.settings()
        if self.pre_quantized or self._samples is not None:
            return
        if config.push_to_hub and self._target is None:
            from qvlm_hf.hf.publishing import (
                check_push,
            )  # not at the top: it imports Transformers' modeling code

            self._target = check_push(config)
        if config.dataset is None:
            if settings.needs_data:
                raise ValueError(
                    f"scheme={config.scheme!r} has activation ranges to calibrate: give samples "
                    f"(dataset='samples.jsonl'), "
                    "or take activation_granularity='dynamic_token' or 16-bit activations, which "
                    "need no data."
                )
            config.settle_without_data()
            return
        if config.processor is None:
            raise ValueError(
                "dataset needs the model's processor: pass QVLMConfig(..., "
                "processor=AutoProcessor.from_pretrained(model_id))."
            )
        if config.dataset == SYNTHETIC:
            return  # drawn when the model is there to answer
        # a few more than asked for: they check the result
        self._samples = load_samples(
            config.dataset, num_samples=config.num_samples + CHECK_SAMPLES, seed=config.seed
        )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of everything in full precision, unchanged.

        Raises:
            ValueError: not float32, bfloat16 or float16.
        """
        if dtype not in _DTYPES:
            name, *names = (str(one).removeprefix("torch.") for one in (dtype, *_DTYPES))
            raise ValueError(
                f"dtype={name} must be one of {', '.join(names)}: take dtype='bfloat16'."
            )
        return dtype

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The language model attends as attention.py says, unless the user asked for an implementation; never saved.

        Raises:
            ValueError: the checkpoint is a directory with a damaged shard index.
        """
        if config.name_or_path:
            check_index(
                Path(config.name_or_path)
            )  # here, because no other hook sees the configuration before the index is read
        from qvlm_hf.hf.runtime.attention import (
            ATTENTION,
        )  # registers it; not at the top: Transformers' modeling code takes a second

        asked = config._attn_implementation or getattr(
            config.get_text_config(), "_attn_implementation", None
        )
        if asked is None and "text_config" in config.sub_configs:
            config._attn_implementation = {"text_config": ATTENTION}
        return config

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Leaves `plan` alone.

        Raises:
            ValueError: tensor parallelism is asked for.
        """
        del plan
        tp_size = getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
        if tp_size is not None and tp_size > 1:
            raise ValueError(
                f"tp_size={tp_size}: qvlm models cannot be split over devices yet: load without "
                f"tensor parallelism."
            )

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes of a weight that is rounded on load, for device_map='auto'; None elsewhere (calibration holds float weights)."""
        return self.quantization_config.weight_bits / 8 if self.rounds_on_load else None

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: object
    ) -> bool:
        """Whether the checkpoint's tensor `param_name` is a float weight to be rounded on load."""
        del kwargs
        module, _, part = param_name.rpartition(".")
        return (
            self.rounds_on_load
            and part == "weight"
            and isinstance(model.get_submodule(module), QVLMLinear)
        )

    def get_quantize_ops(self) -> RoundOnLoad:
        """What rounds them."""
        return RoundOnLoad(self._errors)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: object,
    ) -> None:
        del kwargs
        self._files = tuple(checkpoint_files or ())
        settings = self.quantization_config.settings()
        if self.pre_quantized:
            self._build_skeleton(model, checkpoint_files)
        elif self.rounds_on_load:
            self.report = planned_report(model, settings)
            self._check_processor(model)
            rounding_skeleton(model, self.report.modules)
        else:
            resolve_segments(
                model, settings
            )  # an unknown family or a wrong pattern should not wait for the weights
            self._check_processor(model)

    def _check_processor(self, model: PreTrainedModel) -> None:
        """Without data the processor, if there is one, is saved with the result, and must serve it."""
        if self.quantization_config.processor is not None:
            check_processor_fits(model, self.quantization_config.processor, self._samples)

    def _build_skeleton(self, model: PreTrainedModel, files: Sequence[str] | None) -> None:
        check_files(files, str(model.config.name_or_path))
        headers = read_headers(model, files or ())
        replaced: dict[str, nn.Module] = {}
        for name, layout in check_modules(model, self.quantization_config.modules, headers).items():
            linear: Any = model.get_submodule(name)
            replaced[name] = QVLMLinear(
                linear.in_features, linear.out_features, layout.scheme, bias=linear.bias is not None, dtype=linear.weight.dtype,
                positions=layout.positions, has_input_scale=layout.has_input_scale, device="meta",
            )  # fmt: skip
        replace_modules(model, replaced)
        check_complete(model, headers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> None:
        del kwargs
        if self._errors:
            raise ValueError(self._errors[0])
        if self.pre_quantized or self.rounds_on_load:
            check_loaded(model)
        else:
            self.report = self._calibrate(model)
        self._finish(model)

    def _calibrate(self, model: PreTrainedModel) -> CalibrationReport:
        """Quantizes the loaded model, with data or without."""
        config = self.quantization_config
        if config.dataset is None:
            return round_and_pack(model, config.settings())
        if config.dataset == SYNTHETIC:
            self._samples = synthesize(
                model, config.processor, config.num_samples + CHECK_SAMPLES, seed=config.seed
            )
        self._samples = without_too_long(
            self._samples or (), config.processor, longest_sample(model)
        )
        samples, held_out = hold_out(self._samples, config.num_samples, config.seed)
        callbacks = config.callbacks or (ProgressBar(),)
        report = calibrate_and_pack(
            model,
            config.settings(),
            samples,
            config.processor,
            held_out=held_out,
            callbacks=callbacks,
        )
        return replace(
            report, provenance={"dataset": dataset_name(config.dataset), **report.provenance}
        )

    def _finish(self, model: PreTrainedModel) -> None:
        """Records what is quantized, freezes it, announces it and lets go of the data, even if a callback raises."""
        config = self.quantization_config
        for _, module in quantized_modules(model):
            module.requires_grad_(False)
        from qvlm_hf.hf.runtime.fusion import (
            fuse,
        )  # not at the top: it imports Transformers' modeling code

        fuse(model)
        round_as_eager(model)
        guard(model)
        try:
            if self.report is not None:
                self.report = replace(
                    self.report, provenance=origin(model, self._files) | self.report.provenance
                )
                config.modules, config.provenance = (
                    dict(self.report.modules),
                    dict(self.report.provenance),
                )
                self.report = self._check_decoding(model, self.report)
                self._announce(model, self.report)
        finally:
            config.dataset, config.processor, config.callbacks, self._samples = None, None, (), None

    def _check_decoding(
        self, model: PreTrainedModel, report: CalibrationReport
    ) -> CalibrationReport:
        """Decodes with a cache and without one, where there is a sample to do it with.

        Parts that plug into Transformers are given up, with a warning, if that mends it.

        Returns:
            The report with what was found.

        Raises:
            RuntimeError: the answers differ all the same; the model is quantized and complete.
        """
        if not self._samples:
            return report
        from qvlm_hf.hf.runtime.decoding import check_decoding, decoding_problem
        from qvlm_hf.hf.runtime.fusion import leave_to_transformers

        sample = next((one for one in self._samples if one.pictures()), self._samples[0])
        check, warning = None, None
        try:
            inputs = collate([sample], self.quantization_config.processor).inputs
            check = check_decoding(model, inputs)
            if (warning := decoding_problem(check)) is not None:
                leave_to_transformers(model, warning)
                again = check_decoding(model, inputs)
        except Exception as error:  # of the check alone: it takes no hours of work away
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON]
            warning = f"decoding with a key-value cache was not checked ({reason}): run qvlm check."
        else:
            if warning is not None and (still := decoding_problem(again)) is not None:
                raise RuntimeError(still)
        warnings = report.warnings if warning is None else (*report.warnings, warning)
        return replace(report, decode_check=check, warnings=warnings)

    def _announce(self, model: PreTrainedModel, report: CalibrationReport) -> None:
        """Tells the callbacks and publishes, in this order: a callback may still change the model, or refuse it."""
        config = self.quantization_config
        for callback in config.callbacks:
            if hasattr(callback, "on_calibration_end"):
                callback.on_calibration_end(model, report)
        if self._target is not None:
            from qvlm_hf.hf.publishing import (
                push_result,
            )  # not at the top: it imports Transformers' modeling code

            self.published = push_result(model, config.processor, self._target)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        for name, module in quantized_modules(model):
            if module.weight.is_meta:
                raise ValueError(f"{name} {why_empty(module)}, then dequantize it.")
        from qvlm_hf.hf.runtime.fusion import unfuse

        unguard(model)
        unfuse(model)
        compile_as_transformers_does(model)
        if not isinstance(
            dtype, torch.dtype
        ):  # saving a model leaves the dtype's name in its config, which Transformers passes on
            dtype = getattr(torch, dtype) if dtype else model.dtype
        dequantize_modules(model, dtype)
        nn.Module.to(model, dtype)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """The state dict as it is, and what goes into the safetensors header."""
        return None, {
            "qvlm_format": str(FORMAT_VERSION),
            "total_parameters": str(count_parameters(model)),
        }

    def is_serializable(self) -> bool:
        """Always; a method, as Transformers calls it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """LoRA adapters on top, not the packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A quantized module is one operator with a shape-only implementation."""
        return True


def quantize_model(
    model: PreTrainedModel, config: QVLMConfig | Mapping[str, Any]
) -> CalibrationReport:
    """Quantizes a model in memory, in place, as `from_pretrained(..., quantization_config=config)` does while loading.

    Args:
        model: in full precision, of a known family.
        config: as for `from_pretrained`, or its fields in a dict; not changed.

    Returns:
        The report, also at `model.hf_quantizer.report`. `model.save_pretrained` then writes a
        quantized checkpoint.

    Raises:
        ValueError: the model is quantized already, `config` lacks data, a sample is wrong, or as
            `calibrate_and_pack`. The model is then as it was.
        RuntimeError: the model answers differently with a key-value cache than without one:
            versions that do not go together. It is quantized and complete.
        Exception: what a callback's `on_calibration_end` raises. The model is then quantized and
            complete, and can be saved; callbacks behind that one are not called, and nothing is
            published.
    """
    from transformers import (
        PreTrainedModel,
    )  # not at the top: it imports Transformers' modeling code

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
    quantizer._check_processor(model)
    quantizer.report = quantizer._calibrate(model)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = quantizer.quantization_config.quant_method
    for part in model.modules():
        if isinstance(config_of_part := getattr(part, "config", None), PreTrainedConfig):
            config_of_part._is_quantized = True
    model.config.quantization_config = quantizer.quantization_config
    quantizer._finish(model)
    return quantizer.report
