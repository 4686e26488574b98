"""Contenders take turns: a disturbance of the machine disturbs all. Then medians and ratios."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

from qvlm_hf.errors import one_line

__all__ = ["Timing", "summarize", "take_turns"]

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One time over the rounds."""

    seconds: float  # the median
    spread: float  # interquartile range over the median
    speedup: float  # the baseline's median over this one


def take_turns(
    names: Iterable[str], rounds: int, run: Callable[[str, int], _Result], *, warm_ups: int = 1
) -> dict[str, list[_Result] | str]:
    """Runs every contender once per round, in order, after rounds that warm up and do not count.

    Args:
        names: of the contenders.
        rounds: that count.
        run: takes a name and the round; rounds up to 0 warm up.
        warm_ups: rounds before the first that counts.

    Returns:
        Name -> results by round, or the error; a contender that failed gets no more turns.
    """
    results: dict[str, list[_Result] | str] = {name: [] for name in names}
    for turn in range(1 - warm_ups, rounds + 1):
        for name, earlier in results.items():
            if isinstance(earlier, str):
                continue
            try:
                result = run(name, turn)
            except Exception as error:  # another package's model: its error is its row
                results[name] = one_line(error)
            else:
                if turn > 0:
                    earlier.append(result)
    return results


def summarize(times: list[float], baseline: list[float]) -> Timing:
    """Median and spread of `times`, at least 2, and their ratio to the baseline's."""
    middle, (low, _, high) = median(times), quantiles(times, n=4, method="inclusive")
    return Timing(seconds=middle, spread=(high - low) / middle, speedup=median(baseline) / middle)
