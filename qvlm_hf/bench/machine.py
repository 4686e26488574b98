"""What the machine can do at most, measured in the same run as everything that is compared with it: reading memory, multiplying matrices.

Left out: data sheets. A limit here is what PyTorch reaches on this machine with these threads.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

__all__ = [
    "Clock",
    "Limits",
    "Reading",
    "available_bytes",
    "device_name",
    "has_bfloat16_units",
    "measure_limits",
    "read_bandwidth",
]

_TRIES = 5
_ROW = 4096  # inputs of the matrix that is read to find the bandwidth
_COPIED = 2**30  # bytes; beyond the cache of any GPU
_INT8 = "int8"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Measured maxima of one device.

    Attributes:
        bandwidth: bytes per second. CPU: reading with all threads (`read_bandwidth`); CUDA: reading
            and writing of a copy, together.
        operations: "bfloat16", "float32", "int8" -> multiplications and additions per second of
            PyTorch's own product of large matrices; a type that it cannot multiply is absent.
    """

    bandwidth: float
    operations: dict[str, float]

    def highest(self, other: "Limits") -> "Limits":
        """The higher of two measurements, one by one: other programs only ever take away."""
        operations = {
            name: max(self.operations[name], other.operations.get(name, 0))
            for name in self.operations
        }
        return Limits(bandwidth=max(self.bandwidth, other.bandwidth), operations=operations)


class Clock:
    """Marks on the time line of a device: the processor's counter, or an event in a GPU's stream, which nobody waits for.

    Args:
        device: whose time.
    """

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
        """Returns when the device has done all that it was given."""
        if self._cuda:
            torch.cuda.synchronize()

    def seconds(self, first: Any, last: Any) -> float:
        """From one mark to another; on CUDA after `wait`."""
        return first.elapsed_time(last) / 1e3 if self._cuda else last - first


def measure_limits(device: torch.device, *, size: int | None = None) -> Limits:
    """Measures the limits of `device`; seconds on a CPU.

    Args:
        device: CPU or CUDA.
        size: side of the matrices; default: 2048 on a CPU, 8192 on a GPU.
    """
    side = size or (8192 if device.type == "cuda" else 2048)
    clock, operations = Clock(device), {}
    for name, dtype in (
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        (_INT8, torch.int8),
    ):
        a, b = (
            torch.randint(-100, 100, (side, side), device=device, dtype=torch.int8).to(dtype)
            for _ in range(2)
        )
        product = torch._int_mm if name == _INT8 else functional.linear
        b = b.T if name == _INT8 else b
        try:
            seconds = _best(partial(product, a, b), clock)
            operations[name] = 2 * side**3 / seconds
        except (RuntimeError, NotImplementedError):
            continue
    return Limits(
        bandwidth=_copy_bandwidth(device, clock) if device.type == "cuda" else read_bandwidth(),
        operations=operations,
    )


class Reading:
    """Reads memory with all threads, as fast as PyTorch can.

    Args:
        size: bytes to read, more than the caches hold.
    """

    def __init__(self, size: int = 2**28) -> None:
        self._size = size
        self._integers = torch.ones(size // 8, dtype=torch.int64)
        self._matrix, self._vector = torch.ones(size // 4 // _ROW, _ROW), torch.ones(1, _ROW)

    def bandwidth(self) -> float:
        """Bytes per second, now: the better of a sum and a matrix-vector product.

        Neither alone: on one machine a sum stopped at 17.7 GB/s where the product read 24.5.
        """
        best = float("inf")
        for read in (self._integers.sum, partial(functional.linear, self._vector, self._matrix)):
            start = time.perf_counter()
            read()
            best = min(best, time.perf_counter() - start)
        return self._size / best


def read_bandwidth() -> float:
    """Bytes per second at which all threads together read memory: the best of five readings."""
    reading = Reading()
    return max(reading.bandwidth() for _ in range(_TRIES))


def device_name(device: torch.device) -> str:
    """The processor's or the GPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _proc("cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; a CPU without such units converts, and is faster in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = {
        word
        for line in _proc("cpuinfo")
        if line.startswith(("flags", "Features"))
        for word in line.split()
    }
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def available_bytes(device: torch.device) -> int | None:
    """Memory that a model may still take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = [
        int(line.split()[1]) * 1024 for line in _proc("meminfo") if line.startswith("MemAvailable")
    ]
    return sizes[0] if sizes else None


def _copy_bandwidth(device: torch.device, clock: Clock) -> float:
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED / _best(lambda: target.copy_(source), clock)


def _best(run: Callable[[], object], clock: Clock) -> float:
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


def _proc(name: str) -> list[str]:
    path = Path("/proc") / name
    return path.read_text().splitlines() if path.exists() else []
