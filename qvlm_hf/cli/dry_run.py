"""`qvlm quantize MODEL --dry-run`: what quantizing takes, told before any weight is read."""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.bench.shapes import SHAPES
from qvlm_hf.cli.loading import load_processor, make_config, read_full_precision, silence
from qvlm_hf.cli.shapes import read_shape
from qvlm_hf.hf.calibrate import read_samples
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.preflight import Expected, check_disk, check_memory, expect, gigabytes
from qvlm_hf.hf.saving import check_output
from qvlm_hf.hub.saved import empty_model

__all__ = ["check_room", "dry_run"]


def check_room(options: argparse.Namespace, config: QVLMConfig) -> None:
    """Checks that the result, and what --resume keeps beside it, fit on the disk of --output.

    Raises:
        ValueError: they do not.
    """
    size, what = 0.0, "the result"
    with suppress(ValueError, OSError):  # told where the model is loaded
        expected = expect(_empty(options), config)
        size = expected.result
        if options.resume:
            size, what = size + expected.kept, f"{what} and the steps to resume from"
    check_disk(size, options.output, what)


def _empty(options: argparse.Namespace) -> Any:
    """The model in the dtype of the run, on the meta device."""
    name = options.model
    kind = read_shape(name) if name in SHAPES else read_full_precision(name, options.revision)
    asked = (kind.dtype or torch.bfloat16) if options.dtype == "auto" else options.dtype
    return empty_model(kind).to(asked if isinstance(asked, torch.dtype) else getattr(torch, asked))


def dry_run(options: argparse.Namespace) -> int:
    """Runs `qvlm quantize` with --dry-run.

    Raises:
        ValueError: as the run itself would before it reads a weight, memory and disk included.
    """
    silence()
    if options.output is not None:
        check_output(options.output, overwrite=options.overwrite)
    config, samples = make_config(options), None
    if config.dataset is not None:
        if options.model in SHAPES:
            raise ValueError(
                f"--dataset: {options.model} is a shape without a processor that could read it: "
                f"leave it out, or give a model."
            )
        model = Path(options.model)  # a config.json lies beside its processor
        place = str(model.parent) if model.is_file() else options.model
        config.processor = load_processor(place, options.revision)
        samples = read_samples(config)
    expected = expect(_empty(options), config, samples)
    print(f"{options.model}, {config.scheme}, on this machine")
    source = "assumed, --dataset counts them" if samples is None else "counted"
    for line in _lines(expected, source):
        print(line)
    if warning := check_memory(expected):
        print(f"warning: {warning}")
    if options.output is not None:
        check_disk(expected.result, options.output, "the result")
    return 0


def _lines(expected: Expected, source: str) -> Iterator[str]:
    whole = sum(expected.seconds.values())
    named = ((name, own) for name, own in expected.seconds.items() if name != "other")
    longest = sorted(named, key=lambda pair: -pair[1])[:4]
    shares = ", ".join(f"{name} {own / whole:.0%}" for name, own in longest)
    yield f"time    {expected.duration}; of it {shares}"
    if expected.data is not None:
        tokens = ", ".join(f"{name} {count:.0f}" for name, count in expected.data.tokens.items())
        yield f"        {expected.data.samples} samples; tokens of each: {tokens} ({source})"
    weights = f"{gigabytes(expected.weights)} of weights mapped from files"
    yield f"memory  {gigabytes(expected.memory)} at the peak, besides {weights}"
    if scratch := expected.held.kept:
        working = f"{gigabytes(expected.held.working)} with scratch files"
        yield f"        {working} of {gigabytes(scratch)} (--scratch-dir)"
    yield f"        {gigabytes(expected.device)} of a GPU's, where the model is on one"
    kept = f", {gigabytes(expected.kept)} to resume from" if expected.kept else ""
    yield f"disk    {gigabytes(expected.result)} for the result{kept}"
