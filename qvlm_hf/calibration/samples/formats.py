"""Rows -> samples: the layouts that are read, recognised by their keys (`_FORMATS`).

Keys that name no content (question_id, category) are carried by many data sets: they are ignored,
with one note for the source. A key that looks like a content key which is missing or empty is an
error: content would be lost. Where the content key is filled, another name for the same thing
(`image_url` beside `image`, `answers` beside `answer`) is ignored too.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from PIL import Image

from qvlm_hf.calibration.samples.sample import Message, Sample
from qvlm_hf.calibration.samples.sources import Row, is_empty
from qvlm_hf.calibration.values import shown

__all__ = ["convert_rows"]

_SCIENCEQA_REQUEST = (
    "Answer with the option's letter from the given choices directly."  # LLaVA-1.5's own words
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SHOWN_KEYS = 8  # of those that a note names
_INDEX = re.compile(r"\[\d+\]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PICTURE_FILE = re.compile(r".+\.(png|jpe?g|webp|bmp|gif|tiff?)", re.IGNORECASE)
_CHATS = ("messages", "conversations")
# Content key -> words that other data sets call it by, and words that stand beside these
# (`image_path`, `gt_answer`); a plural is the same.
_OTHER_NAMES = {
    "choices": ({"choices", "options"}, {"answer", "text", "list"}),
    "image": (
        {"image", "img", "picture", "pic", "photo"},
        {"path", "file", "filename", "name", "url", "uri", "src", "data", "byte", "base", "list"},
    ),
    "answer": (
        {
            "answer",
            "response",
            "reply",
            "output",
            "completion",
            "label",
            "choice",
            "target",
            "truth",
            "caption",
        },
        {
            "text",
            "gt",
            "ground",
            "gold",
            "correct",
            "expected",
            "reference",
            "model",
            "assistant",
            "final",
            "multiple",
            "list",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Format:
    """One accepted layout, recognised by the key `marker`; `convert` returns the messages and the key of each picture.

    `required` and `optional` are its content keys, `known` the others that data sets of this layout
    have.
    """

    marker: str
    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    convert: Callable[[Mapping[str, Any], Row], tuple[list[Message], list[str]]]


def convert_rows(rows: Sequence[Row], source: str) -> list[Sample]:
    """Checks every row and makes it a sample; logs one line about the keys that were ignored, if any were.

    Args:
        rows: at least one, all of one layout.
        source: how messages call the data set.

    Raises:
        ValueError: a row has no known layout or another one than the first, or a content key is
            missing, misspelt or wrong.
    """
    samples, first = [], _recognise(rows[0])
    for row in rows:
        found = _recognise(row)
        if found is not first:
            here, there = _marker(found), _marker(first)
            raise ValueError(
                f"{row.origin}: is {here}, but {rows[0].origin} is {there}; keep one format per "
                f"source"
            )
        samples.append(row.value if found is None else _sample(row, found))
    ignored = sorted({_INDEX.sub("[]", key) for row in rows for key in row.ignored})
    if ignored:
        more = f" and {len(ignored) - _SHOWN_KEYS} more" if len(ignored) > _SHOWN_KEYS else ""
        names = ", ".join(ignored[:_SHOWN_KEYS])
        logging.getLogger(__name__).warning(
            "%s: ignored the keys %s%s: they are not needed", source, names, more
        )
    return samples


def _marker(found: _Format | None) -> str:
    return "a Sample" if found is None else f'in the "{found.marker}" format'


def _recognise(row: Row) -> _Format | None:
    """Finds the format by its keys, filled ones first (tables fill others with null); None for a ready-made Sample."""
    if isinstance(row.value, Sample):
        return None
    if not isinstance(row.value, Mapping):
        raise ValueError(
            f"{row.origin}: is {type(row.value).__name__}; give an object with keys, such as "
            f"image, question and answer"
        )
    for present in (
        {key for key, value in row.value.items() if not is_empty(value)},
        row.value.keys(),
    ):
        for candidate in _FORMATS:
            if candidate.marker in present:
                return candidate
    keys = ", ".join(map(str, row.value)) or "none"
    known = '"messages", or "image" and "conversations", or "image", "question" and "answer"'
    markers = [layout.marker for layout in _FORMATS]
    close = next(
        (
            f' (is "{key}" to be "{found[0]}"?)'
            for key in row.value
            if (found := _close(key, markers))
        ),
        "",
    )
    raise ValueError(f"{row.origin}: no known format (keys: {keys}); give {known}{close}")


def _close(key: object, wanted: Iterable[str], likeness: float = 0.8) -> list[str]:
    """Those of `wanted` that `key` may be a misspelling of, the likeliest first."""
    return get_close_matches(str(key).strip().lower(), sorted(wanted), cutoff=likeness)


def _content_key(key: object, value: object, wanted: Iterable[str]) -> str | None:
    """Which of the content keys `wanted` this one stands for, by its name or, if it holds a picture, by its value."""
    if isinstance(value, Real):  # counts, sizes and flags; the number of a choice is an answer
        wanted = {"answer"}.intersection(wanted)
    if not str(key).lower().endswith(("id", "ids")):
        for name, (own, beside) in _OTHER_NAMES.items():
            if name in wanted and _is_made_of(key, own | beside) and not _is_made_of(key, beside):
                return name
        if close := _close(key, wanted):
            return close[0]
    return "image" if "image" in wanted and _is_picture(value) else None


def _is_made_of(key: object, words: Set[str]) -> bool:
    """Whether a key has only these words, in the singular or plural; of a key without any: True."""
    return all({word.lower(), word.lower().rstrip("s")} & words for word in _WORD.findall(str(key)))


def _is_picture(value: object) -> bool:
    """Whether it is a picture, the name of a picture file, or a list of these."""
    if isinstance(value, (list, tuple)) and value:
        return all(
            isinstance(item, (str, Path, Image.Image)) and _is_picture(item) for item in value
        )
    return isinstance(value, Image.Image) or (
        isinstance(value, (str, Path)) and bool(_PICTURE_FILE.fullmatch(str(value)))
    )


def _sample(row: Row, layout: _Format) -> Sample:
    known = layout.known | {"kind", "id"}
    fields = {key: value for key, value in row.value.items() if key not in known}
    _check_keys(fields, layout.required, layout.optional, row)
    _check_single(fields, layout, row)
    record = _present(row.value)
    kind = record.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise row.error("kind", f"is {type(kind).__name__}; give text")
    messages, image_keys = layout.convert(record, row)
    if layout.marker in _CHATS:
        _check_shown(fields, layout, messages, image_keys, row)
    if layout.marker == "choices":
        kind = kind or record.get("subject")
    return Sample(
        messages=tuple(messages), origin=row.origin, kind=kind, image_keys=tuple(image_keys)
    )


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Drops keys without a value: Arrow tables fill the keys that only other rows have with None."""
    return {key: value for key, value in record.items() if value is not None}


