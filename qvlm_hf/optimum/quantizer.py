"""What Optimum's users expect of a quantization library; they import it as `optimum.qvlm`.

    QVLMOptimumQuantizer.from_pretrained(model).quantize(directory, config=QVLMConfig(...))     Optimum's quantizer interface
    pipeline("image-text-to-text", model=directory)                      beside optimum.onnxruntime.pipeline and optimum.intel.pipeline
    enable()                                                      optimum.pipelines.pipeline(..., accelerator="qvlm") means the same

Optimum's dispatcher knows "ort" and "ov" and has no registry, so `enable` replaces it by one that
asks here first. That happens on request alone, never at import, and `disable` takes it back.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optimum.pipelines
import transformers
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.in_memory import quantize_model
from qvlm_hf.hf.registry import QUANT_METHOD
from qvlm_hf.hf.saving import check_output, save_quantized

if TYPE_CHECKING:
    import torch
    from transformers import (
        BaseImageProcessor,
        FeatureExtractionMixin,
        Pipeline,
        PreTrainedConfig,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )

__all__ = ["QVLMOptimumQuantizer", "disable", "enable", "pipeline"]

_TASK = "image-text-to-text"


class QVLMOptimumQuantizer(OptimumQuantizer):
    """Quantizes a model into a directory.

    A model given by name is read anew by every `quantize`, on the way into its packed form; one
    given as an object is quantized in place.
    """

    def __init__(self, model: str | PreTrainedModel, processor: Any, **options: Any) -> None:
        """Takes what `from_pretrained` found.

        Args:
            model: directory, Hub id, or a model in full precision.
            processor: of the model; saved with it, and used for calibration unless the
                configuration has one.
            **options: of `AutoModelForImageTextToText.from_pretrained`, for a model given by name.
        """
        self.model, self.processor, self.options = model, processor, options

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: str | Path | PreTrainedModel,
        file_name: str | None = None,
        *,
        processor: Any = None,
        **options: Any,
    ) -> QVLMOptimumQuantizer:
        """Reads the processor; weights are read by `quantize`.

        Args:
            model_or_path: directory, Hub id, or a model in full precision.
            file_name: of Optimum's interface; must be None, because a checkpoint's files have fixed
                names.
            processor: of the model; None reads the one beside it.
            **options: of `AutoModelForImageTextToText.from_pretrained` (dtype, revision, token,
            device_map and so on).

        Raises:
            ValueError: `file_name` is given, or `options` with a model object.
            OSError: there is no processor.
        """
        _refuse("file_name", file_name)
        if isinstance(model_or_path, PreTrainedModel):
            if options:
                raise ValueError(
                    f"the options {sorted(options)} are for loading a model: leave them out with a "
                    f"model object."
                )
            return cls(
                model_or_path,
                processor or AutoProcessor.from_pretrained(model_or_path.name_or_path),
            )
        name = str(model_or_path)
        hub = {
            key: options[key]
            for key in ("revision", "token", "cache_dir", "trust_remote_code")
            if key in options
        }
        return cls(name, processor or AutoProcessor.from_pretrained(name, **hub), **options)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        config: QVLMConfig | None = None,
        overwrite: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> Path:
        """Quantizes, and saves model, processor and report.

        Args:
            save_dir: the directory to make.
            file_prefix: of Optimum's interface; must be None, because a checkpoint's files have
                fixed names.
            config: how to quantize; None is `QVLMConfig()`, which needs a dataset.
            overwrite: replace an earlier result.
            max_shard_size: of one safetensors file.

        Returns:
            The directory.

        Raises:
            ValueError: `save_dir` may not be written, the model is quantized already, or as
                `from_pretrained` with a `QVLMConfig`.
            OSError: writing failed; `save_dir` is as it was.
        """
        _refuse("file_prefix", file_prefix)
        if config is not None and not isinstance(config, QVLMConfig):
            raise ValueError(
                f"config={config!r} must be a QVLMConfig: write QVLMConfig(scheme=...)."
            )
        check_output(save_dir, overwrite=overwrite)
        config = copy.copy(config or QVLMConfig())
        config.processor = config.processor or self.processor
        if isinstance(self.model, str):
            model: Any = AutoModelForImageTextToText.from_pretrained(
                self.model, quantization_config=config, **self.options
            )
            if (report := model.hf_quantizer.report) is None:
                raise ValueError(
                    f"{self.model}: is quantized already: give the full-precision model."
                )
        else:
            model, report = self.model, quantize_model(self.model, config)
        return save_quantized(
            model,
            self.processor,
            save_dir,
            report=report,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
        )


def pipeline(  # noqa: D417 - the rest is as in transformers.pipeline
    task: str | None = None,
    model: str | PreTrainedModel | None = None,
    config: str | PreTrainedConfig | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    feature_extractor: str | FeatureExtractionMixin | None = None,
    image_processor: str | BaseImageProcessor | None = None,
    processor: str | ProcessorMixin | None = None,
    framework: str | None = None,
    revision: str | None = None,
    use_fast: bool = True,
    token: str | bool | None = None,
    device: int | str | torch.device | None = None,
    device_map: str | dict[str, int | str] | None = None,
    torch_dtype: str | torch.dtype | None = "auto",
    trust_remote_code: bool | None = None,
    model_kwargs: dict[str, Any] | None = None,
    pipeline_class: Any | None = None,
    accelerator: str | None = None,
    **kwargs: Any,
) -> Pipeline:
    """A Transformers pipeline on a quantized model; the signature is that of `optimum.pipelines.pipeline`.

    Unlike `transformers.pipeline`, it reads the model once: an error is the model's own, and is not
    answered by a second try in float32. Arguments that are not listed mean what they mean there.

    Args:
        task: None is "image-text-to-text".
        model: directory or Hub id of a quantized model, of a full-precision one with
            `quantization_config` in `model_kwargs`, or an object.
        processor: None reads the one beside the model.
        framework: "pt" or None.
        torch_dtype: of what is not quantized.
        model_kwargs: for `from_pretrained`; not changed.
        accelerator: "qvlm" or None.

    Raises:
        ValueError: no model, or one that is not quantized; another framework or accelerator; or as
            `from_pretrained`.
        OSError: there is no such model, or no processor beside it.
    """
    if accelerator not in (None, QUANT_METHOD):
        raise ValueError(
            f"accelerator={accelerator!r} must be {QUANT_METHOD!r} here: "
            f"optimum.pipelines.pipeline has the others."
        )
    if framework not in (None, "pt"):
        raise ValueError(f"framework={framework!r} must be 'pt': quantized models run in PyTorch.")
    if task not in (None, _TASK):
        raise ValueError(
            f"task={task!r} must be {_TASK!r}: these models answer questions about pictures."
        )
    if model is None:
        raise ValueError(
            "model=None: there is no default model; give a directory, a Hub id or a model."
        )
    hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    if isinstance(model, str | Path):
        options = {"config": config, "device_map": device_map, "dtype": torch_dtype, **hub}
        given = {key: value for key, value in options.items() if value is not None}
        model = AutoModelForImageTextToText.from_pretrained(model, **given | (model_kwargs or {}))
    if getattr(model, "quantization_method", None) != QUANT_METHOD:
        raise ValueError(
            f"{model.name_or_path}: is not quantized with {QUANT_METHOD}: give such a checkpoint, "
            f"or "
            "model_kwargs={'quantization_config': QVLMConfig(...)}."
        )
    make: Any = transformers.pipeline  # declared for each task by name; ours is any string
    return make(
        _TASK,
        model=model,
        config=config,
        tokenizer=tokenizer,
        feature_extractor=feature_extractor,
        image_processor=image_processor,
        processor=processor or model.name_or_path or None,
        use_fast=use_fast,
        device=device,
        pipeline_class=pipeline_class,
        **hub,
        **kwargs,
    )


def enable() -> None:
    """Teaches `optimum.pipelines.pipeline` the value accelerator="qvlm"; everything else stays with Optimum.

    A `pipeline` that was imported from optimum.pipelines before is the old one: call this first.
    """
    if not isinstance(optimum.pipelines.pipeline, _Dispatcher):
        optimum.pipelines.pipeline = _Dispatcher(optimum.pipelines.pipeline)


def disable() -> None:
    """Gives `optimum.pipelines` its own function back."""
    if isinstance(optimum.pipelines.pipeline, _Dispatcher):
        optimum.pipelines.pipeline = optimum.pipelines.pipeline.original


class _Dispatcher:
    """`optimum.pipelines.pipeline` with one accelerator more."""

    def __init__(self, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.signature = original, inspect.signature(original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.signature.bind_partial(*args, **kwargs).arguments.get("accelerator")
        return (pipeline if asked == QUANT_METHOD else self.original)(*args, **kwargs)


def _refuse(name: str, value: str | None) -> None:
    """An argument of Optimum's interface that has no meaning here is an error, not ignored."""
    if value is not None:
        raise ValueError(f"{name}={value!r} must be None: a checkpoint's files have fixed names.")
