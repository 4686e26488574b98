"""`QVLMHfQuantizer`: what Transformers calls to load, save and dequantize with a `QVLMConfig`.

    full precision + dataset      check samples and processor, load, calibrate and pack
    full precision, no dataset    round each weight as it is loaded          round_on_load.py
    quantized checkpoint          check headers, load, check values          checkpoint.py

in_memory.py does the first two to a model in memory. Methods stand in the order in which
Transformers calls them. Left out: tensor parallelism, which is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer

from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.process.ranks import is_main
from qvlm_hf.calibration.process.scratch import check_scratch_dir, scratch
from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.samples import Sample
from qvlm_hf.calibration.without_data import by_structure
from qvlm_hf.format.files import INDEX_NAME, check_readable, weight_files
from qvlm_hf.hf.calibrate import calibrate, read_samples
from qvlm_hf.hf.checkpoint import (
    check_complete,
    check_files,
    check_loaded,
    empty_modules,
    read_headers,
)
from qvlm_hf.hf.config import FORMAT_VERSION, QVLMConfig
from qvlm_hf.hf.key_names import (
    keep_names_on_saving,
    split_saved_experts,
    without_rules_for_experts,
)
from qvlm_hf.hf.offloading import mapped_device_map
from qvlm_hf.hf.origin import origin
from qvlm_hf.hf.preflight import preflight
from qvlm_hf.hf.processor_fit import check_processor_fits, pictured
from qvlm_hf.hf.registry import quantizer_class
from qvlm_hf.hf.round_on_load import RoundOnLoad, planned_report, rounding_skeleton
from qvlm_hf.hf.runtime.compiling import compile_as_transformers_does, round_as_eager
from qvlm_hf.hf.runtime.experts import register_experts
from qvlm_hf.hf.runtime.refusals import add_refusals, remove_refusals
from qvlm_hf.hub.upload import Published, Target
from qvlm_hf.models.experts import has_split_experts, join_experts
from qvlm_hf.models.families import FAMILIES, has_row
from qvlm_hf.models.graph import canonical_name, why_empty
from qvlm_hf.nn.footprint import count_parameters
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import dequantize_modules, quantized_modules, replace_modules

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

# Methods import what imports Transformers' modeling code, because that takes a second.
__all__ = ["QVLMHfQuantizer"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        # a copy: the user's own object stays as it is
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.report: CalibrationReport | None = None
        self.published: Published | None = None
        self._has_row = True  # in the table of families; told by the model when it comes
        self._samples: list[Sample] | None = None
        self._expected: dict[str, float] | None = None  # seconds by step
        self._files: tuple[str, ...] = ()  # of the checkpoint
        self._errors: list[str] = []
        self._experts: frozenset[str] = frozenset()  # parameters of experts to round on load
        self._routes = False  # whether experts compute one by one
        self._target: Target | None = None

    @property
    def rounds_on_load(self) -> bool:
        """Whether weights are rounded one by one while they are loaded."""
        config = self.quantization_config
        # a rotation needs norms and weights together, and reading by structure runs the model
        return (
            not self.pre_quantized
            and self._has_row
            and config.dataset is None
            and config.settings().rotation is None
        )

    def validate_environment(self, *args: object, device_map: Any = None, **kwargs: object) -> None:
        """Reads and checks the calibration samples, before anything of the model is read.

        May be called twice.

        Raises:
            ValueError: a model that is to be quantized would lie on a GPU and on disk,
                `hub_model_id` cannot be published to, or as `read_samples`.
            OSError: the Hub refuses, or cannot be reached, and `push_to_hub` is True.
        """
        del args, kwargs
        if self.pre_quantized:
            return
        mapped_device_map(device_map)
        if self._samples is not None:
            return
        config = self.quantization_config
        if config.push_to_hub and self._target is None:
            from qvlm_hf.hf.publishing import check_push

            self._target = check_push(config)
        self._samples = read_samples(config)

    def update_device_map(self, device_map: Any) -> Any:
        """Maps from the files, to be quantized, what would be offloaded from the CPU to disk."""
        return device_map if self.pre_quantized else mapped_device_map(device_map)

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
        """Chooses runtime/attention.py for the language model, unless the user chose; never saved.

        A family without a row keeps Transformers' own.

        Raises:
            ValueError: the checkpoint is a directory with a damaged shard index.
        """
        name = config.name_or_path
        if name and (Path(name) / INDEX_NAME).is_file():
            weight_files(name)  # no later hook comes before Transformers reads the index
        from qvlm_hf.hf.runtime.attention import ATTENTION  # registers it

        text = config.get_text_config()
        asked = config._attn_implementation or getattr(text, "_attn_implementation", None)
        capped = getattr(text, "attn_logit_softcapping", None)  # which `sdpa` does not know
        known = config.model_type in FAMILIES and not capped
        if known and asked is None and "text_config" in config.sub_configs:
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
                "tensor parallelism."
            )

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes of a weight that is rounded on load, for device_map='auto'; else None."""
        return self.quantization_config.weight_bits / 8 if self.rounds_on_load else None

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: object
    ) -> bool:
        """Whether the checkpoint's tensor `param_name` is a float weight to be rounded on load."""
        del kwargs
        module, _, part = param_name.rpartition(".")
        if not self.rounds_on_load:
            return False
        if part != "weight" or not hasattr(model.get_submodule(module), "in_features"):
            return param_name in self._experts
        # several weights that files hold as one come under the name of the first
        siblings = model.get_submodule(module.rpartition(".")[0]).children()
        return any(isinstance(sibling, QVLMLinear) for sibling in siblings)

    def get_quantize_ops(self) -> RoundOnLoad:
        """What rounds them."""
        return RoundOnLoad(self._errors, self.report.modules if self.report else {})

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Transformers' rules, without those that make one parameter of experts saved apart."""
        rules: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return without_rules_for_experts(rules, model)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        device_map: Any = None,
        **kwargs: object,
    ) -> None:
        del kwargs
        self._files = tuple(checkpoint_files or ())
        config, settings = self.quantization_config, self.quantization_config.settings()
        self._has_row = has_row(model)
        register_experts(model)
        if self.pre_quantized:
            self._build_skeleton(model, self._files)
        elif self.rounds_on_load:
            self.report = planned_report(model, settings)
            self.check_processor(model)
            preflight(model, config, None, device_map)
            self._experts = rounding_skeleton(model, self.report.modules)
        else:
            # what cannot be done should not wait for the weights
            if config.dataset is not None or not by_structure(model, settings):
                resolve_segments(model, settings)
            self.check_processor(model)
            self._expected = preflight(model, config, self._samples, device_map)
        if not self.pre_quantized:  # what the user can mend at once comes before
            check_readable(self._files)

    def check_processor(self, model: PreTrainedModel) -> None:
        """Checks that the processor, saved with the result even without data, serves the model."""
        if self.quantization_config.processor is not None and has_row(model):
            check_processor_fits(model, self.quantization_config.processor, self._samples)

    def _build_skeleton(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        check_files(files, str(model.config.name_or_path))
        split_saved_experts(model, self.quantization_config.modules)
        headers = read_headers(model, files)
        replace_modules(model, empty_modules(model, self.quantization_config.modules, headers))
        check_complete(model, headers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> None:
        del kwargs
        if self._errors:
            raise ValueError(self._errors[0])
        if self.pre_quantized or self.rounds_on_load:
            check_loaded(model)
        else:
            self.report = self.calibrate(model)
        self.finish(model)

    def calibrate(self, model: PreTrainedModel) -> CalibrationReport:
        """Quantizes the loaded model and keeps the samples that it has positions for."""
        report, self._samples = calibrate(
            model, self.quantization_config, self._samples, self._expected
        )
        return report

    def finish(self, model: PreTrainedModel) -> None:
        """Fuses, checks and announces the model, and lets go of the data, even after an error."""
        config = self.quantization_config
        for _, module in quantized_modules(model):
            module.requires_grad_(False)
        from qvlm_hf.hf.runtime.fusion import fuse

        self._routes = has_split_experts(model)
        fuse(model)
        round_as_eager(model)
        add_refusals(model)
        keep_names_on_saving(model)
        try:
            if self.report is not None:
                provenance = origin(model, self._files) | self.report.provenance
                self.report = replace(self.report, provenance=provenance)
                config.update(
                    modules=dict(self.report.modules),
                    provenance=dict(provenance),
                    rotation=self.report.settings["rotation"],
                )
                self.report = self._check_decoding(model, self.report)
                self._announce(model, self.report)
        finally:
            config.dataset, config.processor, config.callbacks, self._samples = None, None, (), None

    def _check_decoding(
        self, model: PreTrainedModel, report: CalibrationReport
    ) -> CalibrationReport:
        """Compares answers with a key-value cache and without, where there is a sample for it."""
        if not self._samples:
            return report
        from qvlm_hf.hf.runtime.decoding import check_new_model

        processor = self.quantization_config.processor
        folder = self.quantization_config.scratch_dir
        with scratch(None if folder is None else check_scratch_dir(folder)):
            check, warning = check_new_model(model, pictured(self._samples), processor)
        warnings = report.warnings if warning is None else (*report.warnings, warning)
        return replace(report, decode_check=check, warnings=warnings)

    def _announce(self, model: PreTrainedModel, report: CalibrationReport) -> None:
        """Tells the callbacks, which may change or refuse the model, and then publishes."""
        config = self.quantization_config
        for callback in config.callbacks:
            if hasattr(callback, "on_calibration_end"):
                callback.on_calibration_end(model, report)
        if self._target is not None and is_main():
            from qvlm_hf.hf.publishing import push_result

            self.published = push_result(model, config.processor, self._target)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        for name, module in quantized_modules(model):
            if module.weight.is_meta:
                raise ValueError(f"{name} {why_empty(module)}, then dequantize it.")
        from qvlm_hf.hf.runtime.fusion import unfuse

        remove_refusals(model)
        unfuse(model)
        compile_as_transformers_does(model)
        if not isinstance(dtype, torch.dtype):  # a saved model's config holds its name
            dtype = getattr(torch, dtype) if dtype else model.dtype
        dequantize_modules(model, dtype)
        join_experts(model)
        # `to(dtype)` would take complex buffers for real ones
        model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """The state dict as it is, and what goes into the safetensors header.

        config.json, which is written next, gets the modules that are quantized now: some may have
        been exchanged or taken out.
        """
        held = {canonical_name(name): module.scheme for name, module in quantized_modules(model)}
        listed = self.quantization_config.modules
        if held.keys() <= listed.keys():  # in a part of the model, or with adapters, names differ
            modules = {name: held[name] for name in listed if name in held}
            self.quantization_config.update(modules=modules)
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
        """A quantized module is one operator with a shape-only implementation.

        Which experts run is known when their tokens are.
        """
        return not self._routes
