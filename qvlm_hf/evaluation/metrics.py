"""Accuracy with intervals, and the paired comparison of two models on the same questions.

A pair of models is compared question by question: most of the difference between test sets cancels.
Whether 942 right answers of 1000 differ from 945 by more than chance is told by the questions on
which the models disagree, not by the two accuracies.

Sources: E. B. Wilson, JASA 22 (1927) 209; R. G. Newcombe, Statistics in Medicine 17 (1998) 2635
(method 10); Q. McNemar, Psychometrika 12 (1947) 153, in its exact (binomial) form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

__all__ = [
    "Interval",
    "PairedCounts",
    "Proportion",
    "mcnemar_p_value",
    "paired_difference",
    "wilson_interval",
]

_Z95 = 1.959963984540054  # 0.975 quantile of the standard normal distribution


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """`successes` out of `total`.

    Raises:
        ValueError: unless 0 <= successes <= total and total > 0.
    """

    successes: int
    total: int

    def __post_init__(self) -> None:
        if self.total < 1 or not 0 <= self.successes <= self.total:
            raise ValueError(
                f"{self.successes} of {self.total} is no proportion; "
                "it takes 0 <= successes <= total and total >= 1"
            )

    @property
    def value(self) -> float:
        """The share, between 0 and 1."""
        return self.successes / self.total

    @property
    def interval(self) -> Interval:
        """Wilson's interval of the share."""
        return wilson_interval(self.successes, self.total)


@dataclass(frozen=True, kw_only=True)
class PairedCounts:
    """How two models did on the same questions."""

    both_right: int
    only_first: int
    only_second: int
    both_wrong: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> "PairedCounts":
        """Counts two lists of right and wrong answers.

        Raises:
            ValueError: if the lists differ in length.
        """
        if len(first) != len(second):
            raise ValueError(
                f"{len(first)} and {len(second)} answers cannot be paired; "
                "evaluate both models on the same samples"
            )
        pairs = list(zip(first, second, strict=True))
        return cls(
            both_right=sum(a and b for a, b in pairs),
            only_first=sum(a and not b for a, b in pairs),
            only_second=sum(b and not a for a, b in pairs),
            both_wrong=sum(not a and not b for a, b in pairs),
        )

    @property
    def total(self) -> int:
        """Number of questions."""
        return self.both_right + self.only_first + self.only_second + self.both_wrong


def wilson_interval(successes: int, total: int) -> Interval:
    """Wilson's score interval, 95 %: within [0, 1], and not empty at 0 and at `total` successes.

    Raises:
        ValueError: unless 0 <= successes <= total and total > 0.
    """
    share, square = Proportion(successes=successes, total=total).value, _Z95**2
    center = share + square / (2 * total)
    spread = _Z95 * sqrt(share * (1 - share) / total + square / (4 * total**2))
    scale = 1 + square / total
    # exact where nothing or everything succeeded: rounding would leave 1e-17
    low = 0.0 if successes == 0 else (center - spread) / scale
    high = 1.0 if successes == total else (center + spread) / scale
    return Interval(low=low, high=high)


def mcnemar_p_value(counts: PairedCounts) -> float:
    """Exact two-sided McNemar test, in integers.

    The probability of disagreements at least this uneven if both models are equally good:
    Binomial(only_first + only_second, 1/2); 1.0 if they never disagree.
    """
    only_first, only_second = counts.only_first, counts.only_second
    disagreements = only_first + only_second
    tail = ways = 1
    for k in range(min(only_first, only_second)):
        ways = ways * (disagreements - k) // (k + 1)  # binomial coefficient (disagreements, k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << disagreements))


def paired_difference(counts: PairedCounts) -> tuple[float, Interval]:
    """Accuracy of the second model minus that of the first, with Newcombe's 95 % interval.

    His method 10 joins the two Wilson intervals with the correlation of the answers. Unlike Wald's
    it does not shrink to a point when the models never disagree.

    Raises:
        ValueError: there are no questions.
    """
    total = counts.total
    first = Proportion(successes=counts.both_right + counts.only_first, total=total)
    second = Proportion(successes=counts.both_right + counts.only_second, total=total)
    difference, phi = (counts.only_second - counts.only_first) / total, _correlation(counts)
    down_first, up_first = first.value - first.interval.low, first.interval.high - first.value
    down_second, up_second = second.value - second.interval.low, second.interval.high - second.value
    low = difference - _joined(down_second, up_first, phi)
    high = difference + _joined(up_second, down_first, phi)
    return difference, Interval(low=max(-1.0, low), high=min(1.0, high))


def _joined(one: float, other: float, phi: float) -> float:
    """Length of the difference of two errors with correlation `phi`; rounding may fall below 0."""
    return sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _correlation(counts: PairedCounts) -> float:
    """Phi coefficient of the two answers with Newcombe's continuity correction.

    0 where a model is always right or always wrong.
    """
    a, b, c, d = counts.both_right, counts.only_first, counts.only_second, counts.both_wrong
    scale = (a + b) * (c + d) * (a + c) * (b + d)
    if scale == 0:
        return 0.0
    covariance = a * d - b * c
    corrected = max(covariance - counts.total / 2, 0.0) if covariance > 0 else covariance
    return corrected / sqrt(scale)
