"""Keeping a measurement: the file of `--json`, and the sections that `--record` adds to a model."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from qvlm_hf.bench.machine import device_name
from qvlm_hf.calibration.record.provenance import versions
from qvlm_hf.calibration.samples import dataset_name
from qvlm_hf.evaluation import Evaluation, TextEvaluation

__all__ = [
    "benchmark_entry",
    "check_result_file",
    "evaluation_entry",
    "shown_command",
    "write_result_file",
]

# Keys of a result of `qvlm evaluate` and of `qvlm bench`, of any version.
_KEYS = ({"accuracy", "questions"}, {"threads", "versions", "rows"})


def check_result_file(name: str) -> None:
    """Checks that `--json name` can be written, before hours of measuring.

    Nothing is opened: that would empty a file and end a pipe.

    Raises:
        ValueError: it is a directory, holds something else than an earlier result or may not be
            written, or its directory does not exist or takes no such file.
    """
    try:
        path = Path(name).resolve()
        if path.is_dir():
            raise ValueError(f"--json {name}: is a directory: name a file.")
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"--json {name}: may not be written: name another file.")
        if path.is_file() and not _is_result(path):
            raise ValueError(
                f"--json {name}: holds no earlier result, so it is not replaced: name another file."
            )
        if path.is_file() or not path.exists():  # else a pipe or a device
            trial = _partial(path) if path.exists() else path
            trial.touch(exist_ok=False)
            trial.unlink()
    except FileNotFoundError:
        raise ValueError(
            f"--json {name}: the directory does not exist: create it or name another."
        ) from None
    except OSError as error:
        raise ValueError(
            f"--json {name}: cannot be written ({error.strerror}): name another file."
        ) from error


def write_result_file(name: str, result: dict[str, Any]) -> None:
    """Writes a result as JSON into a file that passed `check_result_file`, all or nothing.

    Raises:
        OSError: it cannot be written; an earlier result stays.
    """
    path, text = Path(name).resolve(), json.dumps(result, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text, encoding="utf-8")
        return
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def evaluation_entry(
    result: Evaluation,
    *,
    dataset: str,
    seed: int,
    batch_size: int,
    reference: str | None,
    command: str,
    reference_quantized: bool = False,
    text: tuple[str, TextEvaluation] | None = None,
) -> dict[str, Any]:
    """The section "evaluation" of qvlm_report.json, without paths.

    Args:
        result: what was measured.
        dataset: of the questions.
        seed: of their choice.
        batch_size: questions per forward pass.
        reference: name of the model that it was compared with.
        command: from `shown_command`.
        reference_quantized: whether that model is no full-precision one.
        text: a file of plain text, and what was measured on it.
    """
    found = result.to_dict()
    return {
        "dataset": dataset_name(dataset),
        "questions": len(result.correct),
        "sha256": result.data_fingerprint,
        "seed": seed,
        "batch_size": batch_size,
        "reference": None if reference is None else _model_label(reference),
        "reference_quantized": reference_quantized,
        **{key: found[key] for key in ("accuracy", "by_kind", "comparison")},
        "text": None if text is None else {"file": dataset_name(text[0]), **text[1].to_dict()},
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": command,
    }


def benchmark_entry(result: Mapping[str, Any], *, command: str) -> dict[str, Any]:
    """The section "benchmark" of qvlm_report.json: the result of `bench_models`, without paths.

    Of an error only the kind stays, because its text may hold paths.
    """
    rows = [
        row | {"error": row["error"] and row["error"].partition(":")[0]} for row in result["rows"]
    ]
    return {**result, "rows": rows, "command": command}


def shown_command(command: str, directory: str | Path, **options: Any) -> str:
    """A command line that means the same elsewhere: names instead of paths.

    Options of None and False are left out, True is a flag.
    """
    words = ["qvlm", command, _model_label(directory)]
    labels = {"dataset": dataset_name, "text": dataset_name, "against": _model_label}
    for name, value in options.items():
        if value is not None and value is not False:
            value = labels[name](value) if name in labels else value
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _model_label(model: str | Path) -> str:
    """A directory's own name, or a Hub id as it is."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def _partial(path: Path) -> Path:
    return path.with_name(f".qvlm-{uuid4().hex[:8]}")


def _is_result(path: Path) -> bool:
    """Whether a file is empty or a result of ours."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text else None
    except (ValueError, RecursionError):  # the latter for JSON nested very deep
        return False
    return not text or (isinstance(content, dict) and any(keys <= content.keys() for keys in _KEYS))
