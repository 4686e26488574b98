"""The calibration that a `QVLMConfig` asks for: samples, read before any weight, and the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qvlm_hf.calibration.process.progress import ProgressBar, planned_steps
from qvlm_hf.calibration.process.scratch import check_scratch_dir, scratch
from qvlm_hf.calibration.record.report import CalibrationReport
from qvlm_hf.calibration.record.resume import check_resume_dir, telling_how_to_go_on
from qvlm_hf.calibration.samples import (
    Sample,
    dataset_name,
    hold_out,
    load_samples,
    longest_sample,
    without_too_long,
)
from qvlm_hf.calibration.samples.synthetic import SYNTHETIC, synthesize
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.models.families import check_row
from qvlm_hf.quantize import CHECK_SAMPLES, quantize_with_data, quantize_without_data

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = ["calibrate", "read_samples"]


def read_samples(config: QVLMConfig) -> list[Sample] | None:
    """Reads the samples, a few more than asked for: they check the result.

    Returns:
        None without a dataset, or where the model draws it.

    Raises:
        ValueError: the scheme needs data and there is none, the processor is missing, `resume_dir`
            or `scratch_dir` is of no use, a sample is wrong, or gradients are forbidden.
    """
    if config.dataset is None:
        if config.settings().needs_data:
            raise ValueError(
                f"scheme={config.scheme!r} has activation ranges to calibrate: give samples "
                "(dataset='samples.jsonl'), or take activation_granularity='dynamic_token' or "
                "16-bit activations, which need no data."
            )
        config.settle_without_data()
        return None
    if config.processor is None:
        raise ValueError(
            "dataset needs the model's processor: pass QVLMConfig(..., "
            "processor=AutoProcessor.from_pretrained(model_id))."
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "calibration takes gradients, which torch.inference_mode() forbids: quantize outside "
            "of it."
        )
    if config.resume_dir is not None:
        check_resume_dir(config.resume_dir)
    if config.scratch_dir is not None:
        check_scratch_dir(config.scratch_dir)
    if config.dataset == SYNTHETIC:
        return None
    count = config.num_samples + CHECK_SAMPLES
    return load_samples(config.dataset, num_samples=count, seed=config.seed)


def calibrate(
    model: PreTrainedModel,
    config: QVLMConfig,
    samples: Sequence[Sample] | None,
    expected: Mapping[str, float] | None = None,
) -> tuple[CalibrationReport, list[Sample]]:
    """Quantizes a loaded model in place, with data or without.

    Returns the report, and the samples that the model has positions for.
    """
    if config.dataset is None:
        return quantize_without_data(model, config.settings()), []
    check_row(model)
    if config.dataset == SYNTHETIC:
        count = config.num_samples + CHECK_SAMPLES
        samples = synthesize(model, config.processor, count, seed=config.seed)
    fitting = without_too_long(samples or (), config.processor, longest_sample(model))
    chosen, held_out = hold_out(fitting, config.num_samples, config.seed)
    folder = None if config.resume_dir is None else check_resume_dir(config.resume_dir)
    files = None if config.scratch_dir is None else check_scratch_dir(config.scratch_dir)
    settings = config.settings()
    callbacks = config.callbacks or (ProgressBar(planned_steps(settings), expected=expected),)
    with telling_how_to_go_on(folder), scratch(files):
        report = quantize_with_data(
            model, settings, chosen, config.processor,
            held_out=held_out, callbacks=callbacks, resume_dir=folder,
        )  # fmt: skip
    if report.recipes:  # config.json holds what was taken
        config.update(recipe="fixed", **report.recipes[0].fields)
    dataset = {"dataset": dataset_name(config.dataset)}
    return replace(report, provenance=dataset | report.provenance), fitting
