"""`qvlm export DIR --format compressed-tensors --output DIR2`."""

import argparse
from collections import Counter

from qvlm_hf.cli.models import silence
from qvlm_hf.export.checkpoint import EXPORT_FORMATS, export

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("directory", metavar="DIR", help="a saved quantized model")
    parser.add_argument(
        "--format",
        default=EXPORT_FORMATS[0],
        choices=EXPORT_FORMATS,
        help=f"to write (default: {EXPORT_FORMATS[0]})",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where to save the result")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result in the output directory"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    silence()
    exported = export(
        options.directory, options.output, format=options.format, overwrite=options.overwrite
    )
    kinds = Counter(exported.modules.values())
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1]):
        groups = (
            "one scale per output"
            if kind.group_size == -1
            else f"a scale per {kind.group_size} inputs"
        )
        inputs = "8 bits per token" if kind.quantized_input else "floating point"
        print(
            f"{count:5} modules {kind.format}: {kind.weight_bits} bits, {groups}, inputs {inputs}"
        )
    print(
        f"{len(exported.full_precision):5} linear modules in full precision; saved in "
        f"{exported.path.name}"
    )
    return 0
