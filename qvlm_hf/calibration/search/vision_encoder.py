"""Visual encoder optimisation (eq. 8-10): learned ranges of vision encoder and projector.

    L     = L_reg + lambda1 L_ent + lambda2 L_err                                       (eq. 8)
    L_ent = sum_k w_k D(k, k+1), w_k = |dE^(n) / dX^(k)|, detached, mean 1              (eq. 9)
    L_err = |X_q^v - X_r^v| + eta |X_q^n - X_r^n|, each relative to the norm of X_r     (eq. 10)

X^v is the vision encoder's output, X^n that of the language model's last layer, E^(n) the second
term. L_reg is the cross entropy of the answer tokens to the full-precision model's distribution, so
that the dataset's labels teach nothing. Everything runs quantized with ranges at their start; the
language model stays frozen. Layers are recomputed in the backward pass, so that only one layer's
activations and the hidden states between layers are alive.

Learned on the even calibration batches; kept only if L_err on the odd batches falls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from qvlm_hf.calibration.backward import frozen, observe_outputs, recomputed
from qvlm_hf.calibration.layers import live_layers, run_model, valid_tokens, working_precision
from qvlm_hf.calibration.measure.entropy import (
    DependencyHistogram,
    layer_dependencies,
    value_bounds,
)
from qvlm_hf.calibration.options import VisionOptimization
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.record.coded import codable
from qvlm_hf.calibration.record.report import VisionReport
from qvlm_hf.calibration.run import Calibration, LearnedRanges
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch
from qvlm_hf.calibration.search.blocks import partition_layers
from qvlm_hf.calibration.search.ranges import held_out_half, initialize_sites
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.calibration.search.straight_through import StraightThroughSite
from qvlm_hf.format.scheme import is_per_position
from qvlm_hf.models.graph import Segment

__all__ = ["OptimizedVision", "learn_vision_ranges", "optimize_vision"]

_PATIENCE = 3  # epochs without a better L_err on the held-out batches
_ENTROPY_BUDGET = 2**20  # elements x levels of one pair of layers in one step


@codable
@dataclass(frozen=True)
class OptimizedVision:
    """The result of the optimisation; without ranges where they did not help.

    Attributes:
        ranges: site -> factors on its ranges.
        dependencies: name of the vision encoder's segment -> D(k, k+1) in nats under them, and
            the threshold h0 for them.
        report: the measurements.
    """

    ranges: Mapping[str, LearnedRanges]
    dependencies: Mapping[str, tuple[list[float], float]]
    report: VisionReport


def learn_vision_ranges(calibration: Calibration) -> None:
    """The visual encoder optimisation of a calibration, if its settings ask for it.

    Gives it the learned ranges and dependencies, and tells the report what came of it.

    Raises:
        ValueError: it could not run, and the settings are strict.
    """
    if calibration.settings.optimize_vision is None:
        return
    report = calibration.report
    with calibration.timed("vision"):
        vision = calibration.kept.once("vision", partial(optimize_vision, calibration))
    if vision is not None:
        calibration.learned, calibration.dependencies = vision.ranges, vision.dependencies
        report = replace(report, vision=vision.report)
        outcome = "kept" if vision.report.kept else "not kept: no better"
    else:
        outcome = "did not run"
        warning = (
            "optimize_vision did not run: it needs at least two batches with pictures (a smaller "
            "batch_size=, or more samples) and a vision encoder or projector to quantize."
        )
        if calibration.settings.strict:
            raise ValueError(f"strict=True: {warning}")
        report = replace(report, warnings=(warning,))
    origin = report.provenance | {"optimize_vision": outcome}
    calibration.report = replace(report, provenance=origin)


def optimize_vision(calibration: Calibration) -> OptimizedVision | None:
    """Learns the ranges of every live site of vision encoder and projector.

    Args:
        calibration: with inputs, data and precisions; its model in full precision (rotated, if it
            will be) and unchanged afterwards; its settings with `optimize_vision`.

    Returns:
        The learned ranges; None where there is nothing to learn or nothing held out: no vision
        side, or fewer than two batches with pictures.
    """
    options = calibration.settings.optimize_vision
    learning = [segment for segment in calibration.segments if segment.component != "language"]
    # batches without pictures do not reach the ranges that are learned
    data = [batch for batch in calibration.data if "pixel_values" in batch.inputs]
    if options is None or not learning or len(data) < 2:
        return None
    steps = calibration.steps("vision", options.epochs)
    sites = _differentiable_sites(calibration)
    vision = next((segment for segment in learning if segment.component == "vision"), None)
    # a step follows on the one before: they cannot be split
    with ranks.no_sync():
        loss = _Loss(replace(calibration, data=data), options)
    before = None if vision is None else _partition(calibration, vision, sites)
    parameters = [parameter for site in sites for parameter in site.parameters()]
    with (
        frozen(calibration.model),
        installed(sites),
        recomputed(calibration.segments),
        ranks.no_sync(),
    ):
        start = loss.held_out_error()
        error, epochs = _descend(loss, parameters, options, start, steps.advance)
    # the same on equal machines, but for a GPU's sums
    start, error = ranks.broadcast(torch.tensor([start, error], dtype=torch.float64)).tolist()
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(ranks.broadcast(parameter))
    after = before and vision and _partition(calibration, vision, sites, before.threshold)
    report = VisionReport(
        epochs=epochs,
        error_before=start,
        error_after=error,
        kept=error < start,
        depth_before=before.depth if before else None,
        depth_after=after.depth if after else None,
    )
    if not report.kept:
        return OptimizedVision({}, {}, report)
    ranges = {site.quantized.site.name: site.learned() for site in sites if site.learn}
    dependencies = {}
    if after and vision:
        dependencies[vision.name] = (after.dependencies, after.threshold)
    return OptimizedVision(ranges, dependencies, report)


def _differentiable_sites(calibration: Calibration) -> list[StraightThroughSite]:
    """Every live site at its start; those of the language model are fixed."""
    sites = []
    for segment in calibration.segments:
        live, inputs = live_layers(segment), calibration.inputs[segment.name]
        hidden = [entry.hidden for entry in inputs]
        with working_precision(live, inputs):
            rows = initialize_sites(calibration, segment.component, live, inputs, hidden)
        learn = segment.component != "language"
        parts = (part for row in rows for site in row for part in site.parts)
        sites += [StraightThroughSite(part, learn=learn) for part in parts]
    return sites


def _descend(
    loss: "_Loss",
    parameters: Sequence[Tensor],
    options: VisionOptimization,
    start: float,
    advance: Callable[[], None],
) -> tuple[float, int]:
    """Adam with a falling learning rate; leaves the parameters at the best epoch.

    Returns its held-out error and the epochs run.
    """
    best, best_epoch, epoch = start, 0, 0
    best_values = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.epochs)
    for epoch in range(1, options.epochs + 1):
        for batch in loss.training:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(batch).backward()
            optimizer.step()
        schedule.step()
        error = loss.held_out_error()
        advance()
        if error < best:
            best, best_epoch = error, epoch
            best_values = [p.detach().clone() for p in parameters]
        if epoch - best_epoch >= _PATIENCE:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, best_values, strict=True):
            parameter.copy_(value)
    return best, epoch


class _Loss:
    """L of eq. 8 on one batch, and L_err on the held-out batches.

    It is made while the model is in full precision and called while it is quantized.
    """

    def __init__(self, calibration: Calibration, options: VisionOptimization) -> None:
        self._model, self._options = calibration.model, options
        self._levels = calibration.settings.entropy_levels
        self.training, self._held_out = calibration.data[::2], held_out_half(calibration.data)
        live = {
            segment.component: [layer.name for layer in live_layers(segment)]
            for segment in reversed(calibration.segments)  # of several projectors the first counts
        }
        # hidden states of one shape: those that L_ent compares
        self._chain = live.get("vision", [])
        self._per_position = is_per_position(calibration.settings.start_granularity("vision"))
        self._vision = (self._chain or live["projector"])[-1]
        self._last = live[calibration.segments[-1].component][-1]
        with torch.no_grad():
            self._targets = {id(batch): self._full_precision(batch) for batch in calibration.data}
        self._weights: list[float] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """L, a scalar with gradients."""
        hidden, logits = self._run(batch)
        logits_full, *full = self._targets[id(batch)]
        error = self._error(batch, hidden, full)
        if self._weights is None:
            self._weights = self._entropy_weights(hidden, error)
        options = self._options
        total = options.error_weight * (error[0] + error[1])
        if len(logits):
            total = total + functional.cross_entropy(logits, logits_full.softmax(-1))
        pairs = zip(self._weights, self._chain, self._chain[1:], strict=False)
        for weight, k, following in pairs:
            total = total + options.entropy_weight * weight * self._dependency(
                hidden[k], hidden[following]
            )
        return total

    def held_out_error(self) -> float:
        """Mean L_err over the held-out batches."""
        with torch.no_grad():
            errors = [
                sum(self._error(batch, self._run(batch)[0], self._targets[id(batch)][1:]))
                for batch in self._held_out
            ]
        return float(sum(errors)) / len(errors)

    def _run(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states by layer, and the answers' logits, float32 [answer tokens, vocabulary]."""
        names = [*self._chain, self._vision, self._last]
        with observe_outputs(self._model, names) as hidden:
            return hidden, self._answers(batch)

    def _full_precision(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with observe_outputs(self._model, [self._vision, self._last]) as hidden:
            logits = self._answers(batch)
        return logits, hidden[self._vision].detach(), hidden[self._last].detach()

    def _answers(self, batch: Batch) -> Tensor:
        logits = run_model(self._model, batch).logits
        return logits[:, :-1][(batch.labels[:, 1:] != IGNORE_INDEX).to(logits.device)].float()

    def _error(
        self, batch: Batch, hidden: Mapping[str, Tensor], full: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The two terms of L_err (eq. 10), the second one weighted."""
        mask = batch.inputs["attention_mask"].bool().to(full[1].device)
        vision = _relative(hidden[self._vision], full[0])
        last = _relative(valid_tokens(hidden[self._last], mask), valid_tokens(full[1], mask))
        return vision, self._options.output_weight * last

    def _entropy_weights(
        self, hidden: Mapping[str, Tensor], error: tuple[Tensor, Tensor]
    ) -> list[float]:
        """w_k of eq. 9, mean 1; each is 1 where the output term is off."""
        states = [hidden[name] for name in self._chain[:-1]]
        if not states or not error[1].requires_grad or self._options.output_weight == 0:
            return [1.0] * len(states)
        gradients = torch.autograd.grad(error[1], states, retain_graph=True)
        norms = [float(gradient.float().norm()) for gradient in gradients]
        total = sum(norms)
        return [norm * len(norms) / total if total > 0 else 1.0 for norm in norms]

    def _dependency(self, first: Tensor, second: Tensor) -> Tensor:
        values = [h if self._per_position else h.flatten(0, -2) for h in (first, second)]
        bounds = [value_bounds([value.detach()], self._per_position) for value in values]
        histogram = DependencyHistogram(
            *bounds, levels=self._levels, elements=first.numel(), budget=_ENTROPY_BUDGET
        )
        histogram.update(*values)
        return histogram.entropy().float()


@dataclass(frozen=True)
class _Partition:
    dependencies: list[float]
    threshold: float
    depth: float  # mean layers per block


def _partition(
    calibration: Calibration,
    vision: Segment,
    sites: Sequence[StraightThroughSite],
    threshold: float | None = None,
) -> _Partition:
    """Entropies and blocks of the quantized vision encoder; h0 is the settings' by default."""
    settings = calibration.settings
    with installed(sites):
        dependencies = layer_dependencies(calibration, vision)
    blocks, threshold = partition_layers(
        dependencies,
        max_block_depth=settings.max_block_depth,
        threshold=settings.entropy_threshold if threshold is None else threshold,
    )
    depth = sum(block.depth for block in blocks) / len(blocks)
    return _Partition(dependencies, threshold, depth)


def _relative(x: Tensor, reference: Tensor) -> Tensor:
    norm = reference.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() - reference.float()).norm() / norm
