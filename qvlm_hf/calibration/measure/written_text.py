"""Text that the model writes itself, to calibrate its language on and to judge it by."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch
from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["WRITTEN", "text_rows", "with_text", "written_text"]

WRITTEN = "text of the model"  # the origin of its rows
_TEXT_TOKENS = 64


def text_rows(samples: int) -> int:
    """Texts among the data of so many samples: one for every four."""
    return max(2, samples // 4)


def with_text(model: Any, data: Sequence[Batch], settings: CalibrationSettings) -> Sequence[Batch]:
    """Calibration data, with text that the model writes where the settings ask for it."""
    if not settings.written_text:
        return data
    rows = text_rows(sum(len(batch.origins) for batch in data))
    return [*data, *written_text(model, rows, seed=settings.seed)]


@torch.no_grad()
def written_text(model: Any, rows: int, *, seed: int) -> list[Batch]:
    """Text without pictures that the model writes itself, each from a word drawn at random.

    Args:
        model: in full precision, with Transformers' `generate`.
        rows: how many texts, of 64 tokens each.
        seed: of words and text.

    Returns:
        Two batches (one of a single text), every token but the first an answer.
    """
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(0, len(vocabulary), (rows, 1)).to(device)
        ids = model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            eos_token_id=len(vocabulary),  # no token: it writes on behind an end
            max_new_tokens=_TEXT_TOKENS - 1,
        )
        ids = ranks.broadcast(ids).cpu()
    return [_text_batch(half) for half in (ids[::2], ids[1::2]) if len(half)]


def _text_batch(ids: Tensor) -> Batch:
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs=inputs, labels=labels, origins=(WRITTEN,) * len(ids))
