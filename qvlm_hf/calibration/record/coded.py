"""Values of calibration as JSON and named tensors, and back.

Plain values, tensors and dataclasses marked `codable`, in any depth of tuples, lists and dicts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from qvlm_hf.calibration.record.report import BlockReport, PrecisionRaise, RecipeTrial, VisionReport
from qvlm_hf.calibration.settings import Precision, RangeCandidate
from qvlm_hf.format.grids import QParams, QuantizedWeight
from qvlm_hf.format.scheme import QuantScheme

__all__ = ["codable", "decode", "encode"]

_Class = TypeVar("_Class", bound=type)

_KINDS: dict[str, type] = {}


def codable(kind: _Class) -> _Class:
    """Marks a dataclass that files may hold."""
    _KINDS[kind.__name__] = kind
    return kind


for _kind in (
    BlockReport,
    Precision,
    PrecisionRaise,
    QParams,
    QuantScheme,
    QuantizedWeight,
    RangeCandidate,
    RecipeTrial,
    VisionReport,
):
    codable(_kind)


def encode(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """`value` for JSON, and its tensors by the names that stand there."""
    tensors: dict[str, Tensor] = {}

    def entry(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return [entry(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": entry(list(value))}
        if isinstance(value, Mapping):
            return {"dict": [entry(list(pair)) for pair in value.items()]}
        if isinstance(value, Tensor):
            name = str(len(tensors))
            # a copy: safetensors saves no shared memory
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name, "device": str(value.device)}
        kind = type(value).__name__
        names = [field.name for field in dataclasses.fields(_KINDS[kind])]
        return {"class": kind, "fields": {name: entry(getattr(value, name)) for name in names}}

    return entry(value), tensors


def decode(entry: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given.

    Raises:
        KeyError, TypeError, AttributeError: the entry is damaged, or names a class that is not
            `codable`.
    """
    if isinstance(entry, list):
        return [decode(item, tensors) for item in entry]
    if not isinstance(entry, dict):
        return entry
    if "tuple" in entry:
        return tuple(decode(entry["tuple"], tensors))
    if "dict" in entry:
        return dict(decode(pair, tensors) for pair in entry["dict"])
    if "tensor" in entry:
        return tensors[entry["tensor"]].to(entry["device"])
    fields = {name: decode(item, tensors) for name, item in entry["fields"].items()}
    return _KINDS[entry["class"]](**fields)
