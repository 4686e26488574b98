"""Where a result comes from, for config.json and the report: samples, seed, versions."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.samples import Batch, Sample, fingerprint
from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["provenance", "versions"]


def provenance(
    samples: Sequence[Sample], data: Sequence[Batch], settings: CalibrationSettings
) -> dict[str, Any]:
    """Counts and hash of the samples, seed, threads and processes (which split sums), versions."""
    return {
        "samples": len(samples),
        "images": sum(len(sample.images()) for sample in samples),
        "tokens": sum(int(batch.inputs["attention_mask"].sum()) for batch in data),
        "sha256": fingerprint(samples),
        "seed": settings.seed,
        "threads": torch.get_num_threads(),
        **({"processes": ranks.world_size()} if ranks.world_size() > 1 else {}),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape a result."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("qvlm_hf", "torch", "transformers")},
    }
