"""Questions about pictures, packed into sequences: several share one, so that the picture is
encoded once.

Either every question sees only the picture (a block-diagonal mask, positions counted as if it were
alone), which is exactly the single-turn form, or the questions are the turns of one conversation.
Labels are on the answers and their `</s>` only.

Legend: B sequences, L tokens.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlavaProcessor

from demo_model.pool import cell_of_patch
from demo_model.processor import IMAGE_TOKEN, PATCH
from demo_model.questions import KINDS, ask, cells_of
from demo_model.scenes import PLACES, SIDE, SceneBatch

__all__ = ["IGNORE", "Batch", "Looks", "Packer"]

IGNORE = -100
# layers from 0. In layer 2 the last token of a prompt has gathered the words: heads 0 and 1 look at
# the cells that show the answer; in layer 4 it knows what they hold: head 0 looks for it among the
# options
_CELL_LAYER, _OPTION_LAYER = 2, 4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed batch.

    Attributes:
        ids: int64 [B, L].
        labels: int64 [B, L], -100 outside of the answers.
        positions: int64 [B, L].
        mask: bool [B, 1, L, L], True where a token may attend.
        looks: for some layers, where prompts should look.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    looks: dict[int, "Looks"]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Where the last tokens of M prompts should look in one layer.

    Attributes:
        source: int64 [M, 3]: sequence, token, attention head.
        among: bool [M, L], the tokens to choose from.
        wanted: bool [M, L], the right ones.
    """

    source: torch.Tensor
    among: torch.Tensor
    wanted: torch.Tensor


class Look(NamedTuple):
    """Where one token should look: layer, token, head, the tokens to choose from (first, end), the
    right ones.
    """

    layer: int
    token: int
    head: int
    first: int
    end: int
    wanted: list[int]


class Turn(NamedTuple):
    """One turn as token ids, question with "ASSISTANT:" and answer with `</s>`; the cells, and the
    token of the option, to look at.
    """

    question: list[int]
    answer: list[int]
    places: list[int]
    option: int | None


class Packer:
    """Draws questions about pictures and packs them into sequences.

    Args:
        processor: the demo processor; texts are tokenized with its tokenizer and laid out as its
            chat template does.
        seed: of the questions.
    """

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        """See the class docstring."""
        self.tokenizer = processor.tokenizer
        self.random = random.Random(seed)
        image = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.user = self._ids("USER:")
        self.assistant = self._ids("ASSISTANT:")
        self.after_option = {self._ids(word)[0] for word in ("(", "Answer", "ASSISTANT")}
        self.prefix = [self.tokenizer.bos_token_id, *self.user, *[image] * (SIDE // PATCH) ** 2]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _turns(
        self, scenes: SceneBatch, index: int, count: int, weights: dict[str, float]
    ) -> list[Turn]:
        """Draw `count` turns about one picture."""
        cells = cells_of(scenes, index)
        turns: list[Turn] = []
        while len(turns) < count:
            kind = self.random.choices(KINDS, [weights.get(k, 0) for k in KINDS])[0]
            question = ask(kind, cells, self.random)
            if question is not None:
                places = [PLACES.index(place) for place in question.places]
                asked, answer = (
                    self._ids(question.text) + self.assistant,
                    self._ids(question.answer + "</s>"),
                )
                turns.append(
                    Turn(
                        asked,
                        answer,
                        places,
                        self._option(asked, answer[0]) if kind == "choice" else None,
                    )
                )
        return turns

    def _option(self, question: list[int], letter: int) -> int:
        """Return the index of the last token of the option that `letter` names: "(A) top [left] (B)
        ...".
        """
        start = question.index(letter)
        return next(i for i in range(start, len(question)) if question[i] in self.after_option) - 1

    def pack(
        self,
        scenes: SceneBatch,
        chosen: np.ndarray,
        count: int,
        parallel: bool,
        weights: dict[str, float],
    ) -> Batch:
        """Pack `count` questions about each chosen picture.

        Args:
            scenes: the pool's scenes.
            chosen: int64 [B], indices into it.
            count: questions a picture.
            weights: how often each kind of question is drawn, relative to the others.
            parallel: True: every question sees the picture alone; False: the questions are turns of
                one conversation.
        """
        rows = [
            self._row(self._turns(scenes, int(index), count, weights), parallel) for index in chosen
        ]
        length = math.ceil(max(len(row[0]) for row in rows) / 8) * 8
        fill = (self.tokenizer.pad_token_id, IGNORE, 0, -1)
        ids, labels, positions, segments = (
            torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows])
            for i in range(len(fill))
        )
        query, key = segments[:, :, None], segments[:, None, :]
        visible = ((key == 0) | (key == query)) & torch.ones(
            length, length, dtype=torch.bool
        ).tril()
        looks = {
            layer: _join_looks([row[4] for row in rows], layer, length)
            for layer in (_CELL_LAYER, _OPTION_LAYER)
        }
        return Batch(
            ids=ids, labels=labels, positions=positions, mask=visible[:, None], looks=looks
        )

    def _row(
        self, turns: Sequence[Turn], parallel: bool
    ) -> tuple[list[int], list[int], list[int], list[int], list[Look]]:
        """Lay out one sequence: ids, labels, positions, segments (0 is visible to all that follow
        it), and where to look.
        """
        ids, labels = list(self.prefix), [IGNORE] * len(self.prefix)
        positions, segments = list(range(len(ids))), [0] * len(ids)
        looks: list[Look] = []
        image = len(self.prefix) - (SIDE // PATCH) ** 2
        for number, (question, answer, places, option) in enumerate(turns):
            opening = self.user if number and not parallel else []
            added = [*opening, *question, *answer]
            start = len(self.prefix) if parallel else len(ids)
            ids += added
            last = len(ids) - len(answer) - 1
            for head, place in enumerate(places):
                patches = (np.flatnonzero(cell_of_patch() == place) + image).tolist()
                looks.append(Look(_CELL_LAYER, last, head, image, len(self.prefix), patches))
            if option is not None:
                asked = last + 1 - len(question)
                looks.append(Look(_OPTION_LAYER, last, 0, asked, last, [asked + option]))
            labels += [IGNORE] * (len(added) - len(answer)) + answer
            positions += range(start, start + len(added))
            segments += [number + 1 if parallel else 0] * len(added)
        return ids, labels, positions, segments, looks


def _join_looks(rows: Sequence[Sequence[Look]], layer: int, length: int) -> Looks:
    """Join the looks of one layer over the sequences of a batch."""
    chosen = [
        (number, look) for number, row in enumerate(rows) for look in row if look.layer == layer
    ]
    among, wanted = torch.zeros(2, len(chosen), length, dtype=torch.bool)
    for index, (_, look) in enumerate(chosen):
        among[index, look.first : look.end] = True
        wanted[index, look.wanted] = True
    source = torch.tensor(
        [(number, look.token, look.head) for number, look in chosen], dtype=torch.int64
    ).view(-1, 3)
    return Looks(source=source, among=among, wanted=wanted)
