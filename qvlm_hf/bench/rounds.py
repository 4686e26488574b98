"""Turns: every way once, then every way again, so that what disturbs the machine disturbs all of them; then medians and ratios."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

__all__ = ["Figure", "figure", "one_line", "take_turns"]

_Result = TypeVar("_Result")
_LONGEST = 160  # characters of a foreign error in a table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Median of one time over the rounds.

    Attributes:
        seconds: the median.
        spread: interquartile range over the median.
        speedup: the baseline's median over this one.
    """

    seconds: float
    spread: float
    speedup: float


def take_turns(
    names: Iterable[str], rounds: int, run: Callable[[str, int], _Result], *, warm_ups: int = 1
) -> dict[str, list[_Result] | str]:
    """Runs every way once per round, in order, after rounds that warm up and are not kept.

    Args:
        names: of the ways.
        rounds: that are kept.
        run: takes a name and the round; rounds up to 0 warm up.
        warm_ups: how many do.

    Returns:
        Name -> results by round, or why the way failed; a way that failed gets no more turns.
    """
    results: dict[str, list[_Result] | str] = {name: [] for name in names}
    for turn in range(1 - warm_ups, rounds + 1):
        for name, kept in results.items():
            if isinstance(kept, str):
                continue
            try:
                result = run(name, turn)
            except Exception as error:  # another package's model: whatever it raises is its row
                results[name] = one_line(error)
                continue
            if turn > 0:
                kept.append(result)
    return results


def figure(times: list[float], base: list[float]) -> Figure:
    """Median and spread of `times`, at least 2, beside those of the baseline."""
    middle, (low, _, high) = median(times), quantiles(times, n=4, method="inclusive")
    return Figure(seconds=middle, spread=(high - low) / middle, speedup=median(base) / middle)


def one_line(error: BaseException) -> str:
    """An error as a cell of a table: type and first words."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
