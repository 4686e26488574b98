"""The embedded demo model: where it and its questions lie in the installed package.

A LLaVA of a few million parameters, real in every part (CLIP vision tower, projector, Llama
decoder, processor, chat template). It answers questions about 48x48 pictures of shapes and
handwritten digits. It makes the whole of the package testable in seconds and without a network. How
it was made lies in the repository under tests/demo_model.
"""

from pathlib import Path
from typing import Literal, get_args

Split = Literal["calibration", "test"]

__all__ = ["Split", "dataset_path", "model_dir"]


def model_dir() -> Path:
    """Return the directory of the trained model and its processor, for `from_pretrained`."""
    return Path(__file__).parent / "model"


def dataset_path(split: Split) -> Path:
    """Return the JSON-lines file of one split; the image paths in it are relative to its folder.

    Args:
        split: "calibration" (128 questions) or "test" (2400). No picture is in both, and no
            handwritten digit in them was trained on.

    Raises:
        ValueError: for any other split.
    """
    if split not in get_args(Split):
        raise ValueError(
            f"split={split!r}: the demo data has the splits {', '.join(get_args(Split))}; pass one "
            f"of them."
        )
    return Path(__file__).parent / "data" / f"{split}.jsonl"
