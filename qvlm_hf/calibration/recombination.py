"""More calibration samples out of those that there are: every question with another picture, mirrored at random.

Learned rounding compares hidden states with full precision, so what it needs are inputs like those of the model's use, not answers.
Pictures of one shape can change places; the tokens that stand for them stay as many.
"""

from collections.abc import Sequence

import torch

from qvlm_hf.calibration.samples import Batch

__all__ = ["recombined"]


def recombined(data: Sequence[Batch], copies: int, *, seed: int) -> list[Batch]:
    """Every batch with pictures, `copies` times with others.

    Args:
        data: the calibration batches.
        copies: how often.
        seed: of the choice.

    Returns:
        New batches; none if pictures differ in shape (a model that takes any size has a number of tokens for each).
    """
    having = [batch for batch in data if "pixel_values" in batch.inputs]
    pool = [picture for batch in having for picture in batch.inputs["pixel_values"]]
    if len({picture.shape for picture in pool}) != 1 or any(set(batch.inputs) & {"image_sizes", "image_grid_thw"} for batch in having):
        return []
    generator = torch.Generator().manual_seed(seed)
    return [_with_other_pictures(batch, pool, generator) for _ in range(copies) for batch in having]


def _with_other_pictures(batch: Batch, pool: Sequence[torch.Tensor], generator: torch.Generator) -> Batch:
    count = len(batch.inputs["pixel_values"])
    chosen = torch.randint(len(pool), (count,), generator=generator).tolist()
    mirrored = (torch.rand((count, 2), generator=generator) < 0.5).tolist()
    axes = [[axis for axis, flip in zip((-1, -2), flips, strict=True) if flip] for flips in mirrored]
    pictures = [pool[index].flip(flipped) for index, flipped in zip(chosen, axes, strict=True)]
    return Batch(inputs={**batch.inputs, "pixel_values": torch.stack(pictures)}, labels=batch.labels, origins=batch.origins)
