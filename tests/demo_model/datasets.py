"""The three splits of the demo data: pictures as PNGs, questions as JSON lines in the Transformers
chat format.

One line is one single-turn question:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "images/test/0001.png"},
                  {"type": "text", "text": "..."}]}, {"role": "assistant", "content": [{"type":
                  "text", "text": "red"}]}], "kind": "color"}

    split        pictures  questions  handwritten digits
    train        128       512        training instances (the first pictures of the training stream)
    calibration  64        128        held-out instances
    test         400       2400       held-out instances

Every kind of question has the same number of lines in a split.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from demo_model.questions import KINDS, Question, ask, cells_of
from demo_model.scenes import SceneBatch, SpriteBank, digit_instances, draw_scenes, sample_scenes

__all__ = ["SPLITS", "SplitOptions", "scene_stream", "write_split"]

_CHUNK = 1024  # pictures drawn at once
_STREAM = {"train": 0, "calibration": 1, "test": 2}
_TRIES = 50  # a scene that cannot carry its questions after so many draws is passed over


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How large a split is: pictures, and questions about each of them."""

    pictures: int
    questions: int


SPLITS = {
    "train": SplitOptions(pictures=128, questions=4),
    "calibration": SplitOptions(pictures=64, questions=2),
    "test": SplitOptions(pictures=400, questions=6),
}


def scene_stream(
    split: str, bank: SpriteBank, seed: int
) -> Iterator[tuple[SceneBatch, np.ndarray]]:
    """Yield scenes and their pictures (uint8 [1024, 48, 48, 3]) without end; the same split and
    seed give the same stream.
    """
    rng = np.random.default_rng([seed, _STREAM[split]])
    instances = digit_instances(held_out=split != "train")
    while True:
        scenes = sample_scenes(_CHUNK, bank, instances, rng)
        yield scenes, draw_scenes(scenes, bank, rng)


def _questions(
    kinds: list[str], scenes: SceneBatch, index: int, rng: random.Random
) -> list[Question] | None:
    """Put one question of each kind listed, all different; None where the scene cannot carry them."""
    cells = cells_of(scenes, index)
    chosen: list[Question] = []
    for kind in kinds:
        drawn = (ask(kind, cells, rng) for _ in range(_TRIES))
        question = next(
            (q for q in drawn if q is not None and q.text not in {c.text for c in chosen}), None
        )
        if question is None:
            return None
        chosen.append(question)
    return chosen


def _line(path: str, question: Question) -> str:
    """Render one question as a JSON line."""
    user = {
        "role": "user",
        "content": [{"type": "image", "path": path}, {"type": "text", "text": question.text}],
    }
    answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
    return json.dumps({"messages": [user, answer], "kind": question.kind}) + "\n"


def write_split(split: str, directory: Path, bank: SpriteBank, seed: int) -> Path:
    """Write `<split>.jsonl` and `images/<split>/*.png` under `directory`; returns the path of the
    former.
    """
    size = SPLITS[split]
    rng = random.Random(f"{seed}-{split}")
    images = directory / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for scenes, pictures in scene_stream(split, bank, seed):
        for index, picture in enumerate(pictures):
            written = len(lines) // size.questions
            if written == size.pictures:
                path = directory / f"{split}.jsonl"
                path.write_text("".join(lines), encoding="utf-8")
                return path
            kinds = [
                KINDS[(written * size.questions + i) % len(KINDS)] for i in range(size.questions)
            ]
            questions = _questions(kinds, scenes, index, rng)
            if questions is None:
                continue
            name = f"images/{split}/{written + 1:04d}.png"
            Image.fromarray(picture).save(directory / name, "PNG", optimize=True)
            lines += [_line(name, question) for question in questions]
    raise RuntimeError("the scene stream ended")  # it is endless
