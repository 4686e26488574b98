"""A progress bar as a callback: what a calibration shows when nobody asked for anything else."""

from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar:
    """One tqdm bar per step, on standard error; silent where that is no terminal."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def on_step(self, name: str, done: int, total: int) -> None:
        """Moves the bar `name` to `done` of `total` and closes it at the end."""
        bar = self._bars.setdefault(name, tqdm(total=total, desc=f"qvlm {name}", unit="layer", disable=None))
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(name).close()
