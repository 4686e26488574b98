"""Range initialisation: every site gets its candidates, and a start by lowest L_p error.

Two passes over the layers in full precision, fed with the outputs of the quantized layers below.
The first finds the tails of each site's input, the second measures the L_2.4 error of every
candidate. Memory does not grow with the number of tokens.

A range that is judged on the values it was taken from never clips what it has not seen, and the
tightest always looks best. So the search tries ranges of the even batches on the odd
(`held_out_half`); the chosen range is taken from all of them in the end.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from qvlm_hf.calibration.layers import (
    LayerInput,
    count_tokens,
    observe_inputs,
    run_layer,
    valid_tokens,
)
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.search.observers import LpError, TailObserver, candidate_qparams
from qvlm_hf.calibration.search.sites import QuantizedSite, SiteCandidate, site_input
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.models.graph import Layer, Site

__all__ = ["held_out_half", "initialize_sites"]

_T = TypeVar("_T")
_Tails = Mapping[str, TailObserver]  # by granularity


def held_out_half(batches: Sequence[_T]) -> Sequence[_T]:
    """The batches that candidates are judged on: every second one; all, where there is only one."""
    return batches[1::2] or batches


def initialize_sites(
    calibration: Calibration,
    component: str,
    layers: Sequence[Layer],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
) -> list[list[QuantizedSite]]:
    """The sites of consecutive layers, `active` set to the best start.

    The start is the candidate of the starting granularity with the lowest L_p error, or the learned
    ranges where the site has them.

    Args:
        calibration: its model (the layers in the compute dtype), settings, precisions and learned
            ranges.
        component: "vision", "projector" or "language".
        layers: consecutive layers of one segment.
        inputs: per batch, the masks and other arguments of the segment.
        hidden: per batch [B, T, H], what enters the first layer.

    Returns:
        Per layer, per site.

    Raises:
        ValueError: a site was not reached, its input is not finite, or it has no fixed number of
            positions for "token".
    """
    settings = calibration.settings
    ranges = settings.candidates(component)
    sites = [site for layer in layers for site in layer.sites]
    # by site: tails of the even batches, to try ranges, and of all batches, to keep
    even: dict[str, dict[str, TailObserver]] = defaultdict(dict)
    everything: dict[str, dict[str, TailObserver]] = defaultdict(dict)
    even_ids = {id(entry) for entry in inputs[::2]}
    percentile = min(candidate.percentile for candidate in ranges)

    def observe(site: Site, x: Tensor, entry: LayerInput) -> None:
        entry.require_finite(x, f"the input of {site.name}")
        for granularity in {candidate.granularity for candidate in ranges if candidate.static}:
            if granularity == "channel":
                series, count = valid_tokens(x, entry.valid).T, count_tokens(inputs)
            else:
                series = (x if x.dim() == 3 else x.unsqueeze(0)).transpose(0, 1).flatten(1)
                count = sum(e.hidden.shape[0] for e in inputs) * x.shape[-1]
            for tails in (even, everything) if id(entry) in even_ids else (everything,):
                observer = TailObserver(count=count, percentile=percentile)
                tails[site.name].setdefault(granularity, observer).update(series)

    _feed(layers, inputs, hidden, observe)
    found = {
        site.name: _quantized_site(
            calibration, site, ranges, even[site.name], everything[site.name]
        )
        for site in sites
    }
    start = settings.start_granularity(component)
    starts = [i for i, candidate in enumerate(ranges) if candidate.granularity == start]
    errors = {
        site.name: LpError(
            [found[site.name].candidates[i].grid for i in starts],
            calibration.precision(site).activation_bits,
        )
        for site in sites
    }

    def measure(site: Site, x: Tensor, entry: LayerInput) -> None:
        # positions stay in place for grids per position; only they need the shape
        padded = entry.valid is not None and x.shape[:2] == entry.valid.shape
        errors[site.name].update(x[entry.valid] if padded else x)

    if len(starts) > 1:
        _feed(layers, held_out_half(inputs), held_out_half(hidden), measure)
    for name, site in found.items():
        site.active = starts[min(range(len(starts)), key=errors[name].totals.__getitem__)]
        if name in calibration.learned:
            site.add_learned(calibration.learned[name])
    return [[found[site.name] for site in layer.sites] for layer in layers]


def _quantized_site(
    calibration: Calibration,
    site: Site,
    ranges: Sequence[RangeCandidate],
    even: _Tails,
    everything: _Tails,
) -> QuantizedSite:
    if any(candidate.static for candidate in ranges) and not everything:
        raise ValueError(
            f"calibration did not reach {site.name}: no sample has what it reads (pictures for a "
            f"vision module)."
        )
    precision = calibration.precision(site)
    bits = precision.activation_bits
    candidates = [
        SiteCandidate(
            candidate,
            calibration.settings.scheme(candidate.granularity, site.hadamard, precision),
            candidate_qparams(candidate, even, bits),
            candidate_qparams(candidate, everything, bits),
        )
        for candidate in ranges
    ]
    return QuantizedSite(site, list(site.linears), candidates)


def _feed(
    layers: Sequence[Layer],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    see: Callable[[Site, Tensor, LayerInput], None],
) -> None:
    """Runs the layers batch by batch and shows `see` the input of every site."""
    sites = {site: site.linears[0] for layer in layers for site in layer.sites}
    for entry, h in zip(inputs, hidden, strict=True):

        def show(site: Site, args: tuple[Any, ...], _: Any, entry: LayerInput = entry) -> None:
            see(site, site_input(site, args[0].detach()), entry)

        with observe_inputs(sites, show):
            state = [h]
            for layer in layers:
                state = run_layer(layer.module, [entry], state)
