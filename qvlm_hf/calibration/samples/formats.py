"""Rows -> samples: the layouts that are read, one row each in the table `_FORMATS` at the end."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image

from qvlm_hf.calibration.samples.keys import (
    CHATS,
    PLACES,
    check_chat,
    check_keys,
    check_rivals,
    close_matches,
    words,
)
from qvlm_hf.calibration.samples.sample import Message, Sample
from qvlm_hf.calibration.samples.scienceqa import published_columns
from qvlm_hf.calibration.samples.sources import Row, is_empty
from qvlm_hf.calibration.values import shown

__all__ = ["convert_rows"]

_SHOWN_KEYS = 8  # of those that a note names
_INDEX = re.compile(r"\[\d+\]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_FROM_DISK = "pictures are read from disk only: download it and give its"
_Chat = tuple[list[Message], list[str]]  # messages, and the key of each picture


@dataclass(frozen=True, kw_only=True)
class _Format:
    """One accepted layout, recognised by the key `marker`.

    `required` and `optional` are its content keys, `known` the others that data sets of this layout
    have.
    """

    marker: str
    required: Set[str]
    optional: Set[str] = frozenset()
    known: Set[str] = frozenset()
    convert: Callable[[Mapping[str, Any], Row], _Chat]


def convert_rows(rows: Sequence[Row], source: str) -> list[Sample]:
    """Checks every row and makes it a sample; logs one line about the keys that were ignored.

    Raises:
        ValueError: a row has no known layout or another one than the first, or a content key is
            missing, misspelt or wrong.
    """
    samples, first = [], _recognise(rows[0])
    for row in rows:
        if (found := _recognise(row)) is not first:
            here, there = (
                "a Sample" if layout is None else f'in the "{layout.marker}" format'
                for layout in (found, first)
            )
            problem = f"is {here}, but {rows[0].origin} is {there}"
            raise row.error("", problem, "keep one format per source")
        samples.append(row.value if found is None else _sample(row, found))
    ignored = sorted({_INDEX.sub("[]", key) for row in rows for key in row.ignored})
    if ignored:
        more = f" and {len(ignored) - _SHOWN_KEYS} more" if len(ignored) > _SHOWN_KEYS else ""
        names = ", ".join(ignored[:_SHOWN_KEYS])
        logging.getLogger(__name__).warning(
            "%s: ignored the keys %s%s: they are not needed", source, names, more
        )
    return samples


def _recognise(row: Row) -> _Format | None:
    """Finds the format by its keys, filled keys first; None for a ready-made Sample."""
    if isinstance(row.value, Sample):
        return None
    _object(row.value, "", row, "keys, such as image, question and answer")
    filled = {key for key, value in row.value.items() if not is_empty(value)}
    for present in (filled, row.value.keys()):  # tables fill keys of other rows with null
        for layout in _FORMATS:
            if layout.marker in present:
                return layout
    keys = ", ".join(map(str, row.value)) or "none"
    known = '"messages", or "image" and "conversations", or "image", "question" and "answer"'
    markers = [layout.marker for layout in _FORMATS]
    close = ""
    for key in row.value:
        if found := close_matches(key, markers):
            close = f' (is "{key}" to be "{found[0]}"?)'
            break
    raise row.error("", f"no known format (keys: {keys})", f"give {known}{close}")


def _sample(row: Row, layout: _Format) -> Sample:
    known = layout.known | {"kind", "id"} | _system_keys(row.value)
    fields = {key: value for key, value in row.value.items() if key not in known}
    check_keys(fields, layout.required, layout.optional, row)
    check_rivals(fields, layout.marker, row)
    record = _present(row.value)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise row.error("kind", f"is {type(kind).__name__}", "give text")
    messages, pictures = layout.convert(record, row)
    for key in sorted(_system_keys(record)):
        if messages[0]["role"] == "system":
            raise row.error(key, "stands beside another system prompt", "keep one of them")
        messages.insert(0, _turn("system", _text(record[key], key, row)))
    if layout.marker in CHATS:
        check_chat(fields, layout.required | layout.optional, messages, pictures, row)
    columns: tuple[str, ...] = ()
    if layout.marker == "choices":
        kind, columns = kind or record.get("subject"), published_columns(record)
    return Sample(
        messages=tuple(messages), origin=row.origin, kind=kind, columns=columns,
        image_keys=tuple(pictures),
    )  # fmt: skip


def _system_keys(record: Mapping[str, Any]) -> set[str]:
    """Keys beside the chat whose text is a system prompt: it becomes the first turn."""
    found = {key: record.get(key) for key in ("system", "system_prompt")}
    return {key for key, text in found.items() if isinstance(text, str) and text.strip()}


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drops keys without a value: Arrow tables fill the keys of other rows with None."""
    return {key: value for key, value in record.items() if value is not None}


