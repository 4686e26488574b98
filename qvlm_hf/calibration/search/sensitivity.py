"""Sensitivity: which sites can bear few bits, by the divergence of the answers.

Every site is tried by itself, everything else in full precision, with ranges of the even
calibration batches on the odd. The measure is the KL divergence of the answers (nats): the error
of hidden states is dominated by picture tokens that no answer depends on. Only the site's layer
runs: gradients of the answers (gradients.py) tell what the error of its output does to them, to
second order. So time grows with the number of layers, not with its square.

- A precision budget spreads weight bits over the sites so that their average holds, where they
  lower the divergence most.
- The guard raises sites that few bits break, the worst first: inputs to 8 bits, and weights too
  where that is not enough. Weights that have a budget stay as it set them.

Left out: interactions between sites; the search that follows sees them.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType

import torch
from torch import Tensor

from qvlm_hf.calibration.layers import LayerInput, live_layers, run_layer, working_precision
from qvlm_hf.calibration.measure.gradients import answer_gradients
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.record.report import PrecisionRaise
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.samples import IGNORE_INDEX
from qvlm_hf.calibration.search.budget import (
    WIDTHS,
    allocate_bits,
    fit_bits,
    room_in,
    saved_bytes,
)
from qvlm_hf.calibration.search.ranges import held_out_half, initialize_sites
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.calibration.settings import Precision
from qvlm_hf.models.graph import Layer, Segment

__all__ = ["choose_precisions", "gradient_draws", "site_parameters"]

# A site that alone moves the answers by more than this is broken, whatever the others do. On the
# demo model at W4A4 the worst of 42 sites moved them by 0.07 nats at its starting range, the fifth
# by 0.002, the median by 0.0006.
_BROKEN = 1e-3
_MOST_RAISED = 0.1  # share of the sites: a scheme that breaks more is the wrong scheme
_RAISED_BITS = 8
# Of a site, over all held-out samples. With 16 a random model's worst site came fifth.
_DIRECTIONS = 64
_GRADIENT_BYTES = 4 * 2**30  # fewer directions of large models, but one of every sample


def choose_precisions(
    calibration: Calibration,
) -> tuple[dict[str, Precision], dict[str, float], tuple[PrecisionRaise, ...]]:
    """The bits of the sites that differ from the scheme: budget, then guard.

    The model is in full precision (rotated, if it will be).

    Returns:
        The bits by site, and of the guard every site's divergence and the raises, worst first.
    """
    settings = calibration.settings
    if not settings.measures_sites:
        return {}, {}, ()
    parameters = site_parameters(calibration)
    budget = settings.precision_budget
    if isinstance(budget, str):  # refused before anything is measured
        costs, rest = saved_bytes(calibration.model, calibration.segments, settings)
        room = room_in(budget, costs, rest)
    probe = _Probe(calibration, len(parameters))
    widths: Mapping[str, int] = {}
    if budget is not None:
        curves = _measure_widths(probe)
        if isinstance(budget, str):
            widths = fit_bits(curves, costs, room)
        else:
            widths = allocate_bits(curves, parameters, budget)
    sensitivities: dict[str, float] = {}
    raises: list[PrecisionRaise] = []
    if settings.guards:
        sensitivities, raises = _guard(probe, settings.precision, widths)
    precisions = _with_widths(settings.precision, widths) | {
        raised.site: Precision(
            weight_bits=raised.weight_bits, activation_bits=raised.activation_bits
        )
        for raised in raises
    }
    return precisions, sensitivities, tuple(raises)


def _with_widths(precision: Precision, widths: Mapping[str, int]) -> dict[str, Precision]:
    return {name: replace(precision, weight_bits=bits) for name, bits in widths.items()}


class _Probe:
    """Measures sites one at a time."""

    def __init__(self, calibration: Calibration, sites: int) -> None:
        self._calibration = calibration
        self._steps = calibration.steps("sensitivity", sites)
        self._gradients = _held_out_gradients(calibration)
        self._steps.advance(0)  # the first site begins
        held_out = held_out_half(calibration.data)
        self._tokens = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in held_out)

    def divergences(
        self,
        precision: Precision,
        sites: Sequence[str] | None = None,
        widths: Mapping[str, int] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Site name -> mean KL(full precision || that site at `precision`) of the answers, in nats.

        16 activation bits leave the inputs alone; `sites` None is every live one. Those in `widths`
        have these weight bits instead.
        """
        settings = self._calibration.settings
        granularity = settings.activation_granularity if precision.activation_bits < 16 else None
        settings = replace(settings, **asdict(precision), activation_granularity=granularity)
        bits = _with_widths(precision, widths)
        trial = replace(self._calibration, settings=settings, precisions=bits, learned={})
        found: dict[str, float] = {}
        for segment in trial.segments:
            inputs = trial.inputs[segment.name]
            hidden = [entry.hidden for entry in inputs]
            for layer in live_layers(segment):
                names = {site.name for site in layer.sites if sites is None or site.name in sites}
                with working_precision([layer], inputs):
                    if names:
                        found |= self._layer_divergences(trial, segment, layer, hidden, names)
                    hidden = run_layer(layer.module, inputs, hidden)
        return found

    def _layer_divergences(
        self,
        trial: Calibration,
        segment: Segment,
        layer: Layer,
        hidden: Sequence[Tensor],
        names: Collection[str],
    ) -> dict[str, float]:
        every = trial.inputs[segment.name]
        (sites,) = initialize_sites(trial, segment.component, [layer], every, hidden)
        inputs, hidden = held_out_half(every), held_out_half(hidden)
        # none where a batch passes over the layer
        gradients = [draws.get(layer.name, []) for draws in self._gradients[segment.name]]
        full = run_layer(layer.module, inputs, hidden)
        found = {}
        for site in sites:
            if site.site.name not in names:
                continue
            with installed([site]):
                outputs = run_layer(layer.module, inputs, hidden)
            errors = (output - own for output, own in zip(outputs, full, strict=True))
            batches = zip(inputs, errors, gradients, strict=True)
            squares = sum(_mean_square(*batch) for batch in batches)
            (squares,) = ranks.all_reduce_numbers(squares)
            found[site.site.name] = squares / 2 / max(self._tokens, 1)
            self._steps.advance()
        return found


