"""Range initialisation: every site of a block gets its candidates made concrete, and a start by lowest L_p error of its own input.

Two passes over the block in full precision, fed with the outputs of the quantized layers below: one
finds the tails of each site's input, one measures the L_2.4 error of every candidate. Memory does
not grow with the number of tokens.

A range that is judged on the values it was taken from never clips what it has not seen, and the
tightest always looks best. So the search tries ranges of the even batches on the odd ones
(`judging`); what is chosen is taken from all of them in the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import LayerInput, count_tokens, run_layer
from qvlm_hf.calibration.search.observers import LpError, TailObserver, candidate_qparams
from qvlm_hf.calibration.search.sites import LearnedRanges, TrialSite, site_input
from qvlm_hf.calibration.settings import CalibrationSettings, Precision, RangeCandidate
from qvlm_hf.models.graph import Layer, Site, get_linear

__all__ = ["initialize_sites", "judging"]


def judging(batches: Sequence[Any]) -> Sequence[Any]:
    """The batches that candidates are judged on: every second one; all, where there is only one."""
    return batches[1::2] or batches


def initialize_sites(
    model: nn.Module,
    layers: Sequence[Layer],
    component: str,
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    settings: CalibrationSettings,
    precisions: Mapping[str, Precision] | None = None,
    learned: Mapping[str, LearnedRanges] | None = None,
) -> list[list[TrialSite]]:
    """The sites of consecutive layers with their candidates, `active` set to the best one of the starting granularity or the learned one.

    Args:
        model: holds the layers, in the compute dtype.
        layers: consecutive layers of one segment.
        component: "vision", "projector" or "language".
        inputs: per batch, the masks and other arguments of the segment.
        hidden: per batch [B, T, H], what enters the first layer.
        settings: candidates and schemes.
        precisions: site name -> bits, where they are not those of the settings.
        learned: site name -> ranges that were learned: one more candidate, and the start.

    Returns:
        Per layer, per site.

    Raises:
        ValueError: a site was not reached, its input is not finite, or it has no fixed number of
            positions for "token".
    """
    candidates, precisions = settings.candidates(component), precisions or {}
    percentile = min(candidate.percentile for candidate in candidates)
    sites = [site for layer in layers for site in layer.sites]
    # per site and granularity: of the batches that ranges are tried from, and of all
    observers: dict[str, dict[str, TailObserver]] = {site.name: {} for site in sites}
    everything: dict[str, dict[str, TailObserver]] = {site.name: {} for site in sites}
    fitted = {id(entry) for entry in inputs[::2]}

    def observe(name: str, x: Tensor, entry: LayerInput) -> None:
        if not torch.isfinite(x).all():
            raise ValueError(
                f"the input of {name} holds NaN or infinity for the samples "
                f"{', '.join(entry.origins)}: check weights and data."
            )
        for granularity in {candidate.granularity for candidate in candidates if candidate.static}:
            series = _series(x, entry, granularity)
            count = (
                count_tokens(inputs)
                if granularity == "channel"
                else sum(e.hidden.shape[0] for e in inputs) * x.shape[-1]
            )
            for group in (observers, everything) if id(entry) in fitted else (everything,):
                group[name].setdefault(
                    granularity, TailObserver(count=count, percentile=percentile)
                ).update(series)

    _feed(model, layers, inputs, hidden, observe)
    trials = {
        site.name: _trial_site(
            model,
            site,
            candidates,
            observers[site.name],
            everything[site.name],
            settings,
            precisions.get(site.name, settings.precision),
        )
        for site in sites
    }
    starts = [
        i
        for i, candidate in enumerate(candidates)
        if candidate.granularity == settings.start_granularity(component)
    ]
    errors = {
        name: LpError([trial.qparams[i] for i in starts], trial.schemes[0].activation_bits)
        for name, trial in trials.items()
    }

    def measure(name: str, x: Tensor, entry: LayerInput) -> None:
        # positions stay in place for per-position grids; only they need the shape
        errors[name].update(
            x if entry.keep is None or x.shape[:2] != entry.keep.shape else x[entry.keep]
        )

    if len(starts) > 1:
        _feed(model, layers, judging(inputs), judging(hidden), measure)
    for name, trial in trials.items():
        trial.active = starts[min(range(len(starts)), key=errors[name].totals.__getitem__)]
        if learned and name in learned:
            trial.add_learned(learned[name])
    return [[trials[site.name] for site in layer.sites] for layer in layers]


def _trial_site(
    model: nn.Module,
    site: Site,
    candidates: Sequence[RangeCandidate],
    observers: dict[str, TailObserver],
    everything: dict[str, TailObserver],
    settings: CalibrationSettings,
    precision: Precision,
) -> TrialSite:
    if any(candidate.static for candidate in candidates) and not everything:
        raise ValueError(
            f"calibration did not reach {site.name}: no sample has what it reads (pictures for a "
            f"vision module)."
        )
    tried, final = (
        [candidate_qparams(candidate, group, precision.activation_bits) for candidate in candidates]
        for group in (observers, everything)
    )
    schemes = [
        settings.module_scheme(candidate.granularity, site.hadamard, precision)
        for candidate in candidates
    ]
    linears = [get_linear(model, name) for name in site.modules]
    return TrialSite(site, linears, candidates, tried, schemes, final)


def _series(x: Tensor, entry: LayerInput, granularity: str) -> Tensor:
    """[B, T, C] -> the series that share a range: [C, tokens kept] or [T, B * C]."""
    if granularity == "token":
        x = x if x.dim() == 3 else x.unsqueeze(0)
        return x.transpose(0, 1).flatten(1)
    if entry.keep is not None and x.shape[:2] == entry.keep.shape:
        x = x[entry.keep]
    return x.flatten(0, -2).T


def _feed(
    model: nn.Module,
    layers: Sequence[Layer],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    see: Callable[[str, Tensor, LayerInput], None],
) -> None:
    """Runs the layers batch by batch and shows `see` the input of every site."""
    for entry, h in zip(inputs, hidden, strict=True):
        with _site_hooks(model, layers, partial(_see_entry, see, entry)):
            state = [h]
            for layer in layers:
                state = run_layer(model.get_submodule(layer.name), [entry], state)


def _see_entry(
    see: Callable[[str, Tensor, LayerInput], None], entry: LayerInput, name: str, x: Tensor
) -> None:
    see(name, x, entry)


@contextmanager
def _site_hooks(
    model: nn.Module, layers: Sequence[Layer], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def hook(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: see(site.name, site_input(site, args[0].detach()))

    with ExitStack() as stack:
        for site in (site for layer in layers for site in layer.sites):
            stack.callback(
                model.get_submodule(site.name).register_forward_pre_hook(hook(site)).remove
            )
        yield
