"""Perplexity on plain text, and the divergence from a reference there: the language alone.

What is calibrated on pictures and chats may cost a model its language; answers do not show that.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.process.waiting import yield_to_others
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch, longest_sample

__all__ = ["TextEvaluation", "check_text", "evaluate_text", "format_text", "read_text"]

_WINDOW = 512  # tokens that a model reads at once
_FEWEST = 32  # tokens to predict; the mean of less is chance


@dataclass(frozen=True, kw_only=True)
class TextEvaluation:
    """A model on plain text.

    Attributes:
        tokens: that were predicted.
        perplexity: exp of the mean cross entropy of these tokens.
        reference_perplexity: of the reference; None without one.
        kl: KL(reference || model) in nats, mean of all tokens; None without reference.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_text(path: str | Path) -> str:
    """The content of a text file, checked before any model is loaded.

    Raises:
        ValueError: it is no file, cannot be read, is no UTF-8 text, or is empty.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe can be read once
        raise ValueError(f"{path}: is no regular file: name a file of UTF-8 text.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no UTF-8 text ({error.reason}): convert it.") from error
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}): name a file of UTF-8 text."
        ) from error
    if not text.strip():
        raise _too_little(path)
    return text


def _too_little(path: str | Path) -> ValueError:
    return ValueError(f"{path}: holds too little text: give a few hundred words.")


def read_text(path: str | Path, tokenizer: Any, model: nn.Module) -> list[Tensor]:
    """The tokens of a text file in windows that the model can read.

    Args:
        path: of a UTF-8 text.
        tokenizer: of the model; what it puts in front of a text stands in front of every window.
        model: whose positions bound a window, which has 512 tokens at most.

    Returns:
        Windows of int64 [tokens]; a last one of less than two tokens is left out.

    Raises:
        ValueError: the file cannot be read, is no text or has too few words.
    """
    ids = tokenizer(check_text(path), add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    front = whole[: whole.index(plain[0])] if plain and plain[0] in whole else []
    size = min(_WINDOW, longest_sample(model) or _WINDOW) - len(front)
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    windows = [torch.tensor(front + part) for part in parts if len(front + part) > 1]
    if sum(len(window) - 1 for window in windows) < _FEWEST:
        raise _too_little(path)
    return windows


@yield_to_others()
def evaluate_text(
    model: nn.Module, windows: Iterable[Tensor], *, reference: nn.Module | None = None
) -> TextEvaluation:
    """Measures perplexity, and the divergence from a reference if there is one.

    Args:
        model: called with `input_ids`, returns `.logits`; runs on its own device.
        windows: int64 [tokens] each, two or more; every token but a window's first is predicted.
        reference: the full-precision model.

    Raises:
        ValueError: logits that are not numbers.
    """
    losses = {"model": 0.0, "reference": 0.0, "kl": 0.0}
    tokens = 0
    for index, ids in enumerate(windows):
        own = _logits(model, ids, index)
        targets = ids[1:].to(own.device)
        tokens += len(targets)
        losses["model"] += _cross_entropy(own, targets)
        if reference is not None:
            other = _logits(reference, ids, index).to(own.device)
            losses["reference"] += _cross_entropy(other, targets)
            losses["kl"] += answer_kl(other, own) * len(targets)
    return TextEvaluation(
        tokens=tokens,
        perplexity=math.exp(losses["model"] / tokens),
        reference_perplexity=None if reference is None else math.exp(losses["reference"] / tokens),
        kl=None if reference is None else losses["kl"] / tokens,
    )


def format_text(
    found: TextEvaluation, *, name: str = "quantized", reference: str = "full precision"
) -> list[str]:
    """A text evaluation as lines, in which the two models are called `name` and `reference`."""
    tokens = f"{found.tokens} token{'' if found.tokens == 1 else 's'}"
    line = f"{name}: perplexity {found.perplexity:.2f} on {tokens} of text"
    if found.reference_perplexity is None:
        return [line]
    return [
        f"{reference}: perplexity {found.reference_perplexity:.2f} on text",
        line,
        f"KL({reference} || {name}) {found.kl:.4g} nats per token of text",
    ]


def _logits(model: nn.Module, ids: Tensor, index: int) -> Tensor:
    """[tokens - 1, vocabulary], those that predict the window from its second token on."""
    labels = ids.clone()[None]
    labels[:, 0] = IGNORE_INDEX
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    batch = Batch(inputs=inputs, labels=labels, origins=(f"text window {index + 1}",))
    return answer_logits(model, batch)[0].double()


def _cross_entropy(logits: Tensor, targets: Tensor) -> float:
    return nn.functional.cross_entropy(logits, targets, reduction="sum").item()
