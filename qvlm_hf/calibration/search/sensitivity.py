"""Which sites can bear few bits: the answers' divergence when one site alone is quantized, and what follows from it.

Forward passes only. Every site is tried by itself, everything else in full precision, ranges of the
even calibration batches on the odd ones; what counts is the KL divergence of the answers (nats),
because the error of hidden states is dominated by picture tokens that no answer depends on. Two
decisions are made of it:

- the guard lifts sites that few bits break, the worst first: inputs to 8 bits, and weights too
  where that is not enough;
- a precision budget spreads weight bits over the sites so that their average holds, where they
  lower the divergence most.

Left out: interactions between sites; the search that follows sees them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from torch import Tensor, nn

from qvlm_hf.calibration.layers import LayerInput, calibrating
from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.report import Lift
from qvlm_hf.calibration.samples import Batch
from qvlm_hf.calibration.search.ranges import initialize_sites, judging
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.calibration.settings import CalibrationSettings, Precision
from qvlm_hf.models.graph import Segment, get_linear

__all__ = ["SensitivityProbe", "allocate_bits", "guard_sites", "measure_widths", "site_parameters"]

# A site that alone moves the answers by more than this is broken, whatever the others do. On the
# demo model at W4A4 the worst of 42 sites moved them by 0.07 nats at its starting range, the fifth
# by 0.002, the median by 0.0006.
_BROKEN = 1e-3
_MOST_LIFTED = 0.1  # share of the sites: a scheme that breaks more is the wrong scheme, not a matter for exceptions
_LIFTED_BITS = 8
_WIDTHS = (2, 3, 4, 5, 6, 8)  # weight bits that a budget chooses from


class SensitivityProbe:
    """Measures sites one at a time.

    Args:
        model: in full precision (rotated, if it will be).
        segments: what will be quantized.
        inputs: first layer's name -> what enters it, per batch.
        data: the calibration batches, with answers.
        settings: candidates and schemes.
        advance: called after every forward pass over the judging batches.
    """

    def __init__(
        self,
        model: nn.Module,
        segments: Sequence[Segment],
        inputs: Mapping[str, Sequence[LayerInput]],
        data: Sequence[Batch],
        settings: CalibrationSettings,
        advance: Callable[[], None],
    ) -> None:
        self._model, self._segments, self._inputs, self._settings, self._advance = (
            model,
            segments,
            inputs,
            settings,
            advance,
        )
        self._data = judging(data)
        self._reference = self._answers()

    def divergences(
        self, precision: Precision, sites: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Site name -> mean KL(full precision || that site at `precision`) over answer tokens, in nats.

        Args:
            precision: 16 activation bits leave the inputs alone.
            sites: which; None is every live one.
        """
        settings = replace(
            self._settings, weight_bits=precision.weight_bits, activation_bits=precision.activation_bits,
            activation_granularity=None if precision.activation_bits == 16 else self._settings.activation_granularity,
        )  # fmt: skip
        found = {}
        for segment in self._segments:
            live = [layer for layer in segment.layers if not layer.dead]
            wanted = [
                site
                for layer in live
                for site in layer.sites
                if sites is None or site.name in sites
            ]
            if not wanted:
                continue
            inputs = self._inputs[live[0].name]
            hidden = [entry.hidden for entry in inputs]
            with calibrating(self._model, live, inputs):
                trials = initialize_sites(
                    self._model, live, segment.component, inputs, hidden, settings
                )
            for trial in (trial for row in trials for trial in row if trial.site in wanted):
                with installed([trial]):
                    found[trial.site.name] = self._divergence(self._answers())
                trial.settle()
                self._advance()
        return found

    def _answers(self) -> list[Tensor]:
        return [logits for batch in self._data for logits in answer_logits(self._model, batch)]

    def _divergence(self, answers: Sequence[Tensor]) -> float:
        total = tokens = 0.0
        for full, logits in zip(self._reference, answers, strict=True):
            if len(full):
                total, tokens = total + answer_kl(full, logits) * len(full), tokens + len(full)
        return total / tokens if tokens else 0.0


def guard_sites(
    probe: SensitivityProbe, settings: CalibrationSettings
) -> tuple[dict[str, float], list[Lift]]:
    """Finds the sites that the scheme breaks and the cheapest precision that mends them.

    Returns:
        The divergence of every site at the scheme, and the lifted ones, worst first.
    """
    scheme = settings.precision
    measured = probe.divergences(scheme)
    worst = sorted(
        (name for name, kl in measured.items() if kl > _BROKEN), key=lambda name: -measured[name]
    )
    worst = worst[: int(_MOST_LIFTED * len(measured))]
    activation_bits = max(settings.activation_bits, _LIFTED_BITS)
    lifts: dict[str, Lift] = {}
    for precision in (
        replace(scheme, activation_bits=activation_bits),
        Precision(weight_bits=_LIFTED_BITS, activation_bits=activation_bits),
    ):
        pending = [name for name in worst if name not in lifts]
        if precision != scheme and pending:
            for name, after in probe.divergences(precision, pending).items():
                last = precision.weight_bits == _LIFTED_BITS
                if after <= _BROKEN or (last and after < measured[name]):
                    lifts[name] = Lift(
                        site=name, before=measured[name], after=after, **asdict(precision)
                    )
    return measured, [lifts[name] for name in worst if name in lifts]


def measure_widths(probe: SensitivityProbe) -> dict[str, dict[int, float]]:
    """Site -> weight bits -> divergence with floating-point inputs, never rising with the bits."""
    curves: dict[str, dict[int, float]] = {}
    for bits in _WIDTHS:
        for name, kl in probe.divergences(Precision(weight_bits=bits, activation_bits=16)).items():
            before = min(curves.setdefault(name, {}).values(), default=kl)
            curves[name][bits] = min(before, kl)
    return curves


def site_parameters(model: nn.Module, segments: Sequence[Segment]) -> dict[str, int]:
    """Site name -> weights in its modules, dead layers' included."""
    sites = (site for segment in segments for layer in segment.layers for site in layer.sites)
    return {
        site.name: sum(get_linear(model, name).weight.numel() for name in site.modules)
        for site in sites
    }


def allocate_bits(
    curves: Mapping[str, Mapping[int, float]], parameters: Mapping[str, int], budget: float
) -> dict[str, int]:
    """Weight bits of every site so that the average over all weights stays within the budget.

    Starts with the fewest bits everywhere and takes, as long as one fits, the raise that lowers the
    divergence most per added bit. A site without a curve (of a dead layer) stays at the fewest
    bits.

    Args:
        curves: site -> bits -> divergence; every site has the same widths.
        parameters: site -> number of weights.
        budget: average bits of a weight.

    Returns:
        Site -> bits. No further raise of any site fits into the budget.

    Raises:
        ValueError: the budget is below the fewest bits.
    """
    widths = sorted(next(iter(curves.values())))
    bits = dict.fromkeys(parameters, widths[0])
    room = budget * sum(parameters.values()) - widths[0] * sum(parameters.values())
    if room < 0:
        raise ValueError(
            f"precision_budget={budget} is below {widths[0]} bits, the fewest a weight can have: "
            f"raise it."
        )
    while True:
        raises = [
            ((curve[bits[name]] - curve[wider]) / cost, -cost, name, wider)
            for name, curve in curves.items()
            for wider in widths
            if wider > bits[name] and (cost := (wider - bits[name]) * parameters[name]) <= room
        ]
        if not raises:
            return bits
        _, cost, name, wider = max(raises)
        bits[name], room = wider, room + cost
