"""Samples -> batches: rendered, tokenized, padded on the right, the last answer labelled."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qvlm_hf.calibration.samples.errors import place, sample_error
from qvlm_hf.calibration.samples.rendering import (
    Processor,
    adds_special_tokens,
    check_processor,
    render,
    takes_suffix,
)
from qvlm_hf.calibration.samples.sample import Sample
from qvlm_hf.calibration.values import whole_number
from qvlm_hf.errors import first_line

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "batches",
    "collate",
    "longest_sample",
    "moved",
    "without_too_long",
]

IGNORE_INDEX = -100  # label of tokens outside the answer; torch's cross entropy skips it


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The input of one forward pass.

    Attributes:
        inputs: the processor's tensors: input_ids and attention_mask [batch, tokens], padded on the
            right, and whatever the family needs (pixel_values, image_sizes); no pixel_values if no
            sample has a picture.
        labels: [batch, tokens] int64; the token itself at the last answer and its end-of-sequence
            token, `IGNORE_INDEX` elsewhere. The logits that predict position p are those at p - 1.
        origins: one per row.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    origins: tuple[str, ...]


def batches(
    samples: Sequence[Sample],
    processor: Processor,
    batch_size: int,
    *,
    model: torch.nn.Module | None = None,
) -> Iterator[Batch]:
    """Yields the samples in order, `batch_size` at a time (the last batch may be smaller).

    A `model` must have positions for every sample.

    Raises:
        ValueError: for a batch size that is no integer of at least 1, and as `collate` does.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    max_tokens = None if model is None else longest_sample(model)
    for start in range(0, len(samples), batch_size):
        yield collate(samples[start : start + batch_size], processor, max_tokens=max_tokens)


