"""Rows -> samples: the layouts that are read, recognised by their keys (`_FORMATS`)."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qvlm_hf.calibration.samples.sample import Message, Sample
from qvlm_hf.calibration.samples.sources import Row

__all__ = ["convert_rows"]

_SCIENCEQA_REQUEST = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's own words
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


@dataclass(frozen=True, kw_only=True)
class _Format:
    """One accepted layout, recognised by the key `marker`; `convert` returns the messages and the key of each picture."""

    marker: str
    required: frozenset[str]
    optional: frozenset[str]
    convert: Callable[[Mapping[str, Any], Row], tuple[list[Message], list[str]]]


def convert_rows(rows: Sequence[Row]) -> list[Sample]:
    """Checks every row and makes it a sample.

    Args:
        rows: at least one, all of one layout.

    Raises:
        ValueError: a row has no known layout or another one than the first, or a key is missing, unknown or wrong.
    """
    samples, first = [], _recognise(rows[0])
    for row in rows:
        found = _recognise(row)
        if found is not first:
            here, there = _marker(found), _marker(first)
            raise ValueError(f"{row.origin}: is {here}, but {rows[0].origin} is {there}; keep one format per source")
        samples.append(row.value if found is None else _sample(row, found))
    return samples


def _marker(found: _Format | None) -> str:
    return "a Sample" if found is None else f'in the "{found.marker}" format'


def _recognise(row: Row) -> _Format | None:
    """Finds the format by its keys; None for a ready-made Sample."""
    if isinstance(row.value, Sample):
        return None
    if not isinstance(row.value, Mapping):
        raise ValueError(f"{row.origin}: is {type(row.value).__name__}; give an object with keys, such as image, question and answer")
    for candidate in _FORMATS:
        if candidate.marker in row.value:
            return candidate
    keys, known = (
        ", ".join(map(str, row.value)) or "none",
        '"messages", or "image" and "conversations", or "image", "question" and "answer"',
    )
    raise ValueError(f"{row.origin}: no known format (keys: {keys}); give {known}")


def _sample(row: Row, layout: _Format) -> Sample:
    _check_keys(row.value, layout.required, layout.optional | {"kind", "id"}, row)
    record = _present(row.value)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise row.error("kind", f"is {type(kind).__name__}; give text")
    messages, image_keys = layout.convert(record, row)
    if layout.marker == "choices":
        kind = kind or record.get("subject")
    return Sample(messages=tuple(messages), origin=row.origin, kind=kind, image_keys=tuple(image_keys))


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drops keys without a value: Arrow tables fill the keys that only other rows have with None."""
    return {key: value for key, value in record.items() if value is not None}


def _check_keys(record: Mapping[str, Any], required: Iterable[str], optional: Iterable[str], row: Row, parent: str = "") -> None:
    required, allowed = set(required), {*required, *optional}
    for key in record:
        if key not in allowed and record[key] is not None:
            raise row.error(f"{parent}{key}", f"is unknown here; known are {', '.join(sorted(allowed))}: rename or remove it")
    for key in sorted(required):
        if key not in record:
            hint = " (null for a question without a picture)" if key == "image" else ""
            raise row.error(f"{parent}{key}", f"is missing; add it{hint}")


def _text(value: object, key: str, row: Row) -> str:
    if not isinstance(value, str):
        raise row.error(key, f"is {type(value).__name__}; give text")
    if not value.strip():
        raise row.error(key, "is empty; give text or remove the sample")
    return value


def _image(value: object, key: str, row: Row) -> Path | Image.Image:
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise row.error(key, f"is {type(value).__name__}; give a path or a PIL image")
    if _URL.match(str(value)):
        raise row.error(key, f'is a URL ("{str(value)[:80]}"); pictures are read from disk only: download it and give its path')
    return row.folder / value


