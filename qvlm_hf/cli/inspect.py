"""`qvlm inspect DIR` and `qvlm inspect --shape NAME --scheme W4A4`."""

import argparse
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from qvlm_hf.bench.shapes import SHAPES, shape_model, token_positions
from qvlm_hf.cli.models import silence
from qvlm_hf.cli.story import story
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hf.round_on_load import planned_modules
from qvlm_hf.hub.contents import REPORT_NAME, read_report_file
from qvlm_hf.nn.footprint import Footprint, footprint

__all__ = ["add_arguments", "run", "saved_footprint"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add, shapes = parser.add_argument, ", ".join(SHAPES)
    add("directory", nargs="?", metavar="DIR", help="a saved quantized model")
    add("--shape", metavar="NAME", help=f"size a model by name instead: {shapes}")
    add("--scheme", help="for --shape: bits of weights and activations (default: W4A4)")
    group = "for --shape: inputs per weight scale (default: 128)"
    add("--group-size", type=int, metavar="N", help=group)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if (options.directory is None) == (options.shape is None):
        raise ValueError("name either a directory or a --shape: see qvlm inspect --help.")
    asked = {name: getattr(options, name) for name in ("scheme", "group_size")}
    asked = {name: value for name, value in asked.items() if value is not None}
    silence()
    if options.shape is not None:
        _print_shape(options.shape, QVLMConfig(**{"scheme": "W4A4", **asked}))
        return 0
    if asked:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise ValueError(f"{given}: is for --shape, {options.directory} has its own: leave it out.")
    _print_saved(options.directory)
    return 0


def _print_shape(shape: str, config: QVLMConfig) -> None:
    model = shape_model(shape)
    modules, positions = planned_modules(model, config.settings()), token_positions(model.config)
    print(f"{shape}, {config.scheme}, group size {config.group_size}, against bfloat16")
    print(footprint(model, modules, positions=positions))


def _print_saved(directory: str) -> None:
    config, sizes = saved_footprint(directory)
    print(
        f"{config.scheme}, {len(config.modules)} modules quantized, "
        "sizes against full precision in the same dtype"
    )
    print(sizes)
    kinds = Counter(
        (f"W{s.weight_bits}A{s.activation_bits}", s.granularity) for s in config.modules.values()
    )
    for (bits, granularity), count in sorted(kinds.items()):
        print(f"{count:5} modules {bits}, activations {granularity}")
    report = Path(directory) / REPORT_NAME
    if report.is_file():
        for line in story(read_report_file(report)):
            print(line)


def saved_footprint(directory: str) -> tuple[QVLMConfig, Footprint]:
    """The configuration of a saved quantized model, and its bytes counted from shapes.

    Raises:
        ValueError: the directory holds no qvlm model.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{directory}: holds no config.json: name the directory of a saved model.")
    config = AutoConfig.from_pretrained(directory)
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict) or saved.get("quant_method") != "qvlm":
        raise ValueError(
            f"{directory}: is not quantized by qvlm_hf: "
            "name the directory that qvlm quantize wrote."
        )
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    quantization, dtype = QVLMConfig.from_dict(saved), config.dtype or torch.float32
    modules = quantization.modules
    needed = any(scheme.granularity == "token" for scheme in modules.values())
    positions = token_positions(config) if needed else None
    return quantization, footprint(model, modules, positions=positions, dtype=dtype)
