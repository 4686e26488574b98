"""The options that the programs share, and the file that they write."""

import argparse
import json
from pathlib import Path

import torch

from qvlm_hf.bench.machine import device_name


def options_of(program: str, rounds: int) -> argparse.ArgumentParser:
    """--threads, --rounds and --json, under the program's own docstring."""
    parser = argparse.ArgumentParser(
        description=program, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path)
    return parser


def write(path: Path | None, **result: object) -> None:
    """Where --json was given: the machine and the result."""
    if path is not None:
        machine = {
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        path.write_text(json.dumps(machine | result, indent=1) + "\n")
