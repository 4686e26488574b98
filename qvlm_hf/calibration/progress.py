"""Progress of a calibration: told to its callbacks, and shown by one of them.

On a terminal a bar per step, elsewhere a plain line every half minute: a log file says how far a
run of hours is. Either says which step of how many it is, how long it will take, and the memory.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["ProgressBar", "Steps", "planned_steps"]

_EVERY = 30.0  # seconds between two plain lines
_UNITS = {"recipes": "recipe", "sensitivity": "site", "vision": "epoch", "search": "layer"}
_STATUS = Path("/proc/self/status")


def planned_steps(settings: CalibrationSettings) -> tuple[str, ...]:
    """The steps of a calibration that tell how far they are, in order."""
    asked = {
        "recipes": settings.recipe is not None,
        "sensitivity": settings.guards or settings.precision_budget is not None,
        "vision": settings.optimize_vision is not None,
        "search": True,
    }
    return tuple(name for name, is_asked in asked.items() if is_asked)


class ProgressBar:
    """Shows every step on standard error.

    Args:
        plan: the steps, from `planned_steps`.
        stream: None is standard error.
        now: a clock, in seconds.
    """

    def __init__(
        self,
        plan: Sequence[str] = (),
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan, self._stream, self._now = tuple(plan), stream or sys.stderr, now
        self._bar: tqdm | None = None
        self._step, self._began, self._first = "", now(), 0
        self._told = self._began  # when the last plain line was written

    def on_step(self, name: str, done: int, total: int) -> None:
        """Shows that step `name` is at `done` of `total`."""
        if name != self._step:
            self._step, self._began, self._first = name, self._now(), done
        if self._stream.isatty():
            self._move_bar(done, total)
        elif self._now() - self._told >= _EVERY:
            self._told = self._now()
            self._stream.write(f"{self._line(done, total)}\n")
            self._stream.flush()

    def _move_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            unit = _UNITS.get(self._step, "part")
            self._bar = tqdm(total=total, desc=self._title(), unit=unit, file=self._stream)
        self._bar.set_postfix_str(_memory(), refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None

    def _title(self) -> str:
        if self._step not in self._plan:
            return f"qvlm {self._step}"
        return f"qvlm {self._plan.index(self._step) + 1}/{len(self._plan)} {self._step}"

    def _line(self, done: int, total: int) -> str:
        parts = [f"{self._title()}: {done} of {total} {_UNITS.get(self._step, 'part')}s"]
        passed, moved = self._now() - self._began, done - self._first
        if moved:
            seconds = round(passed * (total - done) / moved)
            parts.append(f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left of it")
        return ", ".join([*parts, *filter(None, [_memory()])])


def _memory() -> str:
    """What the process holds now, with the device's share if it has one; "" where nobody says."""
    held = []
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        held.append(f"{int(lines['VmRSS'].split()[0]) / 2**20:.1f} GiB")
    if torch.cuda.is_available():
        held.append(f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB on the GPU")
    return " + ".join(held)


class Steps:
    """Tells the callbacks how much of a step is done: layers searched, sites probed."""

    def __init__(self, name: str, callbacks: Sequence[Any], total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._callbacks = [callback for callback in callbacks if hasattr(callback, "on_step")]
        self.advance(0)

    def advance(self, count: int = 1) -> None:
        """Counts `count` more; what goes beyond the total is not told."""
        if count and self._done >= self._total:
            return
        self._done += count
        for callback in self._callbacks:
            callback.on_step(self._name, self._done, self._total)