# ---- values --------------------------------------------------------------------------------------


def _object(value: object, key: str, row: Row, fields: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        remedy = f"give an object with {fields}"
        raise row.error(key, f"is {type(value).__name__}", remedy)
    return value


def _list(value: object, key: str, row: Row) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        found = "empty" if isinstance(value, (list, tuple)) else type(value).__name__
        raise row.error(key, f"is {found}", "give a list with at least one entry")
    return value


def _text(value: object, key: str, row: Row) -> str:
    if not isinstance(value, str):
        raise row.error(key, f"is {type(value).__name__}", "give text")
    if not value.strip():
        raise row.error(key, "is empty", "give text or remove the sample")
    if any("\ud800" <= character <= "\udfff" for character in value):
        problem = "holds half of a surrogate pair, which is no character"
        raise row.error(key, problem, "mend the text")
    return value


def _image(value: object, key: str, row: Row) -> Path | Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str) and not value:
        raise row.error(key, "is empty", "give a path, or null for a question without a picture")
    if not isinstance(value, (str, os.PathLike)):
        remedy = "give a path or a PIL image"
        if hasattr(value, "shape"):
            remedy += "; of an array of 8-bit values make one with PIL.Image.fromarray"
        raise row.error(key, f"is {type(value).__name__}", remedy)
    if _URL.match(str(value)):
        raise row.error(key, f'is a URL ("{str(value)[:80]}")', f"{_FROM_DISK} path")
    return row.folder / os.path.expanduser(value)


def _turn(role: str, *parts: str | Path | Image.Image) -> Message:
    """Builds a message: text becomes a text part, anything else a picture."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": role, "content": content}


# ---- layouts -------------------------------------------------------------------------------------


def _from_messages(record: Mapping[str, Any], row: Row) -> _Chat:
    """{"messages": [{"role", "content": text or a list of parts}]}, see `_part`."""
    messages: list[Message] = []
    pictures: list[str] = []
    for index, message in enumerate(_list(record.get("messages"), "messages", row)):
        key = f"messages[{index}]"
        _object(message, key, row, '"role" and "content"')
        check_keys(message, ("role", "content"), (), row, f"{key}.", misplaced=("image",))
        content = message["content"]
        if isinstance(content, str):
            messages.append(_turn(message["role"], _text(content, f"{key}.content", row)))
            continue
        parts = []
        for position, part in enumerate(_list(content, f"{key}.content", row)):
            part_key, value = _part(part, f"{key}.content[{position}]", row)
            parts.append(value)
            pictures += [] if isinstance(value, str) else [part_key]
        messages.append(_turn(message["role"], *parts))
    return messages, pictures


def _part(part: object, key: str, row: Row) -> tuple[str, str | Path | Image.Image]:
    """{"type": "image", "path" or "image"} or {"type": "text", "text"} -> its key and value."""
    fields = _present(_object(part, key, row, "a type"))
    kind = fields.get("type")
    if kind not in ("text", "image"):
        remedy = 'give {"type": "text", "text": ...} or {"type": "image", "path": ...}'
        raise row.error(f"{key}.type", f"is {shown(kind)}", remedy)
    if kind == "text":
        check_keys(fields, ("text",), ("type",), row, f"{key}.", misplaced=("image", "path"))
        return f"{key}.text", _text(fields["text"], f"{key}.text", row)
    if "url" in fields and not fields.keys() & {"path", "image"}:
        raise row.error(f"{key}.url", "is a URL", f'{_FROM_DISK} "path"')
    name = "image" if is_empty(fields.get("path")) else "path"
    if name == "path" and not is_empty(fields.get("image")):
        raise row.error(f"{key}.image", "has no place here", f"{PLACES['path']}, or remove it")
    check_keys(fields, (name,), ("type",), row, f"{key}.", misplaced=("text",))
    return f"{key}.{name}", _image(fields[name], f"{key}.{name}", row)


def _from_conversations(record: Mapping[str, Any], row: Row) -> _Chat:
    """LLaVA: {"image", "conversations": [{"from": "human", "value": "<image>..."}, ...]}."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    given = record.get("image", [])
    several = isinstance(given, (list, tuple))
    keys = [f"image[{index}]" for index in range(len(given))] if several else ["image"]
    values = given if several else [given]
    images = [_image(value, key, row) for key, value in zip(keys, values, strict=True)]
    messages, remaining, placeholders = [], list(images), 0
    for index, turn in enumerate(_list(record.get("conversations"), "conversations", row)):
        key = f"conversations[{index}]"
        _object(turn, key, row, '"from" and "value"')
        check_keys(turn, ("from", "value"), (), row, f"{key}.", misplaced=("image",))
        if not isinstance(turn["from"], str) or turn["from"] not in roles:
            problem = f"is {shown(turn['from'])}"
            raise row.error(f"{key}.from", problem, "give human, gpt or system")
        first, *others = _text(turn["value"], f"{key}.value", row).split("<image>")
        placeholders += len(others)
        parts: list[str | Path | Image.Image] = [first.strip()]
        for text in others:
            parts += [*remaining[:1], text.strip()]
            del remaining[:1]
        messages.append(_turn(roles[turn["from"]], *(part for part in parts if part != "")))
    if placeholders != len(images):
        problem = f"has {placeholders} <image> placeholders for {len(images)} pictures"
        raise row.error("conversations", problem, "write <image> once for each")
    return messages, keys


