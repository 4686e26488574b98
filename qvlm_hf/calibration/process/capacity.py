"""How much memory and disk this process may have, and how much of it is free."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["free_disk", "free_memory", "whole_memory"]

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(mapped: float = 0.0) -> float:
    """Bytes that this process may still take.

    Args:
        mapped: bytes of files that it will map, which limits of the process count.
    """
    groups = (limit - used for limit, used in _control_groups())
    return min([psutil.virtual_memory().available, *groups, *_limits(mapped)])


def whole_memory(mapped: float = 0.0) -> float:
    """Bytes that it could have if it were alone, swap included; argument as of `free_memory`."""
    machine = psutil.virtual_memory().total + psutil.swap_memory().total
    return min([machine, *(limit for limit, _ in _control_groups()), *_limits(mapped)])


def free_disk(folder: str | os.PathLike[str]) -> int:
    """Bytes free where a directory is, or will be made."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _limits(mapped: float) -> Iterator[float]:
    """What `ulimit -v` and `ulimit -d` leave: they also count what is reserved and not used."""
    if not hasattr(psutil, "RLIMIT_AS"):  # Windows, macOS
        return
    process = psutil.Process()
    held = process.memory_info()
    for limit, taken in ((psutil.RLIMIT_AS, held.vms), (psutil.RLIMIT_DATA, held.data)):
        most, _ = process.rlimit(limit)
        if most != psutil.RLIM_INFINITY:
            yield max(0.0, most - mapped - max(0, taken - held.rss))


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limit and use, without what can be dropped, of the groups that this process is in."""
    lines = _OWN.read_text().splitlines() if _OWN.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):  # version 1
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            with suppress(OSError, ValueError):  # there is no such group, or it has no limit
                limit, used = (int((group / name).read_text()) for name in names[:2])
                statistics = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                yield limit, max(0, used - int(statistics.get(names[2], 0)))
