"""`qvlm export DIR --format compressed-tensors --output DIR2`."""

import argparse
import shlex
from collections import Counter

from qvlm_hf.cli.loading import silence
from qvlm_hf.export.checkpoint import EXPORT_FORMATS, export

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add, default = parser.add_argument, EXPORT_FORMATS[0]
    add("directory", metavar="DIR", help="a saved quantized model")
    formats = f"to write (default: {default})"
    add("--format", default=default, choices=EXPORT_FORMATS, help=formats)
    add("--output", required=True, metavar="DIR", help="where to save the result")
    overwrite = "replace an earlier result in the output directory"
    add("--overwrite", action="store_true", help=overwrite)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    silence()
    exported = export(
        options.directory, options.output, format=options.format, overwrite=options.overwrite
    )
    for kind, count in Counter(exported.modules.values()).most_common():
        size = kind.group_size
        groups = "one scale per output" if size == -1 else f"a scale per {size} inputs"
        inputs = "8 bits per token" if kind.quantized_input else "floating point"
        bits = f"{kind.weight_bits} bits, {groups}, inputs {inputs}"
        print(f"{count:5} modules {kind.format}: {bits}")
    left, place = len(exported.full_precision), shlex.quote(options.output)
    print(f"{left:5} linear modules in full precision; saved in {place}")
    return 0
