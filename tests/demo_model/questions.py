"""Questions about a scene and their answers, in eight kinds.

    color    "What color is the object in the top left cell?"                  red
    shape    "Which shape is at the middle center?"                            star
    digit    "Read the digit in the bottom right cell."                        7
    count    "How many red objects are there?"                                 2
    where    "Where is the blue circle?"                                       top left      (two tokens)
    exists   "Is there a green star?"                                          yes
    compare  "Which digit is larger, the top left one or the ... one?"         8
    choice   "Which color is at the top left? Options: (A) red (B) blue ..."   B             (as in ScienceQA)

Each kind has a row of templates in `TEMPLATES`. Every question has exactly one right answer: places
that are asked about hold what the
question says, and things that are looked for are in exactly one cell. Chance and the most frequent
answer earn little: yes and no, and the letters, are drawn evenly.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from demo_model.scenes import COLORS, DIGIT, EMPTY, PLACES, SHAPES, SceneBatch

__all__ = ["KINDS", "Cell", "Question", "ask", "cells_of", "vocabulary"]

KINDS = ("color", "shape", "digit", "count", "where", "exists", "compare", "choice")
LETTERS = ("A", "B", "C")
COLOR_NAMES = tuple(COLORS)
DIGIT_NAMES = tuple("0123456789")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is the object in the {place} cell?",
        "Which color is at the {place}?",
        "Name the color of the {place} object.",
    ),
    "shape": (
        "What shape is in the {place} cell?",
        "Which shape is at the {place}?",
        "Name the shape at the {place}.",
    ),
    "digit": (
        "What digit is in the {place} cell?",
        "Which digit is at the {place}?",
        "Read the digit in the {place} cell.",
    ),
    "count": (
        "How many {things} are there?",
        "Count the {things}.",
        "How many {things} are in the picture?",
    ),
    "where": ("Where is the {thing}?", "In which cell is the {thing}?", "Find the {thing}."),
    "exists": ("Is there {a_thing}?", "Does the picture show {a_thing}?", "Can you see {a_thing}?"),
    "compare": (
        "Which digit is {larger}, the {place} one or the {other} one?",
        "Which is the {larger} digit, the one at the {place} or the one at the {other}?",
    ),
    "choice": (
        "{question} Options: {options}",
        "{question} Options: {options} Answer with the letter.",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One filled cell: its place, colour, and shape name or digit (`noun` is "digit" for digits)."""

    place: str
    color: str
    noun: str
    digit: int

    @property
    def thing(self) -> str:
        """Return how a question calls what is here, for instance "red circle" or "green digit"."""
        return f"{self.color} {self.noun}"


@dataclass(frozen=True)
class Question:
    """One question: its kind (an element of `KINDS`), its text, its answer, and the places that
    show the answer (in training only).
    """

    kind: str
    text: str
    answer: str
    places: tuple[str, ...] = ()


def cells_of(scenes: SceneBatch, index: int) -> list[Cell]:
    """Return the filled cells of one scene, in reading order."""
    kind, color, digit = scenes.kind[index], scenes.color[index], scenes.digit[index]
    return [
        Cell(
            PLACES[i],
            COLOR_NAMES[color[i]],
            "digit" if kind[i] == DIGIT else SHAPES[kind[i]],
            int(digit[i]),
        )
        for i in range(len(PLACES))
        if kind[i] != EMPTY
    ]


class _Asked(NamedTuple):
    """A question's text and answer, the places to look at, and where options can be drawn from
    them, all possible answers.
    """

    text: str
    answer: str
    places: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


def _at_place(kind: str, cells: list[Cell], rng: random.Random) -> _Asked:
    """Ask for the colour, shape or digit at one place."""
    if kind == "color":
        cell, answers = rng.choice(cells), COLOR_NAMES
        answer = cell.color
    elif kind == "shape":
        cell, answers = rng.choice([c for c in cells if c.noun != "digit"]), SHAPES
        answer = cell.noun
    else:
        cell, answers = rng.choice([c for c in cells if c.noun == "digit"]), DIGIT_NAMES
        answer = str(cell.digit)
    return _Asked(
        rng.choice(TEMPLATES[kind]).format(place=cell.place), answer, (cell.place,), answers
    )


def _count(cells: list[Cell], rng: random.Random) -> _Asked:
    """Count what has a colour, or what has a shape (digits included); three times in four something
    that is there.
    """
    if rng.random() < 0.5:
        name = rng.choice(cells).color if rng.random() < 0.75 else rng.choice(COLOR_NAMES)
        return _Asked(
            rng.choice(TEMPLATES["count"]).format(things=f"{name} objects"),
            str(sum(c.color == name for c in cells)),
        )
    noun = rng.choice(cells).noun if rng.random() < 0.75 else rng.choice((*SHAPES, "digit"))
    things = {"cross": "crosses"}.get(noun, f"{noun}s")
    return _Asked(
        rng.choice(TEMPLATES["count"]).format(things=things),
        str(sum(c.noun == noun for c in cells)),
    )


