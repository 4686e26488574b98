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

import torch
from torch import Tensor

from qvlm_hf.calibration.layers import (
    LayerInput,
    count_tokens,
    observe_inputs,
    routed,
    run_layer,
    valid_tokens,
)
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.search.observers import LpError, TailObserver, candidate_qparams
from qvlm_hf.calibration.search.sites import ExpertsSite, QuantizedSite, SiteCandidate, site_input
from qvlm_hf.calibration.settings import CalibrationSettings, Precision, RangeCandidate
from qvlm_hf.format.scheme import is_per_channel, is_per_position, unknown_granularity
from qvlm_hf.models.graph import Layer, Site

__all__ = ["held_out_half", "initialize_sites"]

_T = TypeVar("_T")
_Tails = Mapping[str, TailObserver]  # by granularity

# An expert that saw fewer has the ranges that the inputs of all experts of its layer give, and
# weights rounded to nearest. tests/bench/expert_tokens.py measures where its own pay, W4A4 at 128
# channels: at 32 tokens they lose 1.15 to 1.22 times as much, at 64 0.90 to 1.01, at 128 0.75 to
# 0.82.
_FEW_TOKENS = 64


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
        inputs: per own batch, the masks and other arguments of the segment.
        hidden: per own batch [B, T, H], what enters the first layer.

    Raises:
        ValueError: a site was not reached, its input is not finite, or it has no fixed number of
            positions for "token".
    """
    settings = calibration.settings
    ranges = settings.candidates(component)
    sites = [site for layer in layers for site in layer.sites]
    parts = [(site, part) for site in sites for part in site.parts]
    whole = {part.name: site for site, part in parts if site.experts}
    tokens = dict.fromkeys(whole, 0)  # that each expert saw
    # by site: tails of the even batches, to try ranges, and of all batches, to keep
    even: dict[str, dict[str, TailObserver]] = defaultdict(dict)
    everything: dict[str, dict[str, TailObserver]] = defaultdict(dict)
    even_ids = {id(entry) for entry in inputs[::2]}
    percentile = min(candidate.percentile for candidate in ranges)
    granularities = sorted({candidate.granularity for candidate in ranges if candidate.static})
    tokens_in_all, rows_in_all = ranks.all_reduce_numbers(
        count_tokens(inputs), sum(entry.hidden.shape[0] for entry in inputs)
    )

    def observe(site: Site, x: Tensor, entry: LayerInput) -> None:
        entry.require_finite(x, f"the input of {site.name}")
        names, values = [site.name], valid_tokens(x, routed(entry.valid, site.linears[0], x))
        if site.name in whole:
            tokens[site.name] += len(values)
            names.append(_pool(whole[site.name]))
        if not len(values):
            return
        for granularity in granularities:
            if is_per_channel(granularity):
                series, count = values.T, tokens_in_all
            elif is_per_position(granularity):
                series = (x if x.dim() == 3 else x.unsqueeze(0)).transpose(0, 1).flatten(1)
                count = rows_in_all * x.shape[-1]
            else:
                raise unknown_granularity(granularity)
            for tails in (even, everything) if id(entry) in even_ids else (everything,):
                for name in names:
                    observer = TailObserver(count=count, percentile=percentile)
                    tails[name].setdefault(granularity, observer).update(series)

    _feed(layers, inputs, hidden, observe)
    tokens = dict(zip(tokens, ranks.all_reduce_numbers(*tokens.values()), strict=True))
    names = [*(part.name for _, part in parts), *{_pool(site): 0 for site in whole.values()}]
    every = [tails[name] for tails in (even, everything) for name in names]
    _join_processes(every, granularities, hidden[0].device)
    made = {
        part.name: _quantized_site(
            calibration.settings,
            calibration.precision(site),
            part,
            ranges,
            *(_tails(of, site, part, tokens.get(part.name)) for of in (even, everything)),
        )
        for site, part in parts
    }
    found = {site.name: _joined(site, made, tokens) for site in sites}
    errors = _start_errors(calibration, component, layers, inputs, hidden, found)
    for name, quantized in found.items():
        quantized.active = min(errors[name], key=errors[name].__getitem__)
        if name in calibration.learned:
            quantized.add_learned(calibration.learned[name])
    return [[found[site.name] for site in layer.sites] for layer in layers]


def _start_errors(
    calibration: Calibration,
    component: str,
    layers: Sequence[Layer],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    sites: Mapping[str, QuantizedSite],
) -> dict[str, dict[int, float]]:
    """Site -> candidates of the starting granularity -> L_p error on the batches held out."""
    settings = calibration.settings
    start = settings.start_granularity(component)
    ranges = settings.candidates(component)
    starts = [i for i, candidate in enumerate(ranges) if candidate.granularity == start]
    errors = {
        part.site.name: LpError(
            [part.candidates[i].grid for i in starts],
            calibration.precision(site.site).activation_bits,
        )
        for site in sites.values()
        for part in site.parts
    }

    def measure(site: Site, x: Tensor, entry: LayerInput) -> None:
        # positions stay in place for grids per position; only they need the shape
        valid = routed(entry.valid, site.linears[0], x)
        errors[site.name].update(x if valid is None else x[valid])

    if len(starts) > 1:
        _feed(layers, held_out_half(inputs), held_out_half(hidden), measure)
    found = {}
    for name, site in sites.items():
        totals = [errors[part.site.name].totals for part in site.parts]
        sums = ranks.all_reduce_numbers(*(sum(column) for column in zip(*totals, strict=True)))
        found[name] = dict(zip(starts, sums, strict=True))
    return found


def _joined(
    site: Site, made: Mapping[str, QuantizedSite], tokens: Mapping[str, int]
) -> QuantizedSite:
    """The site, or the sites of its experts as one."""
    parts = [made[part.name] for part in site.parts]
    if not site.experts:
        return parts[0]
    seen = [tokens[part.name] for part in site.parts]
    for quantized, count in zip(parts, seen, strict=True):
        quantized.few_tokens = count < _FEW_TOKENS
    return ExpertsSite(site, parts, seen)


def _join_processes(
    every: Sequence[dict[str, TailObserver]], granularities: Sequence[str], device: torch.device
) -> None:
    """Adds to the sites' tails what other processes saw; an expert may get tokens in some alone."""
    if ranks.world_size() == 1:
        return
    for tails in every:
        for granularity in granularities:
            observer = tails.pop(granularity, None) or TailObserver(count=0, percentile=1.0)
            observer.join(device)
            if observer.seen:
                tails[granularity] = observer


def _pool(site: Site) -> str:
    """The key of what all experts of a site saw together."""
    return f"{site.name} and all others"


def _tails(of: Mapping[str, _Tails], site: Site, part: Site, tokens: int | None) -> _Tails:
    """What a site's input showed; that of all experts, where an expert saw too little of it."""
    few = tokens is not None and (tokens < _FEW_TOKENS or not of.get(part.name))
    return of.get(_pool(site) if few else part.name, {})


def _quantized_site(
    settings: CalibrationSettings,
    precision: Precision,
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
    bits = precision.activation_bits
    candidates = [
        SiteCandidate(
            candidate,
            settings.module_scheme(candidate.granularity, site.hadamard, precision),
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
    sites = [site for layer in layers for site in layer.sites]
    modules = {part: part.linears[0] for site in sites for part in site.parts}
    for entry, h in zip(inputs, hidden, strict=True):

        def show(site: Site, args: tuple[Any, ...], _: Any, entry: LayerInput = entry) -> None:
            see(site, site_input(site, args[0].detach()), entry)

        with observe_inputs(modules, show):
            state = [h]
            for layer in layers:
                state = run_layer(layer.module, [entry], state)
