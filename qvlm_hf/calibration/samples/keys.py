"""Keys of a row: which hold content, under which name, so that none is lost.

Keys that name no content (question_id, category) are carried by many data sets: they are ignored,
with one note for the source. A key that looks like a content key which is missing or empty is an
error. Where the content key is filled, another name for the same thing (`image_url` beside `image`,
`answers` beside `answer`) is ignored too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image

from qvlm_hf.calibration.samples.sample import Message
from qvlm_hf.calibration.samples.sources import Row, is_empty

__all__ = ["CHATS", "PLACES", "check_chat", "check_keys", "check_rivals", "close_matches", "words"]


def words(text: str) -> set[str]:
    """Those of a text, for tables of keys."""
    return set(text.split())


CHATS = {"messages", "conversations"}
# Content keys -> where their content belongs.
PLACES = {
    "image": 'write a picture as {"type": "image", "path": ...} into the content',
    "path": 'write a picture as {"type": "image", "path": ...}, and one in each',
    "answer": "write an answer as the last message",
    "text": 'write text as {"type": "text", "text": ...}',
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_PICTURE_FILE = re.compile(r".+\.(png|jpe?g|webp|bmp|gif|tiff?)", re.IGNORECASE)
_PICTURES = words("image img picture pic photo")
# Content key -> words that other data sets call it by, and words that stand beside these
# (`image_path`, `gt_answer`); a plural is the same.
_OTHER_NAMES: dict[str, tuple[set[str], set[str]]] = {
    "choices": (words("choices options"), words("answer text list")),
    "image": (_PICTURES, words("path file filename name url uri src data byte base list")),
    "answer": (
        words("answer response reply output completion label choice target truth caption"),
        words("text gt ground gold correct expected reference model assistant final multiple list"),
    ),
}


def check_keys(
    record: Mapping[str, Any],
    required: Iterable[str],
    optional: Iterable[str],
    row: Row,
    parent: str = "",
    *,
    misplaced: Iterable[str] = (),
) -> None:
    """Checks the keys of one object, and notes in `row.ignored` those that name no content.

    `misplaced`: content keys of other objects, whose content would be lost here. `parent` stands
    before the keys in messages.
    """
    required = set(required)
    read = required | set(optional)
    empty = {key for key in read if is_empty(record.get(key))}
    others = [key for key, value in record.items() if key not in read and not is_empty(value)]
    for key in sorted(required - record.keys()):
        hint = " (null for a question without a picture)" if key == "image" else ""
        for other in others:
            if close_matches(other, [key], 0.6) or _content_key(other, record[other], [key]):
                hint += f'; is "{other}" to be it?'
                break
        raise row.error(f"{parent}{key}", "is missing", f"add it{hint}")
    for key in others:
        if name := _content_key(key, record[key], misplaced):
            remedy = f"{PLACES[name]}, or remove it"
            raise row.error(f"{parent}{key}", "has no place here", remedy)
        if name := _content_key(key, record[key], empty):
            state = "empty" if name in record else "missing"
            problem = f'is unknown here, and "{name}" is {state}'
            raise row.error(f"{parent}{key}", problem, "rename or remove it")
        row.ignored.append(f"{parent}{key}")


def check_rivals(record: Mapping[str, Any], marker: str, row: Row) -> None:
    """Refuses a second chat, and pictures beside the only one that the layout `marker` reads."""
    image = record.get("image")
    for key, value in record.items():
        if key == marker or is_empty(value):
            continue
        if isinstance(value, (list, tuple)) and close_matches(key, CHATS - {marker}):
            raise row.error(key, f'holds a chat beside "{marker}"', "keep one of them")
        if marker in CHATS or key == "image" or is_empty(image) or isinstance(value, Real):
            continue
        if _is_made_of(key, _PICTURES) and _WORD.search(str(key)) and not _is_same(value, image):
            raise row.error(
                key,
                'holds more pictures than "image", which alone is shown',
                'give a chat, "messages", or remove it',
            )


def check_chat(
    record: Mapping[str, Any],
    known: Set[str],
    messages: Sequence[Message],
    pictures: Sequence[str],
    row: Row,
) -> None:
    """Refuses what looks like a picture or an answer beside a chat that has none."""
    wanted = set() if pictures else {"image"}
    wanted |= {"answer"} if messages[-1]["role"] != "assistant" else set()
    for key in record.keys() - known:
        if not is_empty(record[key]) and (name := _content_key(key, record[key], wanted)):
            remedy = f"{PLACES[name]}, or remove it"
            raise row.error(key, "holds what no message shows", remedy)


def close_matches(key: object, wanted: Iterable[str], likeness: float = 0.8) -> list[str]:
    """Those of `wanted` that `key` may be a misspelling of, the likeliest first."""
    return get_close_matches(str(key).strip().lower(), sorted(wanted), cutoff=likeness)


def _content_key(key: object, value: object, wanted: Iterable[str]) -> str | None:
    """Which content key of `wanted` this one stands for, by its name or as a picture by value."""
    if isinstance(value, Real):  # counts, sizes and flags; the number of a choice is an answer
        wanted = {"answer"}.intersection(wanted)
    if not str(key).lower().endswith(("id", "ids")):
        for name, (own, beside) in _OTHER_NAMES.items():
            if name in wanted and _is_made_of(key, own | beside) and not _is_made_of(key, beside):
                return name
        if close := close_matches(key, wanted):
            return close[0]
    return "image" if "image" in wanted and _is_picture(value) else None


def _is_made_of(key: object, words: Set[str]) -> bool:
    """Whether a key has only these words, singular or plural; of a key without any: True."""
    return all({word.lower(), word.lower().rstrip("s")} & words for word in _WORD.findall(str(key)))


def _is_picture(value: object) -> bool:
    """Whether it is a picture, the name of a picture file, or a list of these."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return bool(items) and all(
        isinstance(item, Image.Image)
        or (isinstance(item, (str, Path)) and bool(_PICTURE_FILE.fullmatch(str(item))))
        for item in items
    )


def _is_same(value: object, image: object) -> bool:
    """Whether a value is a picture, or a list of it alone."""
    (value, *more) = value if isinstance(value, (list, tuple)) else [value]
    comparable = type(value) is type(image) and isinstance(value, (str, Path, Image.Image))
    return comparable and not more and value == image
