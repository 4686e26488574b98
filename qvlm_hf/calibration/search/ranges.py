"""Range initialisation: every site gets its candidates, and a start by lowest L_p error.

Two passes over the layers in full precision, fed with the outputs of the quantized layers below.
The first finds the tails of each site's input, the second measures the L_2.4 error of every
candidate. Memory does not grow with the number of tokens.

A range that is judged on the values it was taken from never clips what it has not seen, and the
tightest always looks best. So the search tries ranges of the even batches on the odd
(`held_out_half`); the chosen range is taken from all of them in the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
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
from qvlm_hf.calibration.search.sites import (
    QuantizedSite,
    SiteCandidate,
    join_parts,
    site_input,
)
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.scheme import is_per_channel, is_per_position, unknown_granularity
from qvlm_hf.models.graph import Layer, Site

__all__ = ["held_out_half", "initialize_sites"]

_T = TypeVar("_T")

# An expert that saw fewer has the ranges that the inputs of all experts of its layer give, and
# weights rounded to nearest. tests/bench/expert_tokens.py measures where its own pay, W4A4 at 128
# channels: at 32 tokens they lose 1.15 to 1.22 times as much, at 64 0.90 to 1.01, at 128 0.75 to
# 0.82.
_FEW_TOKENS = 64


@dataclass
class _Shown:
    """What calibration showed of a site's input.

    Attributes:
        tokens: how many.
        even, all: granularity -> tails of the even batches, to try ranges, and of all, to keep.
    """

    tokens: int = 0
    even: dict[str, TailObserver] = field(default_factory=dict)
    all: dict[str, TailObserver] = field(default_factory=dict)


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
    ranges = calibration.settings.candidates(component)
    sites = [site for layer in layers for site in layer.sites]
    whole = {part: site for site in sites for part in site.parts}
    # a site of experts stands for what all of them saw together
    shown = {site: _Shown() for site in (*whole, *sites)}
    even_ids = {id(entry) for entry in inputs[::2]}
    percentile = min(candidate.percentile for candidate in ranges)
    granularities = sorted({candidate.granularity for candidate in ranges if candidate.static})
    tokens_in_all, rows_in_all = ranks.all_reduce_numbers(
        count_tokens(inputs), sum(entry.hidden.shape[0] for entry in inputs)
    )

    def observe(part: Site, x: Tensor, entry: LayerInput) -> None:
        entry.require_finite(x, f"the input of {part.name}")
        values = valid_tokens(x, routed(entry.valid, part.linears[0], x))
        own = shown[part]
        own.tokens += len(values)
        if not len(values):
            return
        observed = [own] if whole[part] is part else [own, shown[whole[part]]]
        for granularity in granularities:
            if is_per_channel(granularity):
                series, count = values.T, tokens_in_all
            elif is_per_position(granularity):
                series = (x if x.dim() == 3 else x.unsqueeze(0)).transpose(0, 1).flatten(1)
                count = rows_in_all * x.shape[-1]
            else:
                raise unknown_granularity(granularity)
            for one in observed:
                for tails in (one.even, one.all) if id(entry) in even_ids else (one.all,):
                    observer = TailObserver(count=count, percentile=percentile)
                    tails.setdefault(granularity, observer).update(series)

    _feed(layers, inputs, hidden, observe)
    _join_processes(list(shown.values()), granularities, hidden[0].device)
    made = {
        site.name: join_parts(
            site,
            [
                _quantized_site(calibration, site, part, ranges, shown[part], shown[site])
                for part in site.parts
            ],
        )
        for site in sites
    }
    errors = _start_errors(calibration, component, layers, inputs, hidden, made)
    for name, quantized in made.items():
        quantized.active = min(errors[name], key=errors[name].__getitem__)
        if name in calibration.learned:
            quantized.add_learned(calibration.learned[name])
    return [[made[site.name] for site in layer.sites] for layer in layers]


def _start_errors(
    calibration: Calibration,
    component: str,
    layers: Sequence[Layer],
    inputs: Sequence[LayerInput],
    hidden: Sequence[Tensor],
    sites: Mapping[str, QuantizedSite],
) -> dict[str, dict[int, float]]:
    """Site -> candidates of the starting granularity -> L_p error on the batches held out."""
    first, *others = calibration.settings.candidates(component)
    granularities = [candidate.granularity for candidate in (first, *others)]
    starts = [i for i, own in enumerate(granularities) if own == first.granularity]
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


def _join_processes(
    shown: Sequence[_Shown], granularities: Sequence[str], device: torch.device
) -> None:
    """Adds what other processes saw; an expert may get tokens in some alone."""
    if ranks.world_size() == 1:
        return
    tokens = ranks.all_reduce_numbers(*(one.tokens for one in shown))
    for one, count in zip(shown, tokens, strict=True):
        one.tokens = count
        for tails, granularity in product((one.even, one.all), granularities):
            observer = tails.pop(granularity, None) or TailObserver(count=0, percentile=1.0)
            observer.join(device)
            if observer.seen:
                tails[granularity] = observer


def _quantized_site(
    calibration: Calibration,
    site: Site,
    part: Site,
    ranges: Sequence[RangeCandidate],
    own: _Shown,
    together: _Shown,
) -> QuantizedSite:
    """A part of a site: an expert that saw too little has the ranges of all experts together."""
    few = site.experts and own.tokens < _FEW_TOKENS
    even, everything = (
        together_tails if few or not own_tails else own_tails
        for own_tails, together_tails in ((own.even, together.even), (own.all, together.all))
    )
    if any(candidate.static for candidate in ranges) and not everything:
        raise ValueError(
            f"calibration did not reach {part.name}: no sample has what it reads (pictures for a "
            f"vision module)."
        )
    precision = calibration.precision(site)
    bits = precision.activation_bits
    candidates = [
        SiteCandidate(
            candidate,
            calibration.settings.module_scheme(candidate.granularity, part.hadamard, precision),
            candidate_qparams(candidate, even, bits),
            candidate_qparams(candidate, everything, bits),
        )
        for candidate in ranges
    ]
    quantized = QuantizedSite(part, part.linears, candidates)
    if site.experts:
        quantized.tokens, quantized.few_tokens = own.tokens, few
    return quantized


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
