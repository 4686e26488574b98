"""JSON and JSON-lines files -> values with the line that each starts on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qvlm_hf.calibration.samples.errors import place, sample_error
from qvlm_hf.errors import first_line

__all__ = ["read_entries", "read_object"]


def read_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a .jsonl file or of the list in a .json file, each with its line.

    Raises:
        ValueError: the file cannot be read, or does not hold that.
    """
    text = _read_text(path)
    return (_lines if path.suffix == ".jsonl" else _list)(text, path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ScienceQA.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    text = _read_text(path)
    try:
        table = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _json_error(f"{path}{line}", error, "fetch it anew") from error
    if not isinstance(table, dict):
        problem = f"holds {type(table).__name__}"
        raise sample_error(place(str(path)), problem, "ScienceQA has an object there")
    return table


def _read_text(path: Path) -> str:
    where, remedy = place(str(path)), "save it as UTF-8"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise sample_error(where, f"is not UTF-8 text (byte {error.start})", remedy) from error
    if (found := text.find("\0")) >= 0:  # UTF-16 without its mark reads as UTF-8 full of them
        raise sample_error(where, f"is not UTF-8 text (a NUL at character {found})", remedy)
    return text


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # str.splitlines() would also split at characters that JSON allows inside strings.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                yield line, _DECODER.decode(content)
            except (ValueError, RecursionError) as error:
                where = f"{path.name}:{line}"
                raise _json_error(where, error, "put one object on each line") from error


def _list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Decodes a list entry by entry, so that every entry has the line it starts on."""
    line, counted = 1, 0
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        remedy = 'write "[sample, sample, ...]", or pass the folder if this is ScienceQA'
        raise sample_error(place(path.name), "holds no list", remedy)
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _DECODER.raw_decode(text, position)
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        except (ValueError, RecursionError) as error:
            where = f"{path.name}:{getattr(error, 'lineno', line)}"
            raise _json_error(where, error, "mend the file") from error
        yield line, value
    if (end := _skip_space(text, position + 1)) < len(text):
        where = place(f"{path.name}:{1 + text.count(chr(10), 0, end)}")
        raise sample_error(
            where, "more follows after the list's end", "put all samples into one list"
        )


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that stands there twice Python would take the last value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f'key "{key}" stands twice in one object')
        found[key] = value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _json_error(where: str, error: ValueError | RecursionError, remedy: str) -> ValueError:
    if isinstance(error, json.JSONDecodeError):
        problem = f"not valid JSON at column {error.colno} ({error.msg})"
        return sample_error(place(where), problem, remedy)
    reason = "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)
    return sample_error(place(where), f"cannot be used as JSON ({reason})", "mend the file")
