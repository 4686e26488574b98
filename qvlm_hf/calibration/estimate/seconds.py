"""Seconds of a calibration on this machine, step by step, from shapes alone.

A step is a number of passes over layers and of work on their weights. Counts follow the code: a
pass of T tokens through a layer of P weights is 2 T P operations, a Hessian is 2 T I^2. Rates are
measured on the machine at hand. What is left is a factor per step, fitted by
tests/bench/promise.py; docs/scaling.md says how far off the result is.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from qvlm_hf.calibration.estimate.sums import Data, Sums, add_up, directions
from qvlm_hf.calibration.measure.entropy import HISTOGRAM_VALUES
from qvlm_hf.calibration.measure.importance import DRAWS
from qvlm_hf.calibration.search.budget import WIDTHS
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import Segment

__all__ = ["FACTORS", "Rates", "count_seconds", "measure_rates", "rounding_seconds"]

# Measured over counted seconds: `python tests/bench/promise.py`, docs/scaling.md. By the names of
# `report.seconds`; "other" is what the report does not time.
FACTORS: Mapping[str, float] = {
    "transform": 1.27,
    "inputs": 0.94,
    "sensitivity": 1.66,
    "importance": 1.54,
    "entropy": 0.77,
    "ranges": 0.94,
    "search": 1.05,
    "rounding": 1.3,
    "check": 1.26,
    "other": 1.67,
}

# Passes over memory per value, in those of one rounding to a grid (`Rates.values`). Measured one by
# one on 512 to 2048 inputs.
_RUN, _SIMULATED = 2.0, 3.5  # of a site's input: a layer runs, or runs quantized
_TAILS, _RANGE_ERROR = 6.0, 2.5  # of a site's input: TailObserver, LpError per candidate
_LEVEL = 10.0  # of an element and a level of a histogram
_BLOCK_ERROR = 6.0  # of a hidden state
_CLIPPED, _ROUNDED, _PACKED = 36.0, 7.0, 4.0  # of a weight: with its clip search, without, packed
_COLUMNS, _SPREAD = 16.0, 2.7 / 128  # of a weight: GPTQ, and its updates of the rest, per input
_AGREED = 7.0  # of an entry of a Hessian
_FACTORISED = 4.5  # I^3 operations of float32: a Cholesky factor and its inverse, in float64


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a device: operations a second in float32 and in the model's dtype, values a second.

    Attributes:
        single, native: a multiplication and an addition are two operations.
        values: rounded to a grid.
        call: seconds of Python in a layer of a decoder.
    """

    single: float
    native: float
    values: float
    call: float = 2e-3

    def run(self, one: Sums, data: Data, *, simulated: bool = False, native: bool = False) -> float:
        """Seconds of a pass of every layer over all samples.

        `simulated`: quantized, which rounds what enters a site; `native`: in the model's dtype,
        else in float32.
        """
        operations = one.operations / (self.native if native else self.single)
        values = one.values * (_SIMULATED if simulated else _RUN) / self.values
        return operations + values + one.layers * data.batches * self.call


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Multiplies and rounds on a device, for a third of a second; the best of a few tries."""

    def multiply(kind: torch.dtype) -> float:
        a, b = torch.ones(2, 1024, 1024, device=device, dtype=kind)
        return 2 * 1024**3 / _fastest(lambda: functional.linear(a, b), device)

    values, scale = torch.ones(2**24, device=device), torch.ones(1, device=device)
    rounding = _fastest(lambda: torch.div(values, scale).round_().clamp_(0, 15), device)
    single = multiply(torch.float32)
    native = single if dtype == torch.float32 else multiply(dtype)
    return Rates(single=single, native=native, values=values.numel() / rounding)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def rounding_seconds(weights: float, rates: Rates) -> float:
    """Of plain rounding of so many weights."""
    return weights * (_CLIPPED + _PACKED) / rates.values


def count_seconds(
    model: Any, segments: Sequence[Segment], settings: CalibrationSettings, data: Data, rates: Rates
) -> dict[str, float]:
    """What one calibration takes, trials of recipes left out. By step of `FACTORS`."""
    sums = add_up(model, segments, data)
    native = [rates.run(one, data, native=True) for one in sums]
    whole = sum(native)  # the model runs on all samples
    weights = sum(one.weights for one in sums)
    steps = dict.fromkeys(FACTORS, 0.0)
    steps["check"] = steps["other"] = whole * data.checks / data.samples
    steps["inputs"] = whole
    if settings.rotation == "hadamard":
        steps["transform"] += 4 * weights / rates.values
    if settings.equalization:
        steps["transform"] += whole + 2 * weights / rates.values
    if settings.token_importance:
        steps["importance"] = whole * (2 + DRAWS)
    probes = settings.guards + len(WIDTHS) * (settings.precision_budget is not None)
    if probes:
        steps["sensitivity"] = whole * data.half * (2 + directions(sums, data))
    for place, (segment, one) in enumerate(zip(segments, sums, strict=True)):
        if place:  # what enters it from quantized layers
            below = [rates.run(before, data, simulated=True) for before in sums[:place]]
            steps["inputs"] += sum(below) + native[place]
        for step, seconds in _segment_seconds(segment, one, settings, data, rates).items():
            steps[step] += seconds * (probes if step == "sensitivity" else 1)
    return {step: FACTORS[step] * seconds for step, seconds in steps.items()}


def _segment_seconds(
    segment: Segment, one: Sums, settings: CalibrationSettings, data: Data, rates: Rates
) -> dict[str, float]:
    """Step -> seconds, of the steps that go through a segment; "sensitivity" of one probe."""
    run, quantized = rates.run(one, data), rates.run(one, data, simulated=True)
    granularities = settings.granularities(segment.component)
    candidates = settings.candidates(segment.component)
    per_layer = one.sites / max(one.layers, 1)

    starts = sum(candidate.granularity == granularities[0] for candidate in candidates)
    judged = _RANGE_ERROR * data.half * starts * (starts > 1)
    ranges = run * (1 + data.half) + one.values * (1.5 * _TAILS + judged) / rates.values
    probe = ranges + run + quantized * data.half * (1 + per_layer)

    levels = settings.entropy_levels
    pairs = max(one.layers - 1, 0) * min(one.hidden * levels, HISTOGRAM_VALUES)

    depths = (1, settings.max_block_depth)  # half of the layers stand alone, about
    evaluations = sum(_evaluations(len(candidates), per_layer, data, depth) for depth in depths) / 2
    tried = _CLIPPED * len(granularities) + _ROUNDED * len(candidates)
    searched = one.weights * tried + one.hidden * data.half * evaluations * _BLOCK_ERROR

    rounding = 0.0
    if settings.weight_rounding != "nearest":
        operations = one.hessians + _FACTORISED * one.cubes + one.spread
        columns = one.weights * (_CLIPPED + _COLUMNS) + one.spread * _SPREAD
        values = columns + one.squares * _AGREED
        rounding = quantized * per_layer / 2 + operations / rates.single + values / rates.values
    return {
        "sensitivity": probe + one.weights * _CLIPPED / rates.values,
        "entropy": run + 2 * levels * pairs / rates.single + _LEVEL * pairs / rates.values,
        "ranges": ranges,
        "search": quantized * data.half * evaluations + searched / rates.values,
        "rounding": rounding,
        "other": quantized * 2 + one.weights * _PACKED / rates.values,
    }


def _evaluations(candidates: int, sites: float, data: Data, depth: int) -> float:
    """How often search/joint_search.py runs a layer of a block on the judging batches, about."""
    judging = max(data.batches // 2, 1)
    screen, screened = math.ceil(judging / 4) / judging, judging > 1
    others = candidates - 1
    # combinations, finalists, and sweeps over sites of which one in two candidates is tried in full
    alone = candidates * screen + 3 * screened + sites * (1.2 * others * screen + 0.5 * screened)
    if depth == 1 or not others:
        return alone
    joint = (3 ** (depth + 1) - 3) / 2 * screen / depth + 4 * screened
    tried = 2 if screened else others
    return alone + joint + sites * (depth + 1) / 2 * (1.2 * tried * screen + 0.5 * screened)
