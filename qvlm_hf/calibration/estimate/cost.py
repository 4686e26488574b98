"""What a calibration takes, from shapes alone: arithmetic per step, and seconds on this machine.

A step of qvlm_hf/quantize.py is a number of passes over layers and of work on their weights. Counts
follow the code: a pass of T tokens through a layer of P weights is 2 T P operations, a Hessian is
2 T I^2. Rates are measured on the machine at hand. What is left is a factor per step, fitted by
tests/bench/promise.py; docs/scaling.md says how far off the result is.

Legend: I in_features of a site, T tokens of all samples, P weights.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from operator import add
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.measure.entropy import HISTOGRAM_VALUES
from qvlm_hf.calibration.measure.importance import DRAWS
from qvlm_hf.calibration.search.budget import WIDTHS
from qvlm_hf.calibration.search.sensitivity import gradient_draws
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import Layer, Segment

__all__ = [
    "FACTORS",
    "Data",
    "Rates",
    "Sums",
    "Work",
    "active_share",
    "count_work",
    "directions",
    "measure_rates",
    "rounding_work",
    "seconds_of",
]

# Measured over counted seconds: `python tests/bench/promise.py`, docs/scaling.md.
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
_TAILS = 6.0  # of a site's input: TailObserver
_LEVEL = 10.0  # of an element and a level of a histogram
_BLOCK_ERROR = 6.0  # of a hidden state
_CLIPPED, _ROUNDED, _PACKED = 36.0, 7.0, 4.0  # of a weight: with its clip search, without, packed
_COLUMNS, _SPREAD = 16.0, 2.7 / 128  # of a weight: GPTQ, and its updates of the rest, per input
_AGREED = 7.0  # of an entry of a Hessian
_FACTORISED = 4.5  # I^3 operations of float32: a Cholesky factor and its inverse, in float64


@dataclass(frozen=True, kw_only=True)
class Data:
    """The samples of a calibration, as far as they cost time or memory.

    Attributes:
        samples: how many.
        batch_size: samples of a batch.
        tokens: component -> tokens of an average sample, padding included.
        context: component -> tokens that see each other.
        answers: tokens of an answer.
        checks: samples of the self-check.
    """

    samples: int
    batch_size: int
    tokens: Mapping[str, float]
    context: Mapping[str, float]
    answers: float = 8
    checks: int = 16

    @property
    def batches(self) -> int:
        """How many batches."""
        return -(-self.samples // self.batch_size)

    @property
    def half(self) -> float:
        """The share of the batches that candidates are judged on (`held_out_half`)."""
        return (self.batches // 2) / self.batches if self.batches > 1 else 1.0


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        single: multiplications and additions in float32, each counted.
        native: the same in the dtype of the model.
        values: values rounded to a grid, or as much traffic.
        calls: layers called on a batch.
    """

    single: float = 0.0
    native: float = 0.0
    values: float = 0.0
    calls: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(add, astuple(self), astuple(other)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(part * factor for part in astuple(self)))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a device: operations per second in float32 and the model's dtype, values per second."""

    single: float
    native: float
    values: float
    call: float = 2e-3  # seconds of Python in a layer of a decoder

    def seconds(self, work: Work) -> float:
        """Of the work, none of it at a time with other work."""
        return (
            work.single / self.single
            + work.native / self.native
            + work.values / self.values
            + work.calls * self.call
        )


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


def seconds_of(steps: Mapping[str, Work], rates: Rates) -> dict[str, float]:
    """Seconds of the steps of `count_work`."""
    return {name: FACTORS[name] * rates.seconds(work) for name, work in steps.items()}


class Sums:
    """Sums over the live layers of a segment, for all samples.

    Attributes:
        layers, sites: how many.
        operations: of a pass.
        values: that enter the sites.
        hidden: that enter a layer.
        weights: of the sites.
        spread, squares, cubes: weights times inputs, inputs squared and cubed, of the sites.
        hessians: operations of all Hessians.
    """

    def __init__(self, segment: Segment, data: Data, active: float) -> None:
        layers = live_layers(segment)
        tokens = data.samples * data.tokens[segment.component]
        context = data.context[segment.component]
        sites = [site for layer in layers for site in layer.sites]
        # of an expert: the share of the tokens that it gets
        inputs = [
            (part.linears[0].in_features, active if site.experts else 1.0)
            for site in sites
            for part in site.parts
        ]
        outputs = [
            sum(linear.out_features for linear in part.linears)
            for site in sites
            for part in site.parts
        ]
        self.layers, self.sites = len(layers), len(sites)
        self.operations = sum(_operations(layer, tokens, context, active) for layer in layers)
        self.values = sum(tokens * share * size for size, share in inputs)
        self.hidden = tokens * (_width(layers[0]) if layers else 0)
        self.weights = sum(o * i for o, (i, _) in zip(outputs, inputs, strict=True))
        self.spread = sum(o * i**2 for o, (i, _) in zip(outputs, inputs, strict=True))
        self.squares = sum(i**2 for i, _ in inputs)
        self.cubes = sum(i**3 for i, _ in inputs)
        self.hessians = sum(2 * tokens * share * i**2 for i, share in inputs)
        self._batches = data.batches

    def run(self, times: float, *, simulated: bool = False) -> Work:
        """Passes of every layer over all samples in float32; `simulated`: quantized."""
        return Work(
            single=self.operations * times,
            values=self.values * times * (_SIMULATED if simulated else _RUN),
            calls=self.layers * self._batches * times,
        )

    def run_native(self, times: float) -> Work:
        """The same in the model's dtype."""
        work = self.run(times)
        return Work(native=work.single, values=work.values, calls=work.calls)