def _turn(role: str, *parts: str | Path | Image.Image) -> Message:
    """Builds a message: text becomes a text part, anything else a picture."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    return {"role": role, "content": content}


def _from_chat(record: Mapping[str, Any], row: Row) -> tuple[list[Message], list[str]]:
    """{"messages": [{"role", "content": text or [{"type": "image", "path" or "image"}, {"type": "text", "text"}]}]}."""
    messages: list[Message] = []
    image_keys: list[str] = []
    for index, message in enumerate(_list(record.get("messages"), "messages", row)):
        key = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise row.error(key, f'is {type(message).__name__}; give an object with "role" and "content"')
        _check_keys(message, ("role", "content"), (), row, f"{key}.")
        content = message["content"]
        if isinstance(content, str):
            messages.append(_turn(message["role"], _text(content, f"{key}.content", row)))
            continue
        parts = []
        for place, part in enumerate(_list(content, f"{key}.content", row)):
            part_key, value = _part(part, f"{key}.content[{place}]", row)
            parts.append(value)
            image_keys += [] if isinstance(value, str) else [part_key]
        messages.append(_turn(message["role"], *parts))
    return messages, image_keys


def _list(value: object, key: str, row: Row) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        found = "empty" if isinstance(value, (list, tuple)) else type(value).__name__
        raise row.error(key, f"is {found}; give a list with at least one entry")
    return value


def _part(part: object, key: str, row: Row) -> tuple[str, str | Path | Image.Image]:
    """Reads one entry of a content list; returns its key and its text or picture."""
    if not isinstance(part, Mapping):
        raise row.error(key, f"is {type(part).__name__}; give an object with a type")
    kind, fields = part.get("type"), _present(part)
    if kind not in ("text", "image"):
        raise row.error(f"{key}.type", f'is {kind!r}; give {{"type": "text", "text": ...}} or {{"type": "image", "path": ...}}')
    if kind == "text":
        _check_keys(fields, ("text",), ("type",), row, f"{key}.")
        return f"{key}.text", _text(fields["text"], f"{key}.text", row)
    if "url" in fields:
        raise row.error(f"{key}.url", 'is a URL; pictures are read from disk only: download it and give its "path"')
    name = "path" if "path" in fields else "image"
    _check_keys(fields, (name,), ("type",), row, f"{key}.")
    return f"{key}.{name}", _image(fields[name], f"{key}.{name}", row)


def _from_llava(record: Mapping[str, Any], row: Row) -> tuple[list[Message], list[str]]:
    """{"image", "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value"}]}; a picture per placeholder."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    given = record.get("image", [])
    several = isinstance(given, (list, tuple))
    image_keys = [f"image[{index}]" for index in range(len(given))] if several else ["image"]
    images = [_image(value, key, row) for key, value in zip(image_keys, given if several else [given], strict=True)]
    messages, remaining = [], list(images)
    turns = _list(record.get("conversations"), "conversations", row)
    for index, turn in enumerate(turns):
        key = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise row.error(key, f'is {type(turn).__name__}; give an object with "from" and "value"')
        _check_keys(turn, ("from", "value"), (), row, f"{key}.")
        if turn["from"] not in roles:
            raise row.error(f"{key}.from", f"is {turn['from']!r}; give human, gpt or system")
        first, *others = _text(turn["value"], f"{key}.value", row).split("<image>")
        parts: list[str | Path | Image.Image] = [first.strip()]
        for text in others:
            parts += [*remaining[:1], text.strip()]
            del remaining[:1]
        messages.append(_turn(roles[turn["from"]], *(part for part in parts if part != "")))
    placeholders = sum(turn["value"].count("<image>") for turn in turns)
    if placeholders != len(images):
        raise row.error("conversations", f"has {placeholders} <image> placeholders for {len(images)} pictures; write <image> once for each")
    return messages, image_keys


def _from_question(record: Mapping[str, Any], row: Row) -> tuple[list[Message], list[str]]:
    """{"image", "question", "answer"}; image may be null, the answer may be absent."""
    pictures = [_image(record["image"], "image", row)] if "image" in record else []
    messages = [_turn("user", *pictures, _text(record.get("question"), "question", row))]
    if "answer" in record:
        messages.append(_turn("assistant", _text(record["answer"], "answer", row)))
    return messages, ["image"] * len(pictures)


def _from_scienceqa(record: Mapping[str, Any], row: Row) -> tuple[list[Message], list[str]]:
    """A ScienceQA problem as LLaVA-1.5 is asked it (its "CQM" prompt, answered by a letter); lecture and solution are not shown."""
    choices = [_text(choice, f"choices[{index}]", row) for index, choice in enumerate(_list(record.get("choices"), "choices", row))]
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    context = str(record.get("hint", "")).strip() or "N/A"
    question = _text(record.get("question"), "question", row)
    prompt = f"Context: {context}\nQuestion: {question}\nOptions: {options}\n{_SCIENCEQA_REQUEST}"
    pictures = [_image(record["image"], "image", row)] if "image" in record else []
    messages = [_turn("user", *pictures, prompt)]
    if "answer" in record:
        answer = record["answer"]
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(_LETTERS)):
            raise row.error("answer", f"is {answer!r}; give the index of one of the {len(choices)} choices, counted from 0")
        messages.append(_turn("assistant", _LETTERS[answer]))
    return messages, ["image"] * len(pictures)


_SCIENCEQA_OTHERS = (
    "answer",
    "hint",
    "image",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
    "split",
    "caption",
)
_FORMATS = (
    _Format(marker="messages", required=frozenset({"messages"}), optional=frozenset(), convert=_from_chat),
    # "model" stands in LLaVA's own training file.
    _Format(marker="conversations", required=frozenset({"conversations"}), optional=frozenset({"image", "model"}), convert=_from_llava),
    _Format(marker="choices", required=frozenset({"question", "choices"}), optional=frozenset(_SCIENCEQA_OTHERS), convert=_from_scienceqa),
    _Format(marker="question", required=frozenset({"image", "question"}), optional=frozenset({"answer"}), convert=_from_question),
)
