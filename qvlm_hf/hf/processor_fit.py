"""Whether a processor fits a model, seen on one sample before a weight is read.

The model is asked what it makes of the picture. On the device "meta" that costs no memory and
computes shapes alone, so nothing here knows how a family turns pictures into features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from qvlm_hf.calibration.samples import Sample, collate
from qvlm_hf.errors import first_line
from qvlm_hf.models.trace_inputs import count_rows

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = [
    "check_processor_fits",
    "count_features",
    "count_placeholders",
    "pictured",
    "sample_of_noise",
    "usual_picture",
]

_OWN = "take the processor that was saved with the model"


def check_processor_fits(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample] | None
) -> None:
    """Puts one sample through the processor, with a picture if possible, and asks the model.

    A model that cannot be asked, for example because it knows no `get_image_features`, is let
    through.

    Args:
        model: on any device; "meta" is enough.
        processor: any Transformers processor.
        samples: None stands for one with an empty picture, called "a test picture".

    Raises:
        ValueError: the processor fails on the sample, or writes a token that the model does not
            know, or another number of image tokens than the model makes features.
    """
    processor = copy.deepcopy(processor)  # a tokenizer keeps how it padded, and would be saved so
    sample = sample_of_noise() if samples is None else pictured(samples)
    name = type(processor).__name__
    try:
        inputs = _make_inputs(sample, processor)
    except ValueError as error:  # names the sample
        if found := _find_settings(model, sample, processor):
            raise ValueError(f"{error}: {found}.") from error
        raise
    embeddings: Any = model.get_input_embeddings()
    highest, known = int(inputs["input_ids"].max()), embeddings.weight.shape[0]
    if highest >= known:
        problem = f"{name} writes the token {highest}, but the model knows {known} tokens"
        raise ValueError(f"{sample.origin}: {problem}: {_OWN} (tokenizer.json).")
    try:
        features = count_features(model, inputs)
    except ValueError as error:
        raise ValueError(
            f"{sample.origin}: the model refuses the picture that {name} made "
            f"({first_line(error)}): {_OWN} "
            "(size and crop_size in processor_config.json or preprocessor_config.json)."
        ) from error
    tokens = count_placeholders(model, inputs)
    if None not in (tokens, features) and tokens != features:
        found = _find_settings(model, sample, processor) or _OWN
        raise ValueError(
            f"{sample.origin}: {name} writes {tokens} image tokens, but the model makes {features} "
            f"features: {found}."
        )


def pictured(samples: Sequence[Sample]) -> Sample:
    """The first sample with a picture, or the first."""
    return next((sample for sample in samples if sample.pictures()), samples[0])


def sample_of_noise() -> Sample:
    """A question about a picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    content = [
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "text", "text": "What is in this picture?"},
    ]
    return Sample(messages=({"role": "user", "content": content},), origin="a test picture")


def _make_inputs(sample: Sample, processor: Any) -> dict[str, torch.Tensor]:
    with torch.device("cpu"):  # from_pretrained makes "meta" the default while it builds the model
        return collate([sample], processor).inputs


def count_placeholders(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> int | None:
    """Image tokens in the text of a batch; None if the model does not name the token."""
    token = getattr(model.config, "image_token_id", None)
    return None if token is None else int((inputs["input_ids"] == token).sum())


def count_features(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> int | None:
    """What the model makes of a batch's pictures; None without any, or if it cannot be asked.

    Raises:
        ValueError: the model refuses the picture.
    """
    if "pixel_values" not in inputs:
        return None
    text = ("input_ids", "attention_mask", "pixel_values")
    rest = {key: value for key, value in inputs.items() if key not in text}
    try:
        ask: Any = getattr(model, "get_image_features", None) or model.base_model.get_image_features
        with torch.no_grad(), torch.device(model.device):
            output = ask(inputs["pixel_values"].to(model.device, model.dtype), **rest)
        return count_rows(output) or None
    except ValueError:
        raise
    except Exception:  # of a family, or a device, that this cannot be asked of
        return None


def usual_picture(config: Any) -> torch.Tensor | None:
    """A picture of the configured size, [1, 3, height, width] on "meta"; None: sizes are free."""
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(1, 3, height, width, device="meta")


def _find_settings(model: PreTrainedModel, sample: Sample, processor: Any) -> str | None:
    """Settings with which the processor fits, as they were tried; None if there are none."""
    config = model.config
    asked = {
        "patch_size": getattr(getattr(config, "vision_config", None), "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    changes = {
        name: value for name, value in asked.items()
        if value is not None and hasattr(processor, name) and getattr(processor, name) != value
    }  # fmt: skip
    extra = "num_additional_image_tokens"  # 1 where the encoder has a class token
    for change in (changes, changes | {extra: 1}, changes | {extra: 0}):
        twin = copy.copy(processor)
        try:
            for name, value in change.items():
                setattr(twin, name, value)
            inputs = _make_inputs(sample, twin)
            if count_placeholders(model, inputs) == count_features(model, inputs):
                shown = ", ".join(
                    f"{json.dumps(name)}: {json.dumps(value)}" for name, value in change.items()
                )
                return (
                    f"set {shown} in the model's processor_config.json, or the same on the "
                    "processor"
                )
        except Exception:
            continue  # no remedy
    return None
