"""What Optimum's users expect of a quantization library; they import it as `optimum.qvlm`.

    QVLMOptimumQuantizer    Optimum's quantizer interface
    pipeline                as optimum.onnxruntime.pipeline and optimum.intel.pipeline
    enable                  optimum.pipelines.pipeline(..., accelerator="qvlm") means the same

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
    from transformers import Pipeline

__all__ = ["QVLMOptimumQuantizer", "disable", "enable", "pipeline"]

_TASK = "image-text-to-text"
_HUB = ("revision", "token", "trust_remote_code", "cache_dir")  # the first three in pipelines


class QVLMOptimumQuantizer(OptimumQuantizer):
    """Quantizes a model into a directory.

    A model given by name is read anew by every `quantize`, on the way into its packed form; one
    given as an object is quantized in place.
    """

    def __init__(self, model: str | PreTrainedModel, processor: Any, **options: Any) -> None:
        """Takes what `from_pretrained` found; arguments as there."""
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
            file_name: of Optimum's interface; must be None.
            processor: saved with the model, and used for calibration unless the configuration has
                one; None reads the one beside the model.
            **options: of `AutoModelForImageTextToText.from_pretrained`: dtype, revision, token ...

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
            name = model_or_path.name_or_path
            return cls(model_or_path, processor or AutoProcessor.from_pretrained(name))
        name = str(model_or_path)
        hub = {name: options[name] for name in _HUB if name in options}
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
            file_prefix: of Optimum's interface; must be None.
            config: how to quantize; None is `QVLMConfig()`, which needs a dataset.
            overwrite: replace an earlier result.
            max_shard_size: of one safetensors file.

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
        options: Any = {"overwrite": overwrite, "max_shard_size": max_shard_size}
        return save_quantized(model, self.processor, save_dir, report=report, **options)


_SIGNATURE = inspect.signature(optimum.pipelines.pipeline)


@functools.wraps(optimum.pipelines.pipeline, assigned=())  # gives it that signature
def pipeline(*args: Any, **kwargs: Any) -> Pipeline:
    """A Transformers pipeline on a quantized model, called as `optimum.pipelines.pipeline`.

    Unlike `transformers.pipeline`, it reads the model once: an error is the model's own, and is not
    answered by a second try in float32. Arguments that are not listed mean what they mean there.

    Args:
        *args: as Optimum orders them.
        **kwargs: task: None is "image-text-to-text". model: directory or Hub id of a quantized
            model, of a full-precision one with `quantization_config` in `model_kwargs`, or an
            object. processor: None reads the one beside the model. framework: "pt" or None.
            torch_dtype: of everything in full precision. model_kwargs: for `from_pretrained`; not
            changed. accelerator: "qvlm" or None.

    Raises:
        ValueError: no model, or one that is not quantized; another framework or accelerator; or as
            `from_pretrained`.
        OSError: there is no such model, or no processor beside it.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = bound.arguments
    names = ("accelerator", "framework", "task", "model", "model_kwargs", "kwargs")
    accelerator, framework, task, model, model_kwargs, more = (given.pop(name) for name in names)
    if accelerator not in (None, QUANT_METHOD):
        raise ValueError(
            f"accelerator={accelerator!r} must be {QUANT_METHOD!r} here: "
            "optimum.pipelines.pipeline has the others."
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
    options = {"device_map": given.pop("device_map"), "dtype": given.pop("torch_dtype")}
    if isinstance(model, str | Path):
        options |= {name: given[name] for name in ("config", *_HUB[:3])}
        asked = {name: value for name, value in options.items() if value is not None}
        model = AutoModelForImageTextToText.from_pretrained(model, **asked | (model_kwargs or {}))
    if getattr(model, "quantization_method", None) != QUANT_METHOD:
        raise ValueError(
            f"{model.name_or_path}: is not quantized with {QUANT_METHOD}: give such a checkpoint, "
            "or model_kwargs={'quantization_config': QVLMConfig(...)}."
        )
    given["processor"] = given["processor"] or model.name_or_path or None
    make: Any = transformers.pipeline  # declared for each task by name; ours is any string
    return make(_TASK, model=model, **given, **more)


def enable() -> None:
    """Teaches `optimum.pipelines.pipeline` the value accelerator="qvlm", and nothing else.

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
