"""Statistics of a site's input in bounded memory: exact tail quantiles, L_p errors of candidates.

A static range is [quantile(1-p), quantile(p)] per channel or position. Only the tails are needed,
so `TailObserver` keeps the few largest and smallest values of each, exactly, whatever the number of
tokens.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import QParams, choose_qparams, dynamic_token_qparams, fake_quantize
from qvlm_hf.format.scheme import is_per_channel, is_per_position, unknown_granularity

__all__ = ["LpError", "TailObserver", "candidate_qparams"]

_NORM = 2.4  # exponent of the L_p error: larger errors count more than in squares


class TailObserver:
    """Exact quantiles near 0 and 1 of many series at once, streamed.

    Args:
        count: values that each series will have (an upper bound).
        percentile: the smallest percentile that will be asked for.

    Attributes:
        seen: values of each series so far.
    """

    def __init__(self, *, count: int, percentile: float) -> None:
        self._tail = min(count, math.ceil((1 - percentile) * max(count - 1, 0)) + 2)
        self.seen = 0
        self._top: Tensor | None = None
        self._bottom: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Adds [series, n] values."""
        values = values.float()
        self.seen += values.shape[1]
        self._top = self._merge(self._top, values)
        self._bottom = self._merge(self._bottom, -values)

    def join(self, device: torch.device) -> None:
        """Adds what the other processes observed of the same series; any may have seen nothing."""
        (self.seen,) = ranks.all_reduce_numbers(self.seen)
        self._tail = int(ranks.all_reduce(torch.tensor([self._tail]), "max"))
        self._top, self._bottom = (self._joined(t, device) for t in (self._top, self._bottom))

    def range(self, percentile: float) -> tuple[Tensor, Tensor]:
        """(quantile(1 - percentile), quantile(percentile)), each [series], as torch.quantile's.

        Raises:
            ValueError: nothing was observed.
        """
        if self._top is None or self._bottom is None:
            raise ValueError("no value was observed: calibration did not reach this input.")
        return -self._quantile(self._bottom, percentile), self._quantile(self._top, percentile)

    def _joined(self, tail: Tensor | None, device: torch.device) -> Tensor | None:
        together: Tensor | None = None
        empty = torch.empty(0, 0, dtype=torch.float32, device=device)
        for part in ranks.all_gather(empty if tail is None else tail):
            together = self._merge(together, part) if part.numel() else together
        return together

    def _merge(self, tail: Tensor | None, values: Tensor) -> Tensor:
        together = values if tail is None else torch.cat((tail, values), dim=1)
        return together.topk(min(self._tail, together.shape[1]), dim=1).values

    def _quantile(self, descending: Tensor, percentile: float) -> Tensor:
        place = (1 - percentile) * (self.seen - 1)
        low = min(int(place), descending.shape[1] - 1)
        high = min(low + 1, descending.shape[1] - 1)
        return torch.lerp(descending[:, low], descending[:, high], place - low)


class LpError:
    """Sum over all values of |x - x_hat|^2.4 for each candidate of a site."""

    def __init__(self, qparams: Sequence[QParams | None], bits: int) -> None:
        self._qparams, self._bits = qparams, bits
        self.totals = [0.0] * len(qparams)

    def update(self, x: Tensor) -> None:
        """Adds [..., T, channels] values, shaped so that the QParams broadcast."""
        for i, qparams in enumerate(self._qparams):
            grid = dynamic_token_qparams(x, self._bits) if qparams is None else qparams
            self.totals[i] += float((fake_quantize(x, grid) - x).abs_().pow_(_NORM).sum())


def candidate_qparams(
    candidate: RangeCandidate, observers: Mapping[str, TailObserver], bits: int
) -> QParams | None:
    """The activation grid of a candidate, broadcastable against [..., T, channels].

    None where it is found at run time; `observers` are by granularity.
    """
    if not candidate.static:
        return None
    low, high = observers[candidate.granularity].range(candidate.percentile)
    qparams = choose_qparams(low * candidate.margin, high * candidate.margin, bits)
    if is_per_channel(candidate.granularity):
        return qparams
    if is_per_position(candidate.granularity):
        return QParams(qparams.scale[:, None], qparams.zero_point[:, None], bits)
    raise unknown_granularity(candidate.granularity)
