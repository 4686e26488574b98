"""The pool of training pictures, what their patches show, and the order in which batches take them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import LlavaProcessor

from demo_model.datasets import scene_stream
from demo_model.processor import PATCH
from demo_model.recipe import TrainOptions
from demo_model.scenes import COLORS, EMPTY, PLACES, SHAPES, SIDE, SceneBatch, load_sprite_bank

__all__ = [
    "PATCH_LABELS",
    "Pool",
    "cell_of_patch",
    "draw_pool",
    "patch_labels",
    "shuffled_batches",
    "to_pixels",
]

PATCH_LABELS = {"kind": len(SHAPES) + 2, "color": len(COLORS) + 1, "digit": 11, "cell": len(PLACES)}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Training pictures: uint8 [N, 48, 48, 3], and what they show."""

    pictures: np.ndarray
    scenes: SceneBatch


def draw_pool(options: TrainOptions) -> Pool:
    """Draw the pool of training pictures: the beginning of the "train" stream."""
    bank = load_sprite_bank(options.seed)
    scenes, pictures = [], []
    for batch, drawn in islice(
        scene_stream("train", bank, options.seed), math.ceil(options.pictures / 1024)
    ):
        scenes.append(batch)
        pictures.append(drawn)
    joined = {
        name: np.concatenate([getattr(batch, name) for batch in scenes])
        for name in ("kind", "color", "digit", "instance")
    }
    return Pool(pictures=np.concatenate(pictures), scenes=SceneBatch(**joined))


def cell_of_patch() -> np.ndarray:
    """Return the cell of every patch; int64 [36], two patches a side in each cell."""
    row, column = np.mgrid[0 : SIDE // PATCH, 0 : SIDE // PATCH]
    return (row // 2 * 3 + column // 2).ravel()


def patch_labels(scenes: SceneBatch, chosen: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the labels of every patch for the auxiliary heads; int64 [B, 36] each, 0 for an empty
    cell.
    """
    kind = scenes.kind[chosen]
    labels = {
        "kind": np.where(kind == EMPTY, 0, kind + 1),
        "color": scenes.color[chosen] + 1,
        "digit": scenes.digit[chosen] + 1,
        "cell": np.broadcast_to(np.arange(len(PLACES)), kind.shape),
    }
    return {
        name: torch.from_numpy(np.ascontiguousarray(value[:, cell_of_patch()]))
        for name, value in labels.items()
    }


def to_pixels(pictures: np.ndarray, processor: LlavaProcessor) -> torch.Tensor:
    """Normalise pictures as the processor does; uint8 [B, 48, 48, 3] -> float32 [B, 3, 48, 48]."""
    mean, std = (
        np.asarray(v, np.float32)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return torch.from_numpy(
        ((pictures.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).copy()
    )


def shuffled_batches(size: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of indices, epoch after epoch, each in a new order."""
    while True:
        order = rng.permutation(size)
        yield from (order[i : i + batch] for i in range(0, size - batch + 1, batch))
