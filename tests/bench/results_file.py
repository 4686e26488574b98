"""What the programs share: options, rows of an earlier run, a line through points, the file."""

import argparse
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.memory import status_bytes


def options_of(program: str, rounds: int) -> argparse.ArgumentParser:
    """--threads, --rounds and --json, under the program's own docstring."""
    parser = argparse.ArgumentParser(
        description=program, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path)
    return parser


def options_of_accuracy(program: str, seeds: int = 3) -> argparse.ArgumentParser:
    """A model with its data, how many samples judge, and --json."""
    parser = argparse.ArgumentParser(
        description=program, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", help="folder of calibration.jsonl and test.jsonl (the model's)")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--json", type=Path)
    return parser


def machine() -> dict[str, Any]:
    """Where a figure comes from."""
    return {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same `--json`, which are not measured again."""
    return json.loads(path.read_text())["rows"] if path and path.exists() else []


def write(path: Path | None, **result: object) -> None:
    """Where --json was given: the machine and the result."""
    if path is not None:
        path.write_text(json.dumps(machine() | result, indent=1) + "\n")


def line(counts: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Least squares: the value at 0, and what each adds."""
    x = torch.tensor([[1.0, count] for count in counts], dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    base, slope = torch.linalg.lstsq(x, y).solution.flatten().tolist()
    return base, slope


@contextmanager
def highest(*fields: str, every: float = 0.002) -> Iterator[dict[str, int]]:
    """Inside, the highest bytes of fields of this process's status, looked at every few seconds."""
    found, stop = dict.fromkeys(fields, 0), threading.Event()

    def watch() -> None:
        while not stop.wait(every):
            for field in fields:
                found[field] = max(found[field], status_bytes(field) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
