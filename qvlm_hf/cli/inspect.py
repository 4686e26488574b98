"""`qvlm inspect MODEL`: what was quantized of a saved model, or would be of any configuration."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvlm_hf.bench.shapes import SHAPES
from qvlm_hf.cli.loading import silence
from qvlm_hf.cli.shapes import plan, read_shape
from qvlm_hf.cli.story import story
from qvlm_hf.hf.config import QVLMConfig
from qvlm_hf.hub.saved import REPORT_NAME, SavedModel, as_damaged_report, empty_model
from qvlm_hf.models.families import has_row
from qvlm_hf.models.folds import why_not_rotatable
from qvlm_hf.nn.footprint import footprint

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add, shapes = parser.add_argument, ", ".join(SHAPES)
    model = "a saved quantized model; or a config.json, its directory or a Hub id, to plan and size"
    add("model", nargs="?", metavar="MODEL", help=model)
    add("--shape", metavar="NAME", help=f"the same, or one of {shapes}")
    scheme = "to plan: bits of weights and activations (default: W4A4; without a row W4A16)"
    add("--scheme", nargs="+", metavar="S", help=scheme)
    group = "to plan: inputs per weight scale (default: 128)"
    add("--group-size", type=int, metavar="N", help=group)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if (options.model is None) == (options.shape is None):
        raise ValueError("name either a MODEL or a --shape: see qvlm inspect --help.")
    silence()
    name = options.model if options.shape is None else options.shape
    config = read_shape(name)
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        _print_plan(name, config, options.scheme, options.group_size)
        return 0
    asked = {"--scheme": options.scheme, "--group-size": options.group_size}
    if given := ", ".join(option for option, value in asked.items() if value is not None):
        raise ValueError(f"{given}: is to plan, {name} has its own: leave it out.")
    path = Path(name)
    _print_saved(path.parent if path.is_file() else path)
    return 0


def _print_plan(
    name: str, config: Any, schemes: Sequence[str] | None, group_size: int | None
) -> None:
    """What would be quantized of a model, what cannot be done, and its size in every scheme."""
    model = empty_model(config)
    known = has_row(model)
    schemes = schemes or ["W4A4" if known else "W4A16"]
    plans = [plan(model, scheme, group_size=group_size) for scheme in schemes]
    count = len(plans[0].report.modules)
    print(f"{name}, a {config.model_type!r} model: {count} linear modules to quantize")
    for segment in plans[0].segments:
        sites = len(segment.sites)
        layers = f"{len(segment.layers)} layer{'s' if len(segment.layers) > 1 else ''}"
        print(f"{segment.component}: {layers}, {sites} site{'s' if sites > 1 else ''}")
        if segment.packed:
            print(f"{segment.component}: no ranges per position, pictures stand in one row")
    for line in story(plans[0].report):
        print(line)
    if known:
        print(f"rotation: {why_not_rotatable(model) or 'can be folded in'}")
    else:
        print("no calibration, rotation or equalization; at most these modules, as a run will tell")
    for scheme, one in zip(schemes, plans, strict=True):
        print(f"{scheme.upper()}, group size {one.report.settings['group_size']}, against bfloat16")
        print(footprint(model, one.report.modules))


def _print_saved(directory: Path) -> None:
    saved = SavedModel(directory)
    config = QVLMConfig.from_dict(saved.quantization)
    print(
        f"{config.scheme}, {len(config.modules)} modules quantized, "
        "sizes against full precision in the same dtype"
    )
    print(saved.sizes(saved.dtype))
    kinds = Counter(
        (f"W{s.weight_bits}A{s.activation_bits}", s.granularity) for s in config.modules.values()
    )
    for (bits, granularity), count in sorted(kinds.items()):
        print(f"{count:5} modules {bits}, activations {granularity}")
    if (saved.folder / REPORT_NAME).is_file():
        report = saved.report
        with as_damaged_report(ValueError):  # of names that no segment holds
            lines = list(story(report))
        print(*lines, sep="\n")
