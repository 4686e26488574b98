"""The embedded demo model: where it and its questions lie in the installed package.

A LLaVA of a few million parameters, real in every part (CLIP vision tower, projector, Llama decoder, processor, chat template),
that answers questions about 48x48 pictures of shapes and handwritten digits. It makes the whole of the package testable in
seconds and without a network.

    scenes.py     the pictures: nine cells with coloured shapes and handwritten digits
    questions.py  the questions about a picture and their answers
    datasets.py   the three splits as PNGs and JSON lines
    processor.py  tokenizer, image processor and chat template
    train.py      the recipe: `python -m demo_model.train --output DIR`; its numbers are in recipe.py, its steps in network.py (the
                  model), pool.py (pictures), packing.py (questions as sequences), losses.py, optimizer.py and scoring.py
    outliers.py   the function-preserving rescale that makes the model as hard to quantize as a large one
    model/, data/ what the recipe wrote

Importing this package imports none of them.
"""

from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "calibration", "test"]

__all__ = ["Split", "dataset_path", "model_dir"]


def model_dir() -> Path:
    """Return the directory of the trained model: what `from_pretrained` takes, processor included."""
    return Path(__file__).parent / "model"


def dataset_path(split: Split) -> Path:
    """Return the JSON-lines file of one split; the image paths in it are relative to its folder.

    Args:
        split: "train" (512 questions, a published part of the training stream), "calibration" (128) or "test" (2400). No
            picture and no handwritten digit of "train" is in the other two, and no picture is in more than one.

    Raises:
        ValueError: for any other split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split={split!r}: the demo data has the splits {', '.join(get_args(Split))}; pass one of them.")
    return Path(__file__).parent / "data" / f"{split}.jsonl"
