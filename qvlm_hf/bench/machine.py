"""Limits of the machine, as PyTorch reaches them: reading memory, multiplying matrices."""

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qvlm_hf.calibration.process.capacity import free_memory

__all__ = [
    "Clock",
    "Limits",
    "Reading",
    "available_bytes",
    "device_name",
    "has_bfloat16_units",
    "measure_limits",
]

_TRIES = 5
_ROW = 4096  # inputs of the matrix that is read to find the bandwidth
_COPIED = 2**30  # bytes; beyond the cache of any GPU
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Measured maxima of one device."""

    bandwidth: float  # bytes per second that a CPU reads, or that a GPU's copy reads and writes
    operations: dict[str, float]  # type -> multiplications and additions per second; see `_TYPES`

    def highest(self, other: "Limits") -> "Limits":
        """The higher of two measurements, one by one: other programs only ever take away."""
        operations = {
            name: max(rate, other.operations.get(name, 0)) for name, rate in self.operations.items()
        }
        return Limits(bandwidth=max(self.bandwidth, other.bandwidth), operations=operations)


class Clock:
    """Marks on a device's time line: the processor's counter, or an event of a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """This moment."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Returns when the device has done all its work."""
        if self._cuda:
            torch.cuda.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        """From one mark to another; on CUDA after `wait`."""
        return first.elapsed_time(last) / 1e3 if self._cuda else last - first


def measure_limits(device: torch.device, *, size: int | None = None) -> Limits:
    """Measures the limits of `device`; seconds on a CPU.

    `size` is the side of the matrices: 2048 on a CPU, 8192 on a GPU.
    """
    side = size or (8192 if device.type == "cuda" else 2048)
    clock, operations = Clock(device), {}
    for name, dtype in _TYPES.items():
        a, b = torch.randint(-100, 100, (2, side, side), device=device, dtype=torch.int8).to(dtype)
        multiply = (
            partial(torch._int_mm, a, b.T) if name == "int8" else partial(functional.linear, a, b)
        )
        with suppress(RuntimeError, NotImplementedError):
            operations[name] = 2 * side**3 / _fastest(multiply, clock)
    return Limits(bandwidth=_bandwidth(device, clock), operations=operations)


class Reading:
    """Reads memory with all threads, as fast as PyTorch can.

    Args:
        size: bytes to read, more than the caches hold.
    """

    def __init__(self, size: int = 2**28) -> None:
        self._size = size
        integers = torch.ones(size // 8, dtype=torch.int64)
        matrix, vector = torch.ones(size // 4 // _ROW, _ROW), torch.ones(1, _ROW)
        # both: on one machine a sum stopped at 17.7 GB/s where the product read 24.5
        self._reads = integers.sum, partial(functional.linear, vector, matrix)

    def bandwidth(self) -> float:
        """Bytes per second, now: the better of a sum and a matrix-vector product."""
        best = float("inf")
        for read in self._reads:
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
        return self._size / best


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":", 1)[1].strip() for line in _proc("cpuinfo", "model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; a CPU that converts is faster in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = {word for line in _proc("cpuinfo", "flags", "Features") for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def available_bytes(device: torch.device) -> float:
    """Memory that a model may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def _bandwidth(device: torch.device, clock: Clock) -> float:
    if device.type != "cuda":
        reading = Reading()
        return max(reading.bandwidth() for _ in range(_TRIES))
    source = torch.ones(_COPIED // 4, device=device)
    return 2 * _COPIED / _fastest(partial(torch.empty_like(source).copy_, source), clock)


def _fastest(run: Callable[[], object], clock: Clock) -> float:
    """Seconds, the best of some tries after one that warms up."""
    run()
    best = float("inf")
    for _ in range(_TRIES):
        clock.wait()
        first = clock.mark()
        run()
        last = clock.mark()
        clock.wait()
        best = min(best, clock.seconds(first, last))
    return best


def _proc(file: str, *beginnings: str) -> list[str]:
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(beginnings)]
