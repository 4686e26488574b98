"""Values of calibration as JSON and named tensors, and back.

Plain values, tensors and dataclasses of this package, in any depth of tuples, lists and dicts.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["decode", "encode"]

_OURS = "qvlm_hf."  # modules whose dataclasses a file may name


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
        kind = type(value)
        return {
            "fields": {
                each.name: entry(getattr(value, each.name)) for each in dataclasses.fields(value)
            },
            "class": [kind.__module__, kind.__name__],
        }

    return entry(value), tensors


def decode(entry: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given.

    Raises:
        KeyError, TypeError, AttributeError: the entry is damaged, or names what is no dataclass of
            this package.
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
    module, name = entry["class"]
    kind: Any = getattr(sys.modules[module], name)
    if not (module.startswith(_OURS) and hasattr(kind, "__dataclass_fields__")):
        raise TypeError(f"{name} is no dataclass of this package")
    fields = {field: decode(item, tensors) for field, item in entry["fields"].items()}
    return kind(**fields)