def moved(
    tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors on a device, floating ones in a dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


def longest_sample(model: torch.nn.Module) -> int | None:
    """Tokens that a sample may have: the text model's positions; None if it does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return positions
    factor = rope.get("factor")
    if not isinstance(factor, (int, float)) or not factor > 1:
        return positions
    # Some checkpoints say how far the scaled positions reach, others what was there before; nobody
    # is refused for it.
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * factor))


def without_too_long(
    samples: Sequence[Sample], processor: Processor, max_tokens: int | None
) -> list[Sample]:
    """The samples that a model has positions for, in order; logs one line about the others.

    `max_tokens` counts pictures and the answer; None is any number.

    Raises:
        ValueError: no sample is left of at least one, and as `collate` does.
    """
    if max_tokens is None or not samples:
        return list(samples)
    lengths = [
        int(collate([sample], processor).inputs["attention_mask"].sum()) for sample in samples
    ]
    fitting = [s for s, length in zip(samples, lengths, strict=True) if length <= max_tokens]
    if len(fitting) == len(samples):
        return fitting
    problem = (
        f"{len(samples) - len(fitting)} of {len(samples)} samples are longer than the model's "
        f"{max_tokens} positions"
    )
    longest = f"({samples[lengths.index(max(lengths))].origin}: {max(lengths)} tokens)"
    if not fitting:
        remedy = "give shorter texts, or fewer or smaller pictures"
        raise ValueError(f"{problem} {longest}: {remedy}")
    logging.getLogger(__name__).warning("%s and are left out %s", problem, longest)
    return fitting


def collate(
    samples: Sequence[Sample], processor: Processor, *, max_tokens: int | None = None
) -> Batch:
    """Renders the chats with the processor's template, tokenizes them and labels the last answer.

    The answer is found by rendering twice, with and without it: the common beginning of the two
    token sequences is the prompt. Its length is counted from the end, so it does not matter into
    how many tokens the processor expands the pictures before it. Whitespace after the answer is
    dropped. Where the template leaves the answer open, as LLaVA's does, the end-of-sequence token
    is added, which the model was trained to say there. Samples without an answer get no labels and
    end in the template's generation prompt.

    A processor without a template that takes question and answer apart is called so.

    Args:
        samples: at least one; with and without pictures may be mixed.
        processor: a Transformers processor (`apply_chat_template`, `__call__`, `tokenizer`).
        max_tokens: that a sample may have (`longest_sample`); None: any number.

    Raises:
        ValueError: if the processor has no chat template or no padding token, if a picture is
            missing or has no place in the text, if the template does not show the answer, if the
            processor makes NaN or infinity of a picture, or if a sample is too long.
    """
    if not samples:
        raise ValueError("collate got no samples; give at least one")
    check_processor(processor)
    chats = [render(sample, processor) for sample in samples]
    origins, texts = [sample.origin for sample in samples], [text for text, _ in chats]
    pictures = [sample.images() for sample in samples]
    for text, own, origin in zip(texts, pictures, origins, strict=True):
        _check_placeholders(text, len(own), processor, origin)
    answers = [sample.answer or "" for sample in samples]
    suffixes = answers if takes_suffix(processor) and any(answers) else None
    inputs = _call_processor(processor, texts, pictures, origins, suffixes)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    _check_expansion(ids, pictures, processor, origins)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (origin, (_, answer)) in enumerate(zip(origins, chats, strict=True)):
        length = int(mask[row].sum())
        if max_tokens is not None and length > max_tokens:
            problem = f"{length} tokens are more than the model's {max_tokens} positions"
            remedy = "leave it out (qvlm_hf.calibration.samples.without_too_long does)"
            raise sample_error(place(origin), problem, f"{remedy}, or shorten it")
        if answer:
            positions = mask[row].nonzero().flatten()[-len(answer) :]
            if ids[row, positions].tolist() != answer:
                problem = f"the processor's tokens do not end in the answer's {answer}"
                raise sample_error(place(origin), problem, "it changes the rendered text")
            labels[row, positions] = torch.tensor(answer)
    return Batch(inputs=inputs, labels=labels, origins=tuple(origins))


def _check_placeholders(text: str, pictures: int, processor: Processor, origin: str) -> None:
    placeholder = getattr(processor, "image_token", None)
    count = text.count(placeholder) if placeholder else 0
    # Zero is judged after tokenizing: some templates write another marker, which their processor
    # replaces.
    if count and count != pictures:
        problem = f"{count} {placeholder} placeholders in the rendered text for {pictures} pictures"
        remedy = f"remove {placeholder} from the sample's own text"
        raise sample_error(place(origin), problem, remedy)


def _call_processor(
    processor: Processor,
    texts: list[str],
    pictures: list[list[Image.Image]],
    origins: list[str],
    suffixes: list[str] | None,
) -> dict[str, torch.Tensor]:
    where, name = place(", ".join(origins)), type(processor).__name__
    try:
        output = processor(
            text=texts,
            **({"images": pictures} if any(pictures) else {}),
            **({"suffix": suffixes} if suffixes else {}),
            padding=True,
            padding_side="right",
            truncation=False,
            add_special_tokens=adds_special_tokens(texts[0], processor.tokenizer),
            return_tensors="pt",
        )
    except Exception as error:  # a processor is foreign code: it may raise anything
        raise ValueError(f"{where} {name} refuses this batch ({first_line(error)})") from error
    for key, value in output.items():
        if not isinstance(value, torch.Tensor):
            problem = f"{name} returns {key} as {type(value).__name__}, not as one tensor"
            raise sample_error(where, problem, "use batch_size=1")
        if value.is_floating_point() and not torch.isfinite(value).all():
            if len(texts) > 1:  # only one by one they tell which of them it is
                for text, own, origin in zip(texts, pictures, origins, strict=True):
                    _call_processor(processor, [text], [own], [origin], None)
            problem = f"{name} makes NaN or infinity of the pictures ({key})"
            remedy = "check them, and the processor's image_mean and image_std"
            raise sample_error(where, problem, remedy)
    return {key: value for key, value in output.items() if key != "labels"}


def _check_expansion(
    input_ids: torch.Tensor,
    pictures: list[list[Image.Image]],
    processor: Processor,
    origins: list[str],
) -> None:
    """Checks every row, and that pictures of one size became equally many tokens."""
    token = getattr(processor, "image_token_id", None)
    if token is None:
        return  # nothing to count by; the model's own check remains
    per_size: dict[tuple[int, int], int] = {}
    for ids, own, origin in zip(input_ids, pictures, origins, strict=True):
        sizes = {picture.size for picture in own}
        size = sizes.pop() if len(sizes) == 1 else None
        expected = per_size.get(size) if size else None
        count = _count_image_tokens(ids, token, expected, len(own), origin)
        if size:
            per_size.setdefault(size, count // len(own))


def _count_image_tokens(
    input_ids: torch.Tensor, token: int, per_image: int | None, images: int, origin: str
) -> int:
    """Picture tokens of one sample, [tokens]; `per_image` None: any positive number will do."""
    count = int((input_ids == token).sum())
    known = images == 0 or per_image is not None
    expected = (per_image or 0) * images
    if (known and count != expected) or (images and not count):
        wanted = str(expected) if known else "at least one each"
        problem = f"{count} picture tokens for {images} pictures, {wanted} expected"
        remedy = "the processor does not fit the chat template"
        raise sample_error(place(origin), problem, remedy)
    return count
