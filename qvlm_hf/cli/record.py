"""What `--record` keeps of a measurement: the result, what it was measured on and with, and the command, all without paths."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qvlm_hf.bench.machine import device_name
from qvlm_hf.calibration.provenance import versions
from qvlm_hf.calibration.samples import dataset_name
from qvlm_hf.evaluation import Evaluation

__all__ = ["benchmark_entry", "evaluation_entry", "model_label", "shown_command"]


def evaluation_entry(
    result: Evaluation,
    *,
    dataset: str,
    seed: int,
    batch_size: int,
    reference: str | None,
    command: str,
) -> dict[str, Any]:
    """The section "evaluation" of qvlm_report.json.

    Args:
        result: of the model, compared with full precision if that was measured.
        dataset: as the user gave it.
        seed: of the choice of questions.
        batch_size: questions per forward pass.
        reference: directory or Hub id of the full-precision model, or None.
        command: that repeats it.
    """
    found = result.to_dict()
    return {
        "dataset": dataset_name(dataset), "questions": len(result.correct), "sha256": result.data_fingerprint, "seed": seed,
        "batch_size": batch_size, "reference": None if reference is None else model_label(reference),
        **{key: found[key] for key in ("accuracy", "by_kind", "comparison")},
        "device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "versions": versions(), "command": command,
    }  # fmt: skip


def benchmark_entry(result: Mapping[str, Any], *, command: str) -> dict[str, Any]:
    """The section "benchmark" of qvlm_report.json: what `qvlm bench` measured; of an error only its kind, because its text may hold paths.

    Args:
        result: of `bench_models`.
        command: that repeats it.
    """
    rows = [
        row | {"error": None if row["error"] is None else row["error"].partition(":")[0]}
        for row in result["rows"]
    ]
    return {**result, "rows": rows, "command": command}


def model_label(model: str | Path) -> str:
    """A directory's own name, or a Hub id as it is."""
    return Path(model).resolve().name if Path(model).exists() else str(model)


def shown_command(
    command: str,
    directory: str | Path,
    *,
    dataset: str | None = None,
    against: str | None = None,
    **options: Any,
) -> str:
    """A command line that means the same elsewhere.

    Args:
        command: of qvlm.
        directory: of the quantized model.
        dataset: test questions, or None.
        against: full-precision model, or None.
        **options: name -> value; None and False are left out, True is a flag.
    """
    words = ["qvlm", command, model_label(directory)]
    words += [] if dataset is None else ["--dataset", dataset_name(dataset)]
    words += [] if against is None else ["--against", model_label(against)]
    for name, value in options.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