def _check_keys(
    record: Mapping[str, Any],
    required: Iterable[str],
    optional: Iterable[str],
    row: Row,
    parent: str = "",
    *,
    no_place: Iterable[str] = (),
) -> None:
    """Checks the keys of one object, and notes in `row.ignored` those that name no content.

    Args:
        record: the object.
        required: content keys that must be there.
        optional: other keys that are read.
        row: that it is part of.
        parent: what stands before its keys in messages.
        no_place: content keys of other objects: what stands under them, or under a misspelling,
            would be lost here.
    """
    required, optional = set(required), set(optional)
    empty = {key for key in required | optional if is_empty(record.get(key))}
    others = [
        key
        for key, value in record.items()
        if key not in required | optional and not is_empty(value)
    ]
    for key in sorted(required - record.keys()):
        hint = " (null for a question without a picture)" if key == "image" else ""
        near = (
            other
            for other in others
            if _close(other, [key], 0.6) or _content_key(other, record[other], [key])
        )
        like = next((f'; is "{other}" to be it?' for other in near), "")
        raise row.error(f"{parent}{key}", f"is missing; add it{hint}{like}")
    for key in others:
        if name := _content_key(key, record[key], no_place):
            raise row.error(f"{parent}{key}", f"has no place here; {_PLACES[name]}, or remove it")
        if name := _content_key(key, record[key], empty):
            state = "empty" if name in record else "missing"
            raise row.error(
                f"{parent}{key}", f'is unknown here, and "{name}" is {state}; rename or remove it'
            )
        row.ignored.append(f"{parent}{key}")