def _where(cells: list[Cell], rng: random.Random) -> _Asked | None:
    """Ask for the place of something that is there exactly once; None if nothing is."""
    names = [c.thing for c in cells]
    single = [c for c in cells if names.count(c.thing) == 1]
    if not single:
        return None
    cell = rng.choice(single)
    return _Asked(
        rng.choice(TEMPLATES["where"]).format(thing=cell.thing), cell.place, (cell.place,), PLACES
    )


def _exists(cells: list[Cell], rng: random.Random) -> _Asked:
    """Ask whether something is there; where the answer is no, half of the things join a colour and
    a noun that are there.
    """
    names = {c.thing for c in cells}
    places: tuple[str, ...] = ()
    if rng.random() < 0.5:
        cell = rng.choice(cells)
        thing, answer, places = cell.thing, "yes", (cell.place,)
    else:
        answer = "no"
        mixed = sorted({f"{a.color} {b.noun}" for a in cells for b in cells} - names)
        absent = [
            f"{color} {noun}"
            for color in COLOR_NAMES
            for noun in (*SHAPES, "digit")
            if f"{color} {noun}" not in names
        ]
        thing = rng.choice(mixed if mixed and rng.random() < 0.5 else absent)
    article = "an" if thing.startswith("orange") else "a"
    return _Asked(
        rng.choice(TEMPLATES["exists"]).format(a_thing=f"{article} {thing}"), answer, places
    )


def _compare(cells: list[Cell], rng: random.Random) -> _Asked | None:
    """Ask for the larger or smaller of two digits that differ; None if all digits are equal."""
    digits = [c for c in cells if c.noun == "digit"]
    pairs = [(a, b) for a in digits for b in digits if a.digit != b.digit]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    larger, choose = rng.choice((("larger", max), ("smaller", min)))
    text = rng.choice(TEMPLATES["compare"]).format(
        larger=larger, place=first.place, other=second.place
    )
    return _Asked(text, str(choose(first.digit, second.digit)), (first.place, second.place))


def _choice(cells: list[Cell], rng: random.Random) -> _Asked:
    """Put a colour, shape, digit or place question with three options; the letter of the right one
    is the answer.
    """
    kind = rng.choice(("color", "shape", "digit", "where"))
    asked = _where(cells, rng) if kind == "where" else None
    text, answer, places, answers = asked or _at_place(
        "color" if kind == "where" else kind, cells, rng
    )
    options = [answer, *rng.sample([a for a in answers if a != answer], len(LETTERS) - 1)]
    rng.shuffle(options)
    listed = " ".join(
        f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True)
    )
    return _Asked(
        rng.choice(TEMPLATES["choice"]).format(question=text, options=listed),
        LETTERS[options.index(answer)],
        places,
    )


def ask(kind: str, cells: list[Cell], rng: random.Random) -> Question | None:
    """Put one question of a kind about a scene.

    Args:
        kind: an element of `KINDS`.
        cells: the filled cells of the scene, from `cells_of`; at least two shapes and two digits.
        rng: chooses object, template and wording.

    Returns:
        The question, or None where the scene allows none of this kind (nothing single to find; no
        two digits that differ).

    Raises:
        ValueError: for an unknown kind.
    """
    if kind in ("color", "shape", "digit"):
        asked: _Asked | None = _at_place(kind, cells, rng)
    elif kind in _ASK:
        asked = _ASK[kind](cells, rng)
    else:
        raise ValueError(
            f"kind={kind!r}: questions are of the kinds {', '.join(KINDS)}; pass one of them."
        )
    return None if asked is None else Question(kind, asked.text, asked.answer, asked.places)


_ASK: dict[str, Callable[[list[Cell], random.Random], _Asked | None]] = {
    "count": _count,
    "where": _where,
    "exists": _exists,
    "compare": _compare,
    "choice": _choice,
}


def vocabulary() -> list[str]:
    """Return every text that a question or an answer is made of, for the tokenizer: templates and
    names, in a fixed order.
    """
    fields = dict.fromkeys(
        ("place", "other", "things", "thing", "a_thing", "larger", "question", "options"), ""
    )
    templates = [template.format(**fields) for kind in KINDS for template in TEMPLATES[kind]]
    nouns = (
        *SHAPES,
        *(f"{s}s" for s in SHAPES if s != "cross"),
        "crosses",
        "digit",
        "digits",
        "object",
        "objects",
    )
    answers = (
        "yes",
        "no",
        *DIGIT_NAMES,
        *COLOR_NAMES,
        *PLACES,
        *(f"({letter})" for letter in LETTERS),
    )
    return [*templates, *nouns, *answers, "a an larger smaller"]
