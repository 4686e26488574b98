"""How much memory and disk this machine has, and how much of it is free."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_disk", "free_memory", "proc_bytes", "whole_memory"]

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory() -> int | None:
    """Bytes that a process may still take, within its control group; None if nobody says."""
    free = proc_bytes("meminfo", "MemAvailable")
    rooms = [limit - used for limit, used in _limits()]
    return min([*([] if free is None else [free]), *rooms], default=None)


def whole_memory() -> int | None:
    """Bytes that a process could have if it were alone, swap included; None if nobody says."""
    memory, swap = proc_bytes("meminfo", "MemTotal"), proc_bytes("meminfo", "SwapTotal")
    whole = [] if memory is None else [memory + (swap or 0)]
    return min([*whole, *(limit for limit, _ in _limits())], default=None)


def free_disk(folder: str | os.PathLike[str]) -> int | None:
    """Bytes free where a directory is, or will be made; None if nobody says."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def proc_bytes(file: str, field: str) -> int | None:
    """Bytes of a field of a file in Linux's /proc; None where there is none."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return sizes[0] if sizes else None


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, without what can be dropped, of the control groups that this process is in."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):  # version 1
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif controllers:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(root):
                break
            limit, used = (_number(group / name) for name in names[:2])
            if limit is not None and used is not None:
                yield limit, max(0, used - _statistic(group, names[2]))


def _number(file: Path) -> int | None:
    """The number in a file; None for "max", and where there is no file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _statistic(group: Path, name: str) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
