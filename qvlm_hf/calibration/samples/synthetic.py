"""Calibration without data: drawn pictures, general questions, the model's own answers.

A picture is a background (noise with a 1/f^a spectrum and coloured channels, a gradient, or a
checkerboard) under a few random shapes. What it cannot have is the content that a model was trained
on, so real samples are better where there are any (docs/results.md).
"""

import re
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from qvlm_hf.calibration.samples import Processor, Sample, collate, moved

__all__ = ["SYNTHETIC", "synthesize"]

SYNTHETIC = "synthetic"  # what `dataset` says to ask for this
_ANSWER_TOKENS = 16
_QUESTIONS = re.findall(
    r"\w[^.?]*[.?]",
    """
    Describe this picture. What is in this picture? What color is the background? How many
    objects are there? What is in the top left corner? What is at the bottom right? Is there
    a red object? Is there a circle in the picture? Which color is most common? What shape
    is in the center? Are there more than two shapes? What is the largest object? Name one
    color in the picture. What is on the left side? Is the picture dark or bright? Can you
    see any text? What would you call this picture? Is there a person in the picture? Where
    is the brightest spot? What pattern do you see? How many colors are there? Is there a
    line in the picture? What is next to the largest object? Is there an animal?
    """.replace("\n   ", ""),
)


def synthesize(model: nn.Module, processor: Processor, count: int, *, seed: int) -> list[Sample]:
    """Makes calibration samples.

    Returns:
        `count` chats, a picture, a question and the model's greedy answer each; samples that it has
        no answer to stay without.

    Raises:
        ValueError: the model answered less than half of them.
    """
    generator = np.random.default_rng(seed)
    size = _picture_size(processor)
    samples = []
    for index in range(count):
        picture, question = _draw_picture(generator, size), str(generator.choice(_QUESTIONS))
        asked = {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}],
        }
        sample = Sample(messages=(asked,), origin=f"{SYNTHETIC} sample {index}")
        answer = _answer(model, processor, sample)
        if answer:
            reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            sample = Sample(messages=(asked, reply), origin=sample.origin)
        samples.append(sample)
    answered = sum(sample.answer is not None for sample in samples)
    if 2 * answered < count:
        raise ValueError(
            f"dataset='synthetic': the model answered only {answered} of {count} drawn pictures: "
            f"pass real samples."
        )
    return samples


def _answer(model: Any, processor: Any, sample: Sample) -> str:
    """The greedy answer, empty where the model ends at once."""
    device = next(model.parameters()).device
    inputs = moved(collate([sample], processor).inputs, device, model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
    return processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def _picture_size(processor: Any) -> int:
    """The side that the image processor crops or resizes to; 336 where it does not say."""
    image_processor = getattr(processor, "image_processor", None)
    for name in ("crop_size", "size"):
        wanted: Any = getattr(image_processor, name, None)
        for key in ("height", "shortest_edge"):
            side = wanted.get(key) if hasattr(wanted, "get") else getattr(wanted, key, None)
            if isinstance(side, int) and side > 0:
                return side
    return 336


def _draw_picture(generator: np.random.Generator, size: int) -> Image.Image:
    """One RGB picture of size x size pixels."""
    background = (_noise, _gradient, _checkerboard)[generator.integers(3)](generator, size)
    picture = Image.fromarray((background.clip(0, 1) * 255).astype(np.uint8))
    brush = ImageDraw.Draw(picture)
    for _ in range(generator.integers(0, 7)):
        x, y = generator.integers(0, size, 2).tolist()
        width, height = generator.integers(max(2, size // 16), max(3, size // 2), 2).tolist()
        box, color = (x, y, x + width, y + height), tuple(generator.integers(0, 256, 3).tolist())
        kind = generator.integers(4)
        if kind == 0:
            brush.rectangle(box, fill=color)
        elif kind == 1:
            brush.ellipse(box, fill=color)
        elif kind == 2:
            brush.polygon(
                [(x, y + height), (x + width // 2, y), (x + width, y + height)], fill=color
            )
        else:
            brush.line(box, fill=color, width=max(1, size // 32))
    return picture


def _noise(generator: np.random.Generator, size: int) -> np.ndarray:
    """Noise with amplitudes 1 / frequency^a, a in [0, 2] (natural pictures: about 1)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) * size
    amplitude = 1 / np.maximum(frequency, 1) ** generator.uniform(0, 2)
    spectrum = np.fft.fft2(generator.standard_normal((3, size, size))) * amplitude
    channels = np.fft.ifft2(spectrum).real
    mixed = np.einsum("ij,jhw->hwi", generator.standard_normal((3, 3)) + np.eye(3), channels)
    mean = generator.uniform(0.2, 0.8, 3)
    return mean + mixed / (mixed.std() + 1e-9) * generator.uniform(0.05, 0.3)


def _gradient(generator: np.random.Generator, size: int) -> np.ndarray:
    """A linear blend of two colours in a random direction."""
    first, second = generator.uniform(0, 1, (2, 3))
    angle = generator.uniform(0, 2 * np.pi)
    place = np.linspace(-1, 1, size)
    share = (np.cos(angle) * place[:, None] + np.sin(angle) * place[None] + 1.5) / 3
    return first + share[..., None] * (second - first)


def _checkerboard(generator: np.random.Generator, size: int) -> np.ndarray:
    """Two colours in squares."""
    first, second = generator.uniform(0, 1, (2, 3))
    side = int(generator.integers(max(1, size // 16), max(2, size // 2)))
    index = np.arange(size) // side
    return np.where(((index[:, None] + index[None]) % 2)[..., None] == 0, first, second)
