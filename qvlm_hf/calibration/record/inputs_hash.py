"""What a calibration is made from: a stopped one goes on from the same alone."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.record.provenance import versions
from qvlm_hf.calibration.record.report import settings_dict
from qvlm_hf.calibration.samples import Batch, Sample, fingerprint
from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["made_from", "other_origin"]

_FORMAT = 4  # of kept steps


def made_from(
    model: nn.Module,
    settings: CalibrationSettings,
    samples: Sequence[Sample],
    data: Iterable[Batch],
) -> dict[str, Any]:
    """All that the bits of a result depend on, ready for JSON."""
    parameter = next(model.parameters())
    return {
        "format": _FORMAT,
        "settings": settings_dict(settings),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "processes": ranks.world_size(),
        "device": _device_name(parameter.device),
        "model": _hash_tensors(chain(model.named_parameters(), model.named_buffers())),
        "samples": fingerprint(samples),
        "inputs": _hash_tensors(
            (name, tensor)
            for batch in data
            for name, tensor in (*sorted(batch.inputs.items()), ("labels", batch.labels))
        ),
    }


_WORDS = {
    "format": "another version of qvlm_hf",
    "model": "another model",
    "samples": "other samples",
    "inputs": "another processor",
}


def other_origin(found: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    """What another calibration was made from than this one, in words; None if nothing."""
    for key, here in origin.items():
        there = found.get(key)
        if there == here:
            continue
        pairs = {key: (there, here)}
        if isinstance(here, dict) and isinstance(there, dict):
            pairs = {name: (there.get(name), here.get(name)) for name in {**there, **here}}
        differ = [
            f"{name} {_shown(old)} instead of {_shown(new)}"
            for name, (old, new) in pairs.items()
            if old != new
        ]
        return _WORDS.get(key, " and ".join(differ))
    return None


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if tensor.is_meta:  # which calibration refuses
            continue
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
