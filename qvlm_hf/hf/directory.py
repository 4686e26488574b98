"""A saved directory, looked at before Transformers opens it: a damaged one gets a KeyError there, or a page of tensor names.

Left out: Hub ids, whose files are not here yet, and a `from_pretrained` where config.json lost its
`quantization_config`, because then nothing tells Transformers to ask this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvlm_hf.hf.checks import tensor_headers
from qvlm_hf.hf.registry import QUANT_METHOD

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedConfig

__all__ = ["INDEX_NAME", "check_directory", "check_index", "weight_files"]

INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_AGAIN = "download or quantize the model again"


def weight_files(directory: Path) -> list[str]:
    """The safetensors files of a saved model: the only one, which Transformers takes first, or those of the index.

    Raises:
        ValueError: the index cannot be read, or names a file that is not there.
    """
    index, single = directory / INDEX_NAME, directory / _SINGLE_NAME
    if single.is_file() or not index.is_file():
        return [str(single)]
    names = sorted(set(_read_index(index).values()))
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is no file there: {_AGAIN}.")
    return [str(directory / name) for name in names]


def check_index(directory: Path) -> None:
    """Checks a shard index as far as Transformers will rely on it; a Hub id, or a directory without an index, has none to check.

    Raises:
        ValueError: as `weight_files`.
    """
    if (directory / INDEX_NAME).is_file():
        weight_files(directory)


def check_directory(directory: Path, config: PreTrainedConfig) -> None:
    """Checks the shard index, and that packed weights have their quantization configuration.

    Args:
        directory: of a saved model.
        config: its configuration.

    Raises:
        ValueError: they have none, no weights are there, or as `weight_files`.
    """
    check_index(directory)
    if saved := getattr(config, "quantization_config", None):
        ours = isinstance(saved, dict) and saved.get("quant_method") == QUANT_METHOD
        if ours and not any(directory.glob("*.safetensors")):
            raise ValueError(f"{directory}: holds no {_SINGLE_NAME}: {_AGAIN}.")
        return  # Transformers and QVLMConfig read it
    for file in filter(lambda file: Path(file).is_file(), weight_files(directory)):
        if packed := next(
            (key for key, *_ in tensor_headers(file) if key.endswith(".weight_scale")), None
        ):
            raise ValueError(
                f"{directory}: its config.json has no quantization_config, but {packed} is of a "
                f"quantized model: {_AGAIN}."
            )


def _read_index(index: Path) -> dict[str, str]:
    """Tensor -> file.

    Raises:
        ValueError: the index is not what Transformers writes.
    """
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index}: is no JSON: {_AGAIN}.") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) for name in places.values())
    ):
        raise ValueError(
            f"{index}: is no shard index, it has no weight_map from tensors to files: {_AGAIN}."
        )
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index}: is no shard index, it has no metadata: {_AGAIN}.")
    return places
