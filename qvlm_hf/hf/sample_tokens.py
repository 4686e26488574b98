"""How many tokens the samples of a run are, before a weight is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from qvlm_hf.calibration.estimate.sums import Data
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.samples import IGNORE_INDEX, Sample, collate, longest_sample
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.processor_fit import count_features, count_placeholders, usual_picture
from qvlm_hf.quantize import CHECK_SAMPLES

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["count_data"]

_RENDERED = 8  # samples, to count tokens
_TEXT, _PATCHES = 128, 1024  # assumed of a sample: tokens besides the picture, and of a picture


def count_data(
    model: PreTrainedModel, config: QVLMConfig, samples: Sequence[Sample] | None
) -> Data:
    """Counts the tokens of a few rendered samples, or assumes a picture and some text."""
    if samples is None:
        count, answers = config.num_samples, 8.0
        picture = usual_picture(model.config)
        pixels = torch.empty(_PATCHES, 1, device="meta") if picture is None else picture
        pictures = [_picture_tokens(model, {"pixel_values": pixels})]
        text = _TEXT + pictures[0]["projector"][0]
    else:
        count = min(config.num_samples, len(samples))
        few = samples[:: max(1, len(samples) // _RENDERED)][:_RENDERED]
        processor = copy.deepcopy(config.processor)  # a tokenizer keeps how it padded
        with torch.device("cpu"):  # from_pretrained makes "meta" the default
            batches = [collate([sample], processor) for sample in few]
        answers = sum(int((one.labels != IGNORE_INDEX).sum()) for one in batches) / len(few)
        pictures = [_picture_tokens(model, one.inputs) for one in batches]
        longest = longest_sample(model) or math.inf  # those beyond will be left out
        lengths = [min(one.inputs["input_ids"].shape[1], longest) for one in batches]
        text = (max(lengths) + sum(lengths) / len(lengths)) / 2  # with padding
    parts = ("vision", "projector")
    tokens = {part: sum(one[part][0] for one in pictures) / len(pictures) for part in parts}
    context = {part: max(one[part][1] for one in pictures) for part in parts}
    return Data(
        samples=-(-count // ranks.world_size()),  # of this process
        batch_size=config.batch_size,
        tokens=tokens | {"language": text},
        context=context | {"language": text},
        answers=answers,
        checks=CHECK_SAMPLES,
    )


def _picture_tokens(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Component -> tokens that enter it for the pictures of a sample, and those of one picture."""
    pixels: Any = inputs.get("pixel_values")
    if pixels is None:
        return {"vision": (0, 0), "projector": (0, 0)}
    vision: Any = getattr(model.config, "vision_config", None)
    pictures, patches = 1, pixels.shape[:-1].numel()  # rows of patches, or whole pictures
    if pixels.dim() > 3:
        patch = getattr(vision, "patch_size", 14)
        patch = patch if isinstance(patch, int) else patch[0]
        pictures = pixels.shape[:-3].numel()
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        if patches == 1:  # each of its own
            pictures, patches = 1, pictures
    features = count_placeholders(model, inputs) if "input_ids" in inputs else None
    with suppress(ValueError):  # a usual picture need not be one that the model takes
        features = features or count_features(model, inputs)
    features = features or pictures * patches / getattr(vision, "spatial_merge_size", 1) ** 2
    return {"vision": (pictures * patches, patches), "projector": (features, features / pictures)}
