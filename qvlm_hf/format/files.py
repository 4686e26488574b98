"""The weight files of a saved model and the headers in them, read without a weight.

Every other folder asks here: a damaged file gets one line that names it and the remedy. Without
that, Transformers ends in a KeyError or a page of tensor names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "TensorHeader",
    "check_readable",
    "read_header",
    "read_index",
    "tensor_headers",
    "weight_files",
    "write_json",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_AGAIN = "download or quantize the model again"
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """One tensor as the header of a safetensors file describes it.

    Attributes:
        file: name of the file, without its directory.
        key: name of the tensor in it.
        dtype: as safetensors spells it, "BF16".
        shape: of the tensor.
        nbytes: length of its data.
    """

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def where(self) -> str:
        """File and key, for messages."""
        return f"{self.file}: {self.key}"


def weight_files(folder: str | Path) -> list[Path]:
    """Lists the files that `from_pretrained` reads weights from: the single one, or the shards.

    Raises:
        ValueError: there are none, the index is damaged, or it names a file that is not there or
            in another directory.
    """
    folder = Path(folder)
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():  # Transformers takes it first
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder}: holds no {SINGLE_NAME}: {_AGAIN}.")
    names = sorted(set(read_index(index).values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is no file there: {_AGAIN}.")
        if Path(name).name != name:
            raise ValueError(
                f"{folder}: the shard index names files in other directories ({name}): do not "
                f"trust this checkpoint, {_AGAIN}."
            )
    return [folder / name for name in names]


def read_index(index: Path) -> dict[str, str]:
    """Reads a shard index as tensor -> file name; whether the files exist is not checked.

    Raises:
        ValueError: it is not what Transformers writes.
    """
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: is no JSON: {_AGAIN}.") from error
    content = content if isinstance(content, dict) else {}
    places = content.get("weight_map")
    if not (
        isinstance(places, dict)
        and places
        and all(isinstance(name, str) for name in places.values())
    ):
        raise ValueError(
            f"{index}: is no shard index, it has no weight_map from tensors to files: {_AGAIN}."
        )
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index}: is no shard index, it has no metadata: {_AGAIN}.")
    return places


def read_header(file: str | Path) -> bytes:
    """Reads the JSON header of a safetensors file as it is written.

    Raises:
        ValueError: the file is cut short or no safetensors file.
    """
    with Path(file).open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size) if size <= _MAX_HEADER else b""
    if not header or len(header) < size:
        raise ValueError(f"{file}: is no complete safetensors file: {_AGAIN}.")
    return header


def check_readable(files: Iterable[str | Path]) -> None:
    """Reads the headers of the safetensors files among `files`: Transformers names none of them.

    Raises:
        ValueError: as `tensor_headers`.
    """
    for file in map(Path, files):
        if file.suffix == ".safetensors":
            tensor_headers(file)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file as all of ours are written, all or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def tensor_headers(file: str | Path) -> list[TensorHeader]:
    """Reads the header of every tensor of one file.

    Raises:
        ValueError: the file cannot be read, or its sizes do not add up.
    """
    try:
        with safe_open(file, framework="pt"):  # checks dtypes, shapes and sizes
            entries: dict[str, Any] = json.loads(read_header(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is no readable safetensors file ({error}): {_AGAIN}.") from error
    entries.pop("__metadata__", None)
    return [
        TensorHeader(
            file=Path(file).name,
            key=key,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for key, entry in entries.items()
    ]
