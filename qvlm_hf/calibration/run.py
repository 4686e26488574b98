"""`Calibration`: the one object that walks through qvlm_hf/quantize.py."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qvlm_hf.calibration.layers import LayerInput
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.progress import Steps
from qvlm_hf.calibration.record.coded import codable
from qvlm_hf.calibration.record.report import CalibrationReport, settings_dict
from qvlm_hf.calibration.record.resume import SavedSteps
from qvlm_hf.calibration.samples import Batch
from qvlm_hf.calibration.settings import CalibrationSettings, Precision, RangeCandidate
from qvlm_hf.format.scheme import is_per_position
from qvlm_hf.models.graph import Segment, Site

__all__ = ["Calibration", "LearnedRanges"]


@codable
@dataclass(frozen=True)
class LearnedRanges:
    """Factors on the ranges of a site that an optimisation found (search/vision_encoder.py).

    Attributes:
        start: the candidate that they apply to.
        activations: float32, factors on the lower and the upper bound of its activation grid, of
            the grid's shape; None without a grid.
        weights: per module float32 [O, G], factors on the groups' ranges of W'.
    """

    start: RangeCandidate
    activations: tuple[Tensor, ...] | None
    weights: tuple[Tensor, ...]


@dataclass(kw_only=True)
class Calibration:
    """One calibration: what it was given, and what its steps have found so far.

    Attributes:
        model: in full precision until every module is ready.
        settings: the options.
        segments: what is quantized, in execution order.
        data: the calibration batches, answers included, of all processes.
        places: of those in `data` that this process runs, rising; None: all.
        callbacks: objects with `on_step(name, done, total)`.
        kept: finished steps, to go on with later.
        inputs: segment name -> per own batch, what enters the segment in full precision.
        precisions: site name -> bits, where they are not those of the settings.
        importance: layer name -> per own batch [B, T], how much a token's error counts; empty: all
            tokens count alike.
        learned: site name -> learned ranges, one more candidate.
        dependencies: segment name -> D(k, k+1) in nats and the threshold h0, where they are not
            those of full precision.
        measures_entropy: whether dependencies not given are measured (eq. 4); otherwise they are 0,
            for a search of layers one by one.
        report: what is known so far; its modules come last.
    """

    model: nn.Module
    settings: CalibrationSettings
    segments: tuple[Segment, ...] = ()
    data: Sequence[Batch] = ()
    places: Sequence[int] | None = None
    callbacks: Sequence[Any] = ()
    kept: SavedSteps = field(default_factory=SavedSteps)
    inputs: dict[str, list[LayerInput]] = field(default_factory=dict)
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    importance: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    learned: Mapping[str, LearnedRanges] = field(default_factory=dict)
    dependencies: Mapping[str, tuple[list[float], float]] = field(default_factory=dict)
    measures_entropy: bool = True
    report: CalibrationReport = field(init=False)

    def __post_init__(self) -> None:
        settings = settings_dict(self.settings)
        self.report = CalibrationReport(settings=settings, provenance={}, modules={})

    @property
    def own_data(self) -> Sequence[Batch]:
        """The batches that this process runs."""
        return self.data if self.places is None else [self.data[place] for place in self.places]

    def reached(self, segment: Segment) -> Sequence[int]:
        """The places of the segment's `inputs` among those of all processes.

        Batches that do not reach a segment come last (samples/identity.py).
        """
        count = len(self.inputs[segment.name])
        return range(count) if self.places is None else self.places[:count]

    def precision(self, site: Site) -> Precision:
        """The bits of a site."""
        return self.precisions.get(site.name, self.settings.precision)

    def per_position(self, segment: Segment) -> bool:
        """Whether the segment's ranges are per token position, else per channel."""
        return is_per_position(self.settings.start_granularity(segment.component))

    def steps(self, name: str, total: int) -> Steps:
        """A counter that tells the callbacks how far the step `name` is."""
        return Steps(name, self.callbacks if ranks.is_main() else (), total)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Adds the seconds inside to those of `step` in the report."""
        start, seconds = time.perf_counter(), self.report.seconds
        try:
            yield
        finally:
            seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