def _check_single(record: Mapping[str, Any], layout: _Format, row: Row) -> None:
    """Refuses a second chat, and pictures beside the only one that the layout reads."""
    for key, value in record.items():
        several = isinstance(value, (list, tuple)) and bool(value)
        if key != layout.marker and several and _close(key, set(_CHATS) - {layout.marker}):
            raise row.error(key, f'holds a chat beside "{layout.marker}"; keep one of them')
        image = record.get("image")
        if (
            layout.marker in _CHATS
            or key == "image"
            or is_empty(image)
            or is_empty(value)
            or isinstance(value, Real)
        ):
            continue
        if (
            _is_made_of(key, _OTHER_NAMES["image"][0])
            and _WORD.search(str(key))
            and not _is_same(value, image)
        ):
            raise row.error(
                key,
                'holds more pictures than "image", which alone is shown; give a chat, "messages", '
                "or remove it",
            )


def _is_same(value: object, image: object) -> bool:
    """Whether a value is a picture, or a list of it alone."""
    (value, *more) = value if isinstance(value, (list, tuple)) else [value]
    return (
        not more
        and type(value) is type(image)
        and isinstance(value, (str, Path, Image.Image))
        and value == image
    )


def _check_shown(
    record: Mapping[str, Any],
    layout: _Format,
    messages: Sequence[Message],
    image_keys: Sequence[str],
    row: Row,
) -> None:
    """Refuses what looks like a picture or an answer beside a chat that has none."""
    wanted = ({"image"} if not image_keys else set()) | (
        {"answer"} if messages[-1]["role"] != "assistant" else set()
    )
    for key in record.keys() - layout.required - layout.optional:
        if not is_empty(record[key]) and (name := _content_key(key, record[key], wanted)):
            raise row.error(key, f"holds what no message shows; {_PLACES[name]}, or remove it")


# Content keys -> where what they hold belongs.
_PLACES = {
    "image": 'write a picture as {"type": "image", "path": ...} into the content',
    "path": 'write a picture as {"type": "image", "path": ...}, and one in each',
    "answer": "write an answer as the last message",
    "text": 'write text as {"type": "text", "text": ...}',
}


def _text(value: object, key: str, row: Row) -> str:
    if not isinstance(value, str):
        raise row.error(key, f"is {type(value).__name__}; give text")
    if not value.strip():
        raise row.error(key, "is empty; give text or remove the sample")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise row.error(key, "holds half of a surrogate pair, which is no character; mend the text")
    return value


def _image(value: object, key: str, row: Row) -> Path | Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str) and not value:
        raise row.error(key, "is empty; give a path, or null for a question without a picture")
    if not isinstance(value, (str, os.PathLike)):
        array = (
            "; of an array of 8-bit values make one with PIL.Image.fromarray"
            if hasattr(value, "shape")
            else ""
        )
        raise row.error(key, f"is {type(value).__name__}; give a path or a PIL image{array}")
    if _URL.match(str(value)):
        raise row.error(
            key,
            f'is a URL ("{str(value)[:80]}"); pictures are read from disk only: download it and '
            f"give its path",
        )
    return row.folder / value