def _from_question(record: Mapping[str, Any], row: Row) -> _Chat:
    """{"image", "question", "answer"}; image may be null, the answer may be absent."""
    question = _text(record.get("question"), "question", row)
    answer = _text(record["answer"], "answer", row) if "answer" in record else None
    return _asked(record, row, question, answer)


def _from_scienceqa(record: Mapping[str, Any], row: Row) -> _Chat:
    """A ScienceQA problem in LLaVA-1.5's "CQM" prompt; lecture and solution are not shown."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    choices = [
        _text(choice, f"choices[{index}]", row)
        for index, choice in enumerate(_list(record.get("choices"), "choices", row))
    ]
    options = " ".join(f"({letter}) {text}" for letter, text in zip(letters, choices, strict=False))
    context = str(record.get("hint", "")).strip() or "N/A"
    question = _text(record.get("question"), "question", row)
    prompt = (
        f"Context: {context}\nQuestion: {question}\nOptions: {options}\n"
        f"Answer with the option's letter from the given choices directly."
    )
    answer = None
    if "answer" in record:
        index = record["answer"]
        whole = isinstance(index, Integral) and not isinstance(index, bool)
        if not whole or not 0 <= int(index) < min(len(choices), len(letters)):
            remedy = f"give the index of one of the {len(choices)} choices, counted from 0"
            raise row.error("answer", f"is {shown(index)}", remedy)
        answer = letters[int(index)]
    return _asked(record, row, prompt, answer)


def _asked(record: Mapping[str, Any], row: Row, question: str, answer: str | None) -> _Chat:
    pictures = [_image(record["image"], "image", row)] if "image" in record else []
    messages = [_turn("user", *pictures, question)]
    messages += [] if answer is None else [_turn("assistant", answer)]
    return messages, ["image"] * len(pictures)


_FORMATS = (
    _Format(marker="messages", required=words("messages"), convert=_from_messages),
    _Format(
        marker="conversations",
        required=words("conversations"),
        optional=words("image"),
        known=words("model"),  # stands in LLaVA's own training file
        convert=_from_conversations,
    ),
    _Format(
        marker="choices",
        required=words("question choices"),
        optional=words("answer hint image"),
        known=words("task grade subject topic category skill lecture solution split caption"),
        convert=_from_scienceqa,
    ),
    _Format(
        marker="question",
        required=words("image question"),
        optional=words("answer choices"),
        convert=_from_question,
    ),
)