def gradient_draws(values: float, samples: float) -> int:
    """Directions of gradients, for so many values of hidden states of so many held-out samples."""
    most = int(_GRADIENT_BYTES // max(2 * values, 1))
    return max(1, min(most, math.ceil(_DIRECTIONS / max(samples, 1))))


def _held_out_gradients(calibration: Calibration) -> dict[str, list[dict[str, list[Tensor]]]]:
    """Segment -> per own held-out batch that reaches it: layer -> draws, in main memory."""
    data, own = calibration.data, calibration.own_data
    pictured = [batch for batch in data if "pixel_values" in batch.inputs]
    held_out = {
        name: held_out_half(data if len(inputs) == len(own) else pictured)
        for name, inputs in calibration.inputs.items()
    }
    batches = list({id(batch): batch for held in held_out.values() for batch in held}.values())
    samples = sum(len(batch.origins) for batch in batches)
    (values,) = ranks.all_reduce_numbers(
        sum(
            len(live_layers(segment)) * entry.hidden.numel()
            for segment in calibration.segments
            for entry in held_out_half(calibration.inputs[segment.name])
        )
    )
    draws = gradient_draws(values, samples)
    found: dict[int, dict[str, list[Tensor]]] = {id(batch): {} for batch in own}
    for index, name, gradients in answer_gradients(calibration, batches, draws=draws):
        kept = [keep(gradient.to("cpu", torch.bfloat16)) for gradient in gradients]
        found[id(batches[index])][name] = kept
    return {
        name: [found[id(batch)] for batch in held if id(batch) in found]
        for name, held in held_out.items()
    }


def _mean_square(entry: LayerInput, error: Tensor, gradients: Sequence[Tensor]) -> float:
    """The mean over draws of (g . e)^2, summed over samples; several rows may be one sample's."""
    if not gradients:
        return 0.0
    samples = len(entry.origins) if len(error) % len(entry.origins) == 0 else 1
    products = [
        (gradient.to(error.device) * error).float().view(samples, -1).sum(1)
        for gradient in gradients
    ]
    return float(torch.stack(products).square().mean(0).sum())


def _guard(
    probe: _Probe, scheme: Precision, widths: Mapping[str, int]
) -> tuple[dict[str, float], list[PrecisionRaise]]:
    """Every site's divergence at the scheme, and the cheapest raises that mend the worst.

    `widths`: site -> weight bits that a budget gave, which then stay; else empty.
    """
    measured = probe.divergences(scheme, widths=widths)
    broken = (name for name, kl in measured.items() if kl > _BROKEN)
    worst = sorted(broken, key=lambda name: -measured[name])
    worst = worst[: int(_MOST_RAISED * len(measured))]
    tried = [replace(scheme, activation_bits=max(scheme.activation_bits, _RAISED_BITS))]
    if not widths:
        tried.append(replace(tried[0], weight_bits=_RAISED_BITS))
    raises: dict[str, PrecisionRaise] = {}
    for precision in tried:
        pending = [name for name in worst if name not in raises]
        if precision != scheme and pending:
            for name, after in probe.divergences(precision, pending, widths).items():
                if after <= _BROKEN or (precision == tried[-1] and after < measured[name]):
                    raises[name] = PrecisionRaise(
                        site=name,
                        weight_bits=widths.get(name, precision.weight_bits),
                        activation_bits=precision.activation_bits,
                        before=measured[name],
                        after=after,
                    )
    return measured, [raises[name] for name in worst if name in raises]


def _measure_widths(probe: _Probe) -> dict[str, dict[int, float]]:
    """Site -> weight bits -> divergence with floating-point inputs, never rising with the bits."""
    curves: dict[str, dict[int, float]] = {}
    for bits in WIDTHS:
        for name, kl in probe.divergences(Precision(weight_bits=bits, activation_bits=16)).items():
            before = min(curves.setdefault(name, {}).values(), default=kl)
            curves[name][bits] = min(before, kl)
    return curves


def site_parameters(calibration: Calibration) -> dict[str, int]:
    """Site name -> weights in its modules, dead layers' included."""
    return {
        site.name: sum(linear.weight.numel() for linear in site.linears)
        for segment in calibration.segments
        for layer in segment.layers
        for site in layer.sites
    }
