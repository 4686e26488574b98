"""Plain English text, none of it about pictures, and a model's perplexity and divergence on it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvlm_hf.calibration.measure.answers import answer_kl
from qvlm_hf.calibration.measure.written_text import written_text
from unseen_models.cache import files_of

__all__ = ["compare_text", "passages", "read_texts", "text_logits"]


def passages(count: int, *, words: int = 90) -> list[str]:
    """Passages of prose from the descriptions of scikit-learn's data sets (BSD), from the last on.

    `words` each; tables, links and markup are left out.
    """
    folder = files_of("sklearn", "scikit-learn") / "datasets" / "descr"
    prose: list[str] = []
    for path in sorted(folder.glob("*.rst"), reverse=True):
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            line = " ".join(block.split())
            plain = not re.search(r"[=:|`_*>{}\[\]]|--|https?", line)
            if plain and len(line.split()) >= 12:
                prose += line.split()
    found = [" ".join(prose[i : i + words]) for i in range(0, len(prose) - words, words)]
    if len(found) < count:
        raise ValueError(f"{len(found)} passages of {words} words, {count} asked for")
    return found[:count]


def read_texts(count: int, tokenizer: Any, model: Any) -> list[Tensor]:
    """Tokens of `count` passages, or where it is 0 of text that the model writes."""
    if not count:
        return [
            ids for batch in written_text(model, 8, seed=1000) for ids in batch.inputs["input_ids"]
        ]
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in passages(count)]


@torch.inference_mode()
def text_logits(model: Any, texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per text [tokens] the logits that predict its tokens from the second on, and these tokens."""
    return [(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:]) for ids in texts]


def compare_text(
    full: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Perplexity of both, and the mean divergence from `full` (nats a token)."""
    logits = [torch.cat([row for row, _ in rows]) for rows in (full, other)]
    tokens = torch.cat([ids for _, ids in full])
    perplexities = [
        math.exp(torch.nn.functional.cross_entropy(row, tokens).item()) for row in logits
    ]
    return {
        "full": perplexities[0],
        "perplexity": perplexities[1],
        "kl": answer_kl(logits[0], logits[1]),
    }