def _width(layer: Layer) -> int:
    return layer.sites[0].linears[0].in_features if layer.sites else 0


def _operations(layer: Layer, tokens: float, context: float, active: float) -> float:
    every = sum(weight.numel() for weight in layer.module.parameters() if weight.dim() > 1)
    experts = sum(
        linear.weight.numel() for site in layer.sites if site.experts for linear in site.linears
    )
    weights = every - (1 - active) * experts
    return 2 * tokens * weights + 4 * tokens * context * _width(layer)


def count_work(
    model: Any, segments: Sequence[Segment], settings: CalibrationSettings, data: Data
) -> dict[str, Work]:
    """The work of one calibration, trials of recipes left out.

    Args:
        model: may be on the meta device.
        segments: of `resolve_segments`.
        settings: of the calibration.
        data: its samples.

    Returns:
        Step -> work, by the names of `report.seconds`; "other" is what the report does not time.
    """
    active = active_share(model)
    sums = [Sums(segment, data, active) for segment in segments]
    whole = sum((one.run_native(1) for one in sums), Work())  # the model runs on all samples
    checked = whole * (data.checks / data.samples)
    steps = dict.fromkeys(FACTORS, Work()) | {"check": checked, "other": checked, "inputs": whole}
    weights = sum(one.weights for one in sums)
    if settings.rotation == "hadamard":
        steps["transform"] += Work(values=4 * weights)
    if settings.equalization and settings.activation_bits < 16:
        steps["transform"] += whole + Work(values=2 * weights)
    if settings.token_importance:
        steps["importance"] += whole * (2 + DRAWS)
    probes = settings.guards + len(WIDTHS) * (settings.precision_budget is not None)
    if probes:
        steps["sensitivity"] += whole * data.half * (2 + directions(sums, data))
    for place, (segment, one) in enumerate(zip(segments, sums, strict=True)):
        if place:  # what enters it from quantized layers
            below = (before.run(1, simulated=True) for before in sums[:place])
            steps["inputs"] += sum(below, one.run_native(1))
        for step, work in _segment_work(segment, one, settings, data).items():
            steps[step] += work * (probes if step == "sensitivity" else 1)
    return steps


def rounding_work(weights: float) -> Work:
    """Of plain rounding of so many weights."""
    return Work(values=weights * (_CLIPPED + _PACKED))


def directions(sums: Sequence[Sums], data: Data) -> int:
    """Of the gradients of sensitivity."""
    values = data.half * sum(one.hidden * one.layers for one in sums)
    return gradient_draws(values, data.samples * data.half)


def _segment_work(
    segment: Segment, one: Sums, settings: CalibrationSettings, data: Data
) -> dict[str, Work]:
    granularities = settings.granularities(segment.component)
    candidates = settings.candidates(segment.component)
    per_layer = one.sites / max(one.layers, 1)
    ranges = one.run(1) + Work(values=one.values * 1.5 * _TAILS)
    probe = ranges + one.run(1) + one.run(data.half * (1 + per_layer), simulated=True)
    levels = settings.entropy_levels
    pairs = max(one.layers - 1, 0) * min(one.hidden * levels, HISTOGRAM_VALUES)
    depths = (1, settings.max_block_depth)  # half of the layers stand alone, about
    evaluations = sum(_evaluations(len(candidates), per_layer, data, depth) for depth in depths) / 2
    search = one.run(data.half * evaluations, simulated=True) + Work(
        values=one.weights * (_CLIPPED * len(granularities) + _ROUNDED * len(candidates))
        + one.hidden * data.half * evaluations * _BLOCK_ERROR
    )
    rounding = Work()
    if settings.weight_rounding != "nearest":
        rounding = one.run(per_layer / 2, simulated=True) + Work(
            single=one.hessians + _FACTORISED * one.cubes + one.spread,
            values=one.weights * (_CLIPPED + _COLUMNS)
            + one.spread * _SPREAD
            + one.squares * _AGREED,
        )
    return {
        "sensitivity": probe + Work(values=one.weights * _CLIPPED),
        "entropy": one.run(1) + Work(single=2 * levels * pairs, values=_LEVEL * pairs),
        "ranges": ranges,
        "search": search,
        "rounding": rounding,
        "other": one.run(2, simulated=True) + Work(values=one.weights * _PACKED),
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


def active_share(model: nn.Module) -> float:
    """The share of a layer's experts that a token goes through; 1 without experts."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    taken = getattr(text, "num_experts_per_tok", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if taken and (count := getattr(text, name, None)):
            return min(1.0, taken / count)
    return 1.0
