"""Visual encoder optimisation (eq.

8-10 of the paper): the ranges of vision encoder and projector, learned by gradient descent.

    L     = L_reg + lambda1 L_ent + lambda2 L_err                                                      (eq. 8)
    L_ent = sum_k w_k D(k, k+1), w_k = |dE^(n) / dX^(k)|, detached, mean 1                             (eq. 9)
    L_err = |X_q^v - X_r^v| + eta |X_q^n - X_r^n|, each relative to the norm of X_r                    (eq. 10)

X^v is the vision encoder's output, X^n that of the language model's last layer, E^(n) the second
term. L_reg is the cross entropy of the answer tokens to the full-precision model's distribution, so
that the dataset's labels teach nothing. Everything runs quantized with ranges at their start; the
language model stays frozen. Layers are recomputed in the backward pass, so that no more than one
layer's activations and the hidden states between layers are alive.

Learned on the even calibration batches; kept only if L_err on the odd ones falls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qvlm_hf.calibration.layers import LayerInput, calibrating, frozen, kept, layer_outputs
from qvlm_hf.calibration.measure.entropy import DependencyHistogram, value_bounds
from qvlm_hf.calibration.report import VisionReport
from qvlm_hf.calibration.samples import IGNORE_INDEX, Batch
from qvlm_hf.calibration.search.blocks import Block, partition_layers
from qvlm_hf.calibration.search.ranges import initialize_sites, judging
from qvlm_hf.calibration.search.segments import layer_dependencies
from qvlm_hf.calibration.search.sites import LearnedRanges, installed
from qvlm_hf.calibration.search.straight_through import FixedSite, RangeSite, StraightThroughSite
from qvlm_hf.calibration.settings import CalibrationSettings, Precision, VisionOptimization
from qvlm_hf.models.graph import Segment

__all__ = ["OptimizedVision", "optimize_vision"]

_PATIENCE = 3  # epochs without a better L_err on the held-out batches
_ENTROPY_BUDGET = 2**20  # elements x levels of one pair of layers in one step


@dataclass(frozen=True)
class OptimizedVision:
    """What the optimisation found.

    Attributes:
        ranges: site -> factors on its ranges; empty where they did not help.
        dependencies: "vision" -> D(k, k+1) of the vision encoder in nats under them, and the
            threshold h0 for them; empty likewise.
        report: what was measured.
    """

    ranges: Mapping[str, LearnedRanges]
    dependencies: Mapping[str, tuple[list[float], float]]
    report: VisionReport


def optimize_vision(
    model: nn.Module,
    segments: Sequence[Segment],
    inputs: Mapping[str, Sequence[LayerInput]],
    data: Sequence[Batch],
    settings: CalibrationSettings,
    precisions: Mapping[str, Precision],
    advance: Callable[[], None],
) -> OptimizedVision | None:
    """Learns the ranges of every live site of vision encoder and projector.

    Args:
        model: in full precision and eval mode (rotated, if it will be); unchanged afterwards.
        segments: what will be quantized.
        inputs: first layer's name -> what enters it, per batch.
        data: calibration batches with answers.
        settings: with `optimize_vision`.
        precisions: site name -> bits, where they are not those of the settings.
        advance: called after every epoch.

    Returns:
        The learned ranges, or None where there is nothing to learn or nothing held out: no vision
        side, fewer than two batches with pictures.
    """
    options = settings.optimize_vision
    learning = [segment for segment in segments if segment.component != "language"]
    data = [
        batch for batch in data if "pixel_values" in batch.inputs
    ]  # the others do not reach what learns
    if options is None or not learning or len(data) < 2:
        return None
    sites = {
        segment.component: _sites(model, segment, inputs, settings, precisions)
        for segment in segments
    }
    everything = [site for group in sites.values() for site in group.values()]
    vision = next((segment for segment in learning if segment.component == "vision"), None)
    loss = _Loss(model, segments, data, settings, options)
    before = _partition(model, vision, inputs, settings, everything)
    parameters = [parameter for site in everything for parameter in site.parameters()]
    with frozen(model), installed(everything), _checkpointed(model, segments):
        start = loss.held_out_error()
        error, epochs = _descend(loss, parameters, options, start, advance)
    after = _partition(
        model, vision, inputs, settings, everything, None if before is None else before.threshold
    )
    improved = error < start
    report = VisionReport(
        epochs=epochs, error_before=start, error_after=error, kept=improved,
        depth_before=None if before is None else before.depth, depth_after=None if after is None else after.depth,
    )  # fmt: skip
    if not improved:
        return OptimizedVision({}, {}, report)
    ranges = {
        name: site.learned()
        for group in sites.values()
        for name, site in group.items()
        if isinstance(site, RangeSite)
    }
    return OptimizedVision(
        ranges, {} if after is None else {"vision": (after.dependencies, after.threshold)}, report
    )


def _sites(
    model: nn.Module,
    segment: Segment,
    inputs: Mapping[str, Sequence[LayerInput]],
    settings: CalibrationSettings,
    precisions: Mapping[str, Precision],
) -> dict[str, StraightThroughSite]:
    live = [layer for layer in segment.layers if not layer.dead]
    entries = inputs[segment.layers[0].name]
    with calibrating(model, live, entries):
        rows = initialize_sites(
            model,
            live,
            segment.component,
            entries,
            [e.hidden for e in entries],
            settings,
            precisions,
        )
    kind = FixedSite if segment.component == "language" else RangeSite
    return {trial.site.name: kind(trial) for row in rows for trial in row}


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
    best, kept_values, best_epoch, epoch = start, [p.detach().clone() for p in parameters], 0, 0
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
            best, kept_values, best_epoch = error, [p.detach().clone() for p in parameters], epoch
        if epoch - best_epoch >= _PATIENCE:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept_values, strict=True):
            parameter.copy_(value)
    return best, epoch


class _Loss:
    """L of eq.

    8 on one batch, and L_err on the held-out ones: made while the model is in full precision,
    called while it is quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        segments: Sequence[Segment],
        data: Sequence[Batch],
        settings: CalibrationSettings,
        options: VisionOptimization,
    ) -> None:
        self._model, self._options, self._levels = model, options, settings.entropy_levels
        self._indices = {id(batch): i for i, batch in enumerate(data)}
        self.training, self._held_out = data[::2], judging(data)
        live = {
            segment.component: [layer.name for layer in segment.layers if not layer.dead]
            for segment in segments
        }
        self._chain = live.get(
            "vision", []
        )  # hidden states of one shape: those that L_ent compares
        self._per_position = settings.start_granularity("vision") == "token"
        self._vision, self._last = (
            (self._chain or live["projector"])[-1],
            live[segments[-1].component][-1],
        )
        with torch.no_grad():
            self._targets = [self._full_precision(batch) for batch in data]
        self._weights: list[float] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """L, a scalar with gradients."""
        hidden, logits = self._run(batch)
        logits_full, *full = self._targets[self._indices[id(batch)]]
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
                sum(self._error(b, self._run(b)[0], self._targets[self._indices[id(b)]][1:]))
                for b in self._held_out
            ]
        return float(sum(errors)) / len(errors)

    def _run(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Hidden states by layer, and the logits that predict the answers, float32 [answer tokens, vocabulary]."""
        with layer_outputs(self._model, [*self._chain, self._vision, self._last]) as hidden:
            return hidden, self._answers(batch)

    def _full_precision(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with layer_outputs(self._model, [self._vision, self._last]) as hidden:
            logits = self._answers(batch)
        return logits, hidden[self._vision].detach(), hidden[self._last].detach()

    def _answers(self, batch: Batch) -> Tensor:
        device = next(self._model.parameters()).device
        logits = self._model(
            **{key: value.to(device) for key, value in batch.inputs.items()}, use_cache=False
        ).logits
        return logits[:, :-1][(batch.labels[:, 1:] != IGNORE_INDEX).to(device)].float()

    def _error(
        self, batch: Batch, hidden: Mapping[str, Tensor], full: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The two terms of L_err, the second one weighted."""
        mask = batch.inputs["attention_mask"].bool().to(full[1].device)
        vision = _relative(hidden[self._vision], full[0])
        return vision, self._options.output_weight * _relative(
            kept(hidden[self._last], mask), kept(full[1], mask)
        )

    def _entropy_weights(
        self, hidden: Mapping[str, Tensor], error: tuple[Tensor, Tensor]
    ) -> list[float]:
        """w_k of the first layer of each pair, mean 1; all ones where the output term is off."""
        states = [hidden[name] for name in self._chain[:-1]]
        if not states or not error[1].requires_grad or self._options.output_weight == 0:
            return [1.0] * len(states)
        norms = [
            float(gradient.float().norm())
            for gradient in torch.autograd.grad(error[1], states, retain_graph=True)
        ]
        return (
            [norm * len(norms) / sum(norms) for norm in norms]
            if sum(norms) > 0
            else [1.0] * len(norms)
        )

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
    blocks: tuple[Block, ...]

    @property
    def depth(self) -> float:
        """Mean layers per block."""
        return sum(block.depth for block in self.blocks) / len(self.blocks)


def _partition(
    model: nn.Module,
    vision: Segment | None,
    inputs: Mapping[str, Sequence[LayerInput]],
    settings: CalibrationSettings,
    sites: Sequence[StraightThroughSite],
    threshold: float | None = None,
) -> _Partition | None:
    """Entropies and blocks of the quantized vision encoder; `threshold` None is that of the settings."""
    if vision is None:
        return None
    with installed(sites):
        dependencies = layer_dependencies(model, vision, inputs[vision.layers[0].name], settings)
    threshold = settings.entropy_threshold if threshold is None else threshold
    blocks, used = partition_layers(
        dependencies, max_block_depth=settings.max_block_depth, threshold=threshold
    )
    return _Partition(dependencies, used, blocks)


def _relative(x: Tensor, reference: Tensor) -> Tensor:
    return (x.float() - reference.float()).norm() / reference.float().norm().clamp(
        min=torch.finfo(torch.float32).tiny
    )


@contextmanager
def _checkpointed(model: nn.Module, segments: Sequence[Segment]) -> Iterator[None]:
    """Live layers keep their inputs alone for the backward pass and run again in it."""
    with ExitStack() as stack:
        for layer in (
            model.get_submodule(layer.name)
            for segment in segments
            for layer in segment.layers
            if not layer.dead
        ):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            stack.callback(delattr, layer, "forward")
        yield
