"""Progress of a calibration: told to its callbacks, and shown as a bar by one of them."""

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

__all__ = ["ProgressBar", "Steps"]


class ProgressBar:
    """One tqdm bar per step, on standard error; silent where that is no terminal."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def on_step(self, name: str, done: int, total: int) -> None:
        """Moves the bar `name` to `done` of `total` and closes it at the end."""
        bar = self._bars.setdefault(
            name, tqdm(total=total, desc=f"qvlm {name}", unit="layer", disable=None)
        )
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(name).close()


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
