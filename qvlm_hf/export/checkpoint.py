"""A saved quantized model in another format, for programs that do not know this package.

The files are read tensor by tensor and written anew; the model itself is never built and nothing is
computed with it. Module by module, compressed_tensors.py says what becomes of the tensors, or why
nothing can. Names stay as they are in the files, which Transformers reads. Those of LLaVA become
the ones that vLLM reads (`language_model.model...`, `vision_tower.vision_model...`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from qvlm_hf.export.compressed_tensors import (
    Stored,
    convert,
    quantization_config,
    stored_as,
    with_one_group_size,
)
from qvlm_hf.format.files import TensorHeader, write_json
from qvlm_hf.hf.checkpoint import check_complete, check_values, empty_modules, read_headers
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.saving import REPORT_NAME, check_output, written_whole
from qvlm_hf.hub.payload import FILES
from qvlm_hf.hub.saved import SavedModel
from qvlm_hf.models.families import has_row
from qvlm_hf.models.graph import canonical_name
from qvlm_hf.nn.linear import QVLMLinear
from qvlm_hf.nn.replace import replace_modules

__all__ = ["EXPORT_FORMATS", "Exported", "export", "has_nested_vision", "hub_name"]

EXPORT_FORMATS = ("compressed-tensors",)
# What describes or belongs to the form that is left behind.
_NOT_COPIED = ("config.json", REPORT_NAME)
_NESTED_VISION = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        path: the directory.
        modules: canonical module name -> how it is stored.
        full_precision: canonical names of the linear modules that are stored unquantized.
    """

    path: Path
    modules: dict[str, Stored]
    full_precision: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything that can be decided without reading a weight; names are those in Transformers."""

    files: list[Path]
    headers: dict[str, TensorHeader]
    modules: dict[str, QVLMLinear]  # without memory
    stored: dict[str, Stored]
    full_precision: list[str]
    dtype: torch.dtype
    nested_vision: bool | None  # None: not LLaVA


def export(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = EXPORT_FORMATS[0],
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Exported:
    """Writes a saved quantized model, and its processor, in a format of other programs.

    Args:
        directory: what `save_quantized` or `qvlm quantize` wrote.
        output: the directory to make.
        format: "compressed-tensors".
        overwrite: replace an earlier result, which stays until the new one is complete.
        max_shard_size: of one safetensors file.

    Raises:
        ValueError: before anything is written: `directory` holds no quantized model or a damaged
            one, no consumer of the format runs its scheme, or `output` may not be written.
        OSError: writing failed; `output` is as it was.
    """
    if format not in EXPORT_FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(EXPORT_FORMATS)}.")
    target = check_output(output, overwrite=overwrite)
    source = Path(directory).resolve()
    plan = _plan(source)
    if target.is_relative_to(source):
        raise ValueError(
            f"{output}: is, or lies in, the model that is read: choose another directory."
        )
    modules = {canonical_name(name): kind for name, kind in plan.stored.items()}
    full_precision = [canonical_name(name) for name in plan.full_precision]
    config = SavedModel(source).config_json
    config["quantization_config"] = quantization_config(modules, full_precision)
    with written_whole(target) as partial:
        save_torch_state_dict(dict(_tensors(plan)), partial, max_shard_size=max_shard_size)
        write_json(partial / "config.json", config)
        for pattern in FILES:  # of the processor; notes and keys that lie there stay behind
            for file in sorted(source.glob(pattern)):
                name = file.relative_to(source)
                if file.is_file() and name.as_posix() not in _NOT_COPIED:
                    (partial / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, partial / name)
    return Exported(path=target, modules=modules, full_precision=tuple(full_precision))


def has_nested_vision(config: Any) -> bool:
    """Whether checkpoints on the Hub have the vision encoder in a `vision_model` of its own."""
    return getattr(getattr(config, "vision_config", None), "model_type", None) in _NESTED_VISION


def hub_name(name: str, *, nested_vision: bool) -> str:
    """A tensor's name in Transformers' model -> its name in LLaVA checkpoints on the Hub.

    Args:
        name: for example `model.vision_tower.encoder.layers.0.mlp.fc1.bias`.
        nested_vision: from `has_nested_vision`.
    """
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    part, _, rest = canonical_name(name).removeprefix("model.").partition(".")
    inside = {
        "language_model": "model.",
        "vision_tower": "vision_model." if nested_vision else "",
    }.get(part, "")
    return f"{part}.{inside}{rest}" if rest else part


def _plan(source: Path) -> _Plan:
    saved = SavedModel(source)
    quantized = QVLMConfig.from_dict(saved.quantization).modules
    config, model = saved.config, saved.model
    if not has_row(model):
        raise ValueError(
            f"{source}: model_type {config.model_type!r} cannot be exported: it has no row, and "
            f"Transformers may join or split its tensors, which packed ones cannot be."
        )
    headers = read_headers(model, saved.files)
    _check_tower(source, config, quantized)
    modules = empty_modules(model, quantized, headers)
    full_precision = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in modules
    ]
    replace_modules(model, modules)
    check_complete(model, headers)
    stored = {
        name: stored_as(
            canonical_name(name),
            module.scheme,
            module.in_features,
            has_input_scale=module.input_scale is not None,
        )
        for name, module in modules.items()
    }
    in_features = {name: module.in_features for name, module in modules.items()}
    return _Plan(
        files=saved.files,
        headers=headers,
        modules=modules,
        stored=with_one_group_size(stored, in_features),
        full_precision=full_precision,
        dtype=saved.dtype,
        nested_vision=has_nested_vision(config) if config.model_type == "llava" else None,
    )


def _check_tower(source: Path, config: Any, modules: Mapping[str, Any]) -> None:
    """Refuses what nobody loads: Transformers reads the weights of a SigLIP tower as it builds it.

    vLLM loads it, of LLaVA alone.
    """
    kind = getattr(config.vision_config, "model_type", None)
    quantized = any(".vision_" in f".{name}" for name in modules)
    if config.model_type != "llava" and kind == "siglip_vision_model" and quantized:
        raise ValueError(
            f"{source}: the SigLIP tower of a {config.model_type!r} is quantized, and Transformers "
            f"loads none in this format: quantize with quantize_vision=False."
        )


def _tensors(plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the export under its name there."""
    with ExitStack() as stack:
        opened = {
            file.name: stack.enter_context(safe_open(file, framework="pt")) for file in plan.files
        }

        def read(name: str) -> Tensor:
            header = plan.headers[name]
            return opened[header.file].get_tensor(header.key)

        for name in plan.headers:
            module, _, part = name.rpartition(".")
            packed, parts = plan.modules.get(module), {}
            if packed is None:
                parts = {part: read(name)}
                check_values(module, parts, None)
            elif part == "weight":
                parts = {own: read(f"{module}.{own}") for own, _ in packed.named_parameters()}
                check_values(module, parts, packed.scheme)
                parts = convert(
                    parts, packed.scheme, plan.stored[module], packed.in_features, plan.dtype
                )
            for one, tensor in parts.items():
                yield _exported_name(plan, module, part, one), tensor


def _exported_name(plan: _Plan, module: str, part: str, exported: str) -> str:
    """The name of a tensor: as in the file, or as vLLM reads it."""
    if plan.nested_vision is not None:
        return hub_name(f"{module}.{exported}", nested_vision=plan.nested_vision)
    return plan.headers[f"{module}.{part}"].key.removesuffix(part) + exported
