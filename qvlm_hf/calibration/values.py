"""Values that a user gives, as plain ones, and how messages show them."""

import math
import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from enum import Enum
from itertools import islice
from numbers import Integral, Real
from typing import Any

__all__ = ["shown", "to_plain", "whole_number"]

_MAX_ENTRIES = 100_000  # of a list; a model of 70 B parameters has about 600 linear modules
_MAX_DEPTH = 50  # of lists and mappings in each other


def to_plain(name: str, value: object, *, depth: int = 0) -> Any:
    """A value as JSON knows it: None, bool, int, float, str, a tuple of these or a dict by str.

    Scalars and arrays of NumPy and PyTorch, enums, paths, fractions and decimals become what they
    stand for. Sets are sorted, because their order differs between two runs. Iterators are read.

    Args:
        name: of the field, for messages.
        value: anything.
        depth: how many lists and mappings it lies in.

    Raises:
        ValueError: it is, or holds, something else, or itself.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"{name} is nested more than {_MAX_DEPTH} deep, or holds itself: give plain values."
        )
    if isinstance(value, Enum):
        return to_plain(name, value.value, depth=depth + 1)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        return _as_float(value)
    if callable(getattr(value, "tolist", None)):  # tensors and arrays, those of one value too
        return to_plain(name, _as_list(name, value), depth=depth + 1)
    if isinstance(value, os.PathLike):
        return to_plain(name, os.fspath(value), depth=depth + 1)
    if isinstance(value, Mapping):
        pairs = value.items()
        return {
            str(to_plain(name, key, depth=depth + 1)): to_plain(name, item, depth=depth + 1)
            for key, item in pairs
        }
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return _as_tuple(name, value, depth + 1)
    raise ValueError(
        f"{name}={shown(value)} is {type(value).__name__}, must be what JSON can hold: a number, "
        f"text, list or mapping."
    )


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a fraction of whole numbers that no float holds
        return math.inf


def _as_list(name: str, value: Any) -> Any:
    try:
        return value.tolist()
    except Exception as error:  # a tensor on "meta", for one
        raise ValueError(f"{name}={shown(value)} cannot be read: give numbers.") from error


def _as_tuple(name: str, values: Iterable[object], depth: int) -> tuple[Any, ...]:
    plain = tuple(to_plain(name, value, depth=depth) for value in islice(values, _MAX_ENTRIES + 1))
    if len(plain) > _MAX_ENTRIES:
        raise ValueError(f"{name} has more than {_MAX_ENTRIES} entries: give fewer.")
    if not isinstance(values, set | frozenset):  # a view of a dict has an order
        return plain
    try:
        return tuple(sorted(plain))
    except TypeError as error:
        raise ValueError(f"{name}={shown(values)} cannot be sorted: give a list.") from error


def shown(value: object) -> str:
    """A value for a message: on one line, cut; its class where it cannot be written."""
    try:
        return " ".join(repr(value).split())[:80]
    except RecursionError:
        return f"a {type(value).__name__} nested too deep"
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a {type(value).__name__} too long to be written"


def whole_number(name: str, value: object, least: int, remedy: str = "") -> int:
    """An integer of Python, NumPy or PyTorch as a plain one.

    Raises:
        ValueError: it is no integer (True and 2.0 are none), or too small.
    """
    plain = to_plain(name, value)
    if not isinstance(plain, int) or isinstance(plain, bool) or plain < least:
        raise ValueError(
            f"{name}={shown(value)} must be a whole number of at least {least}{remedy}."
        )
    return plain
