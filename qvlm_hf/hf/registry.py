"""Enters the package's classes into Transformers' tables, any number of times."""

from collections.abc import Callable
from typing import Any, TypeVar

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

__all__ = ["QUANT_METHOD", "config_class", "quantizer_class"]

QUANT_METHOD = "qvlm"
T = TypeVar("T", bound=type)


def config_class(cls: T) -> T:
    """Registers `cls` as the configuration of "qvlm"; a reloaded one replaces the former."""
    return _enter(cls, AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config)


def quantizer_class(cls: T) -> T:
    """Registers `cls` as the quantizer of "qvlm"; a reloaded one replaces the former."""
    return _enter(cls, AUTO_QUANTIZER_MAPPING, register_quantizer)


def _enter(cls: T, table: dict[str, Any], register: Callable[[str], Callable[[T], T]]) -> T:
    # register() raises on a name it knows, which a reload of the module would run into.
    table.pop(QUANT_METHOD, None)
    return register(QUANT_METHOD)(cls)