def _turn(role: str, *parts: str | Path | Image.Image) -> Message:
    """Builds a message: text becomes a text part, anything else a picture."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def _from_chat(record: Mapping[str, Any], row: Row) -> tuple[list[Message], list[str]]:
    """{"messages": [{"role", "content": text or [{"type": "image", "path" or "image"}, {"type": "text", "text"}]}]}."""
    messages: list[Message] = []
    image_keys: list[str] = []
    for index, message in enumerate(_list(record.get("messages"), "messages", row)):
        key = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise row.error(
                key, f'is {type(message).__name__}; give an object with "role" and "content"'
            )
        _check_keys(message, ("role", "content"), (), row, f"{key}.", no_place=("image",))
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
        raise row.error(
            f"{key}.type",
            f'is {shown(kind)}; give {{"type": "text", "text": ...}} or {{"type": "image", "path": '
            f"...}}",
        )
    if kind == "text":
        _check_keys(fields, ("text",), ("type",), row, f"{key}.", no_place=("image", "path"))
        return f"{key}.text", _text(fields["text"], f"{key}.text", row)
    if "url" in fields and not fields.keys() & {"path", "image"}:
        raise row.error(
            f"{key}.url",
            'is a URL; pictures are read from disk only: download it and give its "path"',
        )
    name = "image" if is_empty(fields.get("path")) else "path"
    if name == "path" and not is_empty(fields.get("image")):
        raise row.error(f"{key}.image", f"has no place here; {_PLACES['path']}, or remove it")
    _check_keys(fields, (name,), ("type",), row, f"{key}.", no_place=("text",))
    return f"{key}.{name}", _image(fields[name], f"{key}.{name}", row)


def _from_llava(record: Mapping[str, Any], row: Row) -> tuple[list[Message], list[str]]:
    """{"image", "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", "value"}]}; a picture per placeholder."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    given = record.get("image", [])
    several = isinstance(given, (list, tuple))
    image_keys = [f"image[{index}]" for index in range(len(given))] if several else ["image"]
    images = [
        _image(value, key, row)
        for key, value in zip(image_keys, given if several else [given], strict=True)
    ]
    messages, remaining = [], list(images)
    turns = _list(record.get("conversations"), "conversations", row)
    for index, turn in enumerate(turns):
        key = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise row.error(
                key, f'is {type(turn).__name__}; give an object with "from" and "value"'
            )
        _check_keys(turn, ("from", "value"), (), row, f"{key}.", no_place=("image",))
        if not isinstance(turn["from"], str) or turn["from"] not in roles:
            raise row.error(f"{key}.from", f"is {shown(turn['from'])}; give human, gpt or system")
        first, *others = _text(turn["value"], f"{key}.value", row).split("<image>")
        parts: list[str | Path | Image.Image] = [first.strip()]
        for text in others:
            parts += [*remaining[:1], text.strip()]
            del remaining[:1]
        messages.append(_turn(roles[turn["from"]], *(part for part in parts if part != "")))
    placeholders = sum(turn["value"].count("<image>") for turn in turns)
    if placeholders != len(images):
        raise row.error(
            "conversations",
            f"has {placeholders} <image> placeholders for {len(images)} pictures; write <image> "
            f"once for each",
        )
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
    choices = [
        _text(choice, f"choices[{index}]", row)
        for index, choice in enumerate(_list(record.get("choices"), "choices", row))
    ]
    options = " ".join(
        f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)
    )
    context = str(record.get("hint", "")).strip() or "N/A"
    question = _text(record.get("question"), "question", row)
    prompt = f"Context: {context}\nQuestion: {question}\nOptions: {options}\n{_SCIENCEQA_REQUEST}"
    pictures = [_image(record["image"], "image", row)] if "image" in record else []
    messages = [_turn("user", *pictures, prompt)]
    if "answer" in record:
        answer = record["answer"]
        if (
            isinstance(answer, bool)
            or not isinstance(answer, Integral)
            or not 0 <= int(answer) < min(len(choices), len(_LETTERS))
        ):
            raise row.error(
                "answer",
                f"is {shown(answer)}; give the index of one of the {len(choices)} choices, counted "
                f"from 0",
            )
        messages.append(_turn("assistant", _LETTERS[int(answer)]))
    return messages, ["image"] * len(pictures)


_SCIENCEQA_KNOWN = frozenset(
    {
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
    }
)
_FORMATS = (
    _Format(marker="messages", required=frozenset({"messages"}), convert=_from_chat),
    _Format(
        marker="conversations", required=frozenset({"conversations"}), optional=frozenset({"image"}),
        known=frozenset({"model"}), convert=_from_llava,  # "model" stands in LLaVA's own training file
    ),
    _Format(
        marker="choices", required=frozenset({"question", "choices"}), optional=frozenset({"answer", "hint", "image"}),
        known=_SCIENCEQA_KNOWN, convert=_from_scienceqa,
    ),
    _Format(
        marker="question", required=frozenset({"image", "question"}), optional=frozenset({"answer", "choices"}), convert=_from_question,
    ),
)  # fmt: skip
