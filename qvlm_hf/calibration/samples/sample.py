"""`Sample`: one chat with its pictures, checked when it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from qvlm_hf.calibration.samples.errors import place, sample_error
from qvlm_hf.calibration.samples.pictures import open_image
from qvlm_hf.calibration.values import shown

__all__ = ["Message", "Sample"]

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One chat.

    Attributes:
        messages: Transformers chat; every content is a list of {"type": "text", "text": str} and
            {"type": "image", "image": Path or PIL image}. Roles: an optional "system", then "user"
            and "assistant" in turn.
        origin: where it was read, "scienceqa_train.jsonl:12"; opens every error message.
        kind: kind of question, reported by the evaluation.
        columns: published columns that the question counts in; () where there are none.
        image_keys: key of each picture in the source, in order; empty: named by their place in
            `messages`.

    Raises:
        ValueError: if the roles are not in that order or a content is not a list.
    """

    messages: tuple[dict[str, Any], ...]
    origin: str
    kind: str | None = None
    columns: tuple[str, ...] = ()
    image_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_turns(self.messages, self.origin)

    @property
    def answer(self) -> str | None:
        """Text of the last message if it is the assistant's, else None."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            return None
        return " ".join(part["text"] for part in last["content"] if part["type"] == "text")

    def images(self) -> list[Image.Image]:
        """Opens the pictures, in reading order, upright and in RGB.

        Raises:
            ValueError: if a picture is missing or unreadable.
        """
        return [open_image(value, place(self.origin, key)) for key, value in self.pictures()]

    def pictures(self) -> list[tuple[str, Path | Image.Image]]:
        """Key and file or picture of each, in reading order, not opened."""
        found = {
            f"messages[{i}].content[{j}].image": part["image"]
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message["content"])
            if part["type"] == "image"
        }
        return list(zip(self.image_keys or found, found.values(), strict=True))


def _check_turns(messages: Sequence[Mapping[str, Any]], origin: str) -> None:
    where, expected = place(origin), "user"
    if not messages:
        raise sample_error(where, "has no messages", "give at least the user's")
    for index, message in enumerate(messages):
        role = message.get("role")
        if role == "system" and index == 0 and len(messages) > 1:
            continue
        if role != expected:
            problem = f'message {index} has the role {shown(role)} where "{expected}" belongs'
            rule = "the user speaks first (after an optional system message), then assistant and "
            raise sample_error(where, problem, f"{rule}user in turn")
        expected = "assistant" if role == "user" else "user"
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list) or not all(
            isinstance(part, Mapping) and part.get("type") in part for part in content
        ):
            parts = '{"type": "text", "text": ...} and {"type": "image", "image": ...}'
            problem = f"the content of message {index} is no list of {parts}"
            raise sample_error(where, problem, "load_samples builds them")
