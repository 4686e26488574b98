"""Progress of a calibration: told to its callbacks, and shown by one of them.

On a terminal a bar per step, elsewhere a plain line every half minute: a log file says how far a
run of hours is. Either says which step of how many it is, the time left of it and of all, and the
memory.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import psutil
import torch
from tqdm import tqdm

from qvlm_hf.calibration.settings import CalibrationSettings

__all__ = ["ProgressBar", "Steps", "planned_steps"]

_EVERY = 30.0  # seconds between two plain lines
_UNITS = {"recipes": "recipe", "sensitivity": "site", "vision": "epoch", "search": "layer"}
# Steps of the report, in the order of their time; each with those that are told under its name.
_ORDER = {
    "recipes": ("recipes",),
    "transform": ("transform", "inputs"),
    "sensitivity": ("sensitivity",),
    "importance": ("importance",),
    "vision": (),
    "search": ("entropy", "ranges", "search", "rounding", "other"),
    "check": ("check",),
}


def planned_steps(settings: CalibrationSettings) -> tuple[str, ...]:
    """The steps of a calibration that tell how far they are, in order."""
    asked = {
        "recipes": settings.recipe == "auto",
        "sensitivity": settings.measures_sites,
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
        expected: seconds by step of the report, from estimate/seconds.py, to tell the time of all
            steps; None tells that of the step alone.
    """

    def __init__(
        self,
        plan: Sequence[str] = (),
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        expected: Mapping[str, float] | None = None,
    ) -> None:
        self._expected = {
            name: sum((expected or {}).get(part, 0.0) for part in parts)
            for name, parts in _ORDER.items()
        }
        self._plan, self._stream, self._now = tuple(plan), stream or sys.stderr, now
        self._bar: tqdm | None = None
        self._step, self._began, self._first = "", now(), 0
        self._told = self._began  # when the last plain line was written

    def on_step(self, name: str, done: int, total: int) -> None:
        """Shows that step `name` is at `done` of `total`."""
        # The clock starts anew while nothing is done: preparing a step is not its speed.
        if name != self._step or done == self._first:
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
        elif done == self._first:
            self._bar.reset()  # its own clock
        self._bar.set_postfix_str(self._rest(done, total), refresh=False)
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
        seconds = self._left(done, total)
        if seconds is not None:
            parts.append(f"{_clock(seconds)} left of it")
        return ", ".join([*parts, self._rest(done, total)])

    def _rest(self, done: int, total: int) -> str:
        """What a bar and a line end with."""
        return ", ".join(filter(None, [self._whole(done, total), _memory()]))

    def _left(self, done: int, total: int) -> float | None:
        """Seconds until the end of the step, at the speed so far."""
        moved = done - self._first
        return (self._now() - self._began) * (total - done) / moved if moved else None

    def _whole(self, done: int, total: int) -> str:
        """The time until the end of all steps: those to come are as far off as this one."""
        left, own = self._left(done, total), self._expected.get(self._step, 0.0)
        if left is None or not own or done >= total:
            return ""
        names = list(_ORDER)
        after = sum(self._expected[name] for name in names[names.index(self._step) + 1 :])
        return f"{_clock(left * (1 + after / own * total / (total - done)))} of all"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _memory() -> str:
    """What the process holds now, with the device's share if it has one."""
    held = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        held += f" + {torch.cuda.memory_allocated() / 2**30:.1f} GiB on the GPU"
    return held


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
