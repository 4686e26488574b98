"""The joint search inside one block (eq. 3), never behind the greedy one (eq. 2).

The objective is the squared error of the block's output against full precision, over the valid
tokens and by their importance, with the inputs that the quantized layers below produce:

1. greedy: each layer alone, its own output (eq. 2): the same search on a block of one layer;
2. joint: all combinations of one candidate per layer, out of the three that did best for each layer
   alone, sharing the prefix of the block, screened on a part of the batches;
3. refine: coordinate descent over single sites until a sweep brings nothing.

Greedy, the L_p start and the best combinations are compared on all batches and the best is refined,
so on a block joint <= greedy. Screening decides only which candidates are looked at; every accepted
step is measured on all batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qvlm_hf.calibration.layers import LayerInput, run_layer, valid_tokens
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.search.sites import QuantizedSite

__all__ = ["BlockSearch", "SearchResult", "search_block"]

_T = TypeVar("_T")
Choice = tuple[tuple[int, ...], ...]  # per layer, per site: index of a candidate

# Every fourth batch screens (ranks.SCREENED); the two best combinations are measured in full. On
# the demo model (W4A4) the block errors ended between 0.7 % below and 0.2 % above those of the
# unscreened search, with 40 % of its layer runs and half its time.
_SHORTLIST = 3  # candidates of a layer that its block tries jointly
_FINALISTS = 2
_CLEAR = 0.01  # relative loss of a candidate at one site that no other site's change makes good
_MIN_GAIN = 1e-4  # a smaller relative gain is noise of the calibration set


@dataclass(frozen=True)
class SearchResult:
    """The result of a block's search.

    Attributes:
        choice: candidate index per layer and site.
        initial, greedy, joint: squared error of the block output relative to its squared norm, of
            the L_p start, the greedy solution and the result.
        evaluations: layers run over all batches, a measure of work; a screening batch counts as its
            share.
        ranking: candidates of the first layer, those of the best combinations first.
    """

    choice: Choice
    initial: float
    greedy: float
    joint: float
    evaluations: float
    ranking: tuple[int, ...]


@dataclass
class BlockSearch:
    """Evaluates choices on one block; keeps count of the work.

    Attributes:
        layers: the block's layers in the compute dtype, their sites installed.
        sites: per layer, per site.
        inputs: per own batch, masks and other arguments of the segment.
        hidden: per own batch [B, T, H], output of the quantized layers below.
        targets: per layer, per own batch [B, T, H], the full-precision output of each layer.
        weights: per layer, per own batch [B, T], how much a token's error counts; none: all alike.
        places: of the own batches among those of all processes; none: they are all.
        evaluations: layers run over all batches.
    """

    layers: Sequence[nn.Module]
    sites: Sequence[Sequence[QuantizedSite]]
    inputs: Sequence[LayerInput]
    hidden: Sequence[Tensor]
    targets: Sequence[Sequence[Tensor]]
    weights: Sequence[Sequence[Tensor]] = ()
    places: Sequence[int] = ()
    evaluations: float = 0.0

    def __post_init__(self) -> None:
        self.weights = self.weights or [
            [torch.ones_like(h[..., 0], dtype=torch.float32) for h in target]
            for target in self.targets
        ]
        self.places = self.places or range(len(self.inputs))
        self._screen = [i for i, place in enumerate(self.places) if place % ranks.SCREENED == 0]
        self.batches, screen = ranks.all_reduce_numbers(len(self.inputs), len(self._screen))
        self._screened_share = screen / self.batches

    def part(self, values: Sequence[_T], *, screen: bool) -> Sequence[_T]:
        """Of values per own batch those that screen, or all."""
        return [values[place] for place in self._screen] if screen else values

    def run(
        self, layer: int, choice: Sequence[int], hidden: Sequence[Tensor], *, screen: bool = False
    ) -> list[Tensor]:
        """Output of one layer under a choice for its sites."""
        for site, index in zip(self.sites[layer], choice, strict=True):
            site.active = index
            # without a batch of its own here, a process must not try in another order
            for part in site.parts if ranks.world_size() > 1 else ():
                part.tried_weights()
        self.evaluations += self._screened_share if screen else 1
        return run_layer(self.layers[layer], self.part(self.inputs, screen=screen), hidden)

    def error(self, layer: int, hidden: Sequence[Tensor], *, screen: bool = False) -> float:
        """Relative squared error of the hidden states that leave `layer`, weighted by token."""
        wrong = norm = 0.0
        inputs = self.part(self.inputs, screen=screen)
        targets = self.part(self.targets[layer], screen=screen)
        weights = self.part(self.weights[layer], screen=screen)
        for entry, h, target, weight in zip(inputs, hidden, targets, weights, strict=True):
            reference = valid_tokens(target, entry.valid).float()
            counts = valid_tokens(weight.unsqueeze(-1), entry.valid).double()
            difference = valid_tokens(h, entry.valid).float() - reference
            wrong += float(difference.square_().mul(counts).sum())
            norm += float(reference.square().mul(counts).sum())
        wrong, norm = ranks.all_reduce_numbers(wrong, norm)
        return wrong / norm if norm > 0 else wrong

    def evaluate(
        self, choice: Choice, prefix: Sequence[Tensor], start: int, *, screen: bool = False
    ) -> float:
        """Error of the block output when layers start ... run on `prefix` under `choice`."""
        hidden = self.part(prefix, screen=screen)
        for layer in range(start, len(self.layers)):
            hidden = self.run(layer, choice[layer], hidden, screen=screen)
        return self.error(len(self.layers) - 1, hidden, screen=screen)

    def sub_block(self, layer: int, hidden: Sequence[Tensor]) -> "BlockSearch":
        """The block of one layer, fed with `hidden`: what eq. 2 searches."""
        part = slice(layer, layer + 1)
        return BlockSearch(
            self.layers[part],
            self.sites[part],
            self.inputs,
            hidden,
            self.targets[part],
            self.weights[part],
            self.places,
        )


def search_block(search: BlockSearch) -> SearchResult:
    """Finds the candidates of a block's sites (eq. 3); deterministic.

    Returns:
        The choice and its errors; `joint` is never above `greedy`, nor above `initial`.
    """
    start: Choice = tuple(tuple(site.choice for site in sites) for sites in search.sites)
    greedy: Choice | None = None
    if len(search.layers) > 1:
        greedy, shortlists = _greedy(search)
    else:
        # a layer without sites has the one candidate of running as it is
        count = min((len(site.candidates) for site in search.sites[0]), default=1)
        shortlists = [range(count)]
    found = dict(_enumerate(search, (), search.part(search.hidden, screen=True), shortlists))
    screened = dict(sorted(found.items(), key=lambda pair: pair[1]))  # the best first
    combinations = list(screened)
    finalists = dict.fromkeys([start, *([greedy] if greedy else []), *combinations[:_FINALISTS]])
    known = screened if search.batches == 1 else {}  # one batch is its own screen
    errors = {
        choice: known[choice] if choice in known else search.evaluate(choice, search.hidden, 0)
        for choice in finalists
    }
    best = min(errors, key=errors.__getitem__)
    best, error = _refine(search, best, errors[best], shortlists)
    return SearchResult(
        choice=best,
        initial=errors[start],
        greedy=error if greedy is None else errors[greedy],
        joint=error,
        evaluations=search.evaluations,
        ranking=tuple(choice[0][0] for choice in combinations if choice[0]),
    )


def _greedy(search: BlockSearch) -> tuple[Choice, list[Sequence[int]]]:
    """Layer after layer, each by its own output (eq. 2); also each layer's best candidates."""
    hidden = list(search.hidden)
    choice: list[tuple[int, ...]] = []
    shortlists: list[Sequence[int]] = []
    for layer in range(len(search.layers)):
        alone = search.sub_block(layer, hidden)
        result = search_block(alone)
        search.evaluations += alone.evaluations
        choice.append(result.choice[0])
        shortlists.append(result.ranking[:_SHORTLIST] or [0])
        if layer + 1 < len(search.layers):
            hidden = search.run(layer, result.choice[0], hidden)
    return tuple(choice), shortlists


def _enumerate(
    search: BlockSearch,
    prefix: Choice,
    hidden: Sequence[Tensor],
    shortlists: Sequence[Sequence[int]],
) -> Iterator[tuple[Choice, float]]:
    """Errors of one shortlisted candidate per layer on the screening batches, depth first."""
    layer = len(prefix)
    if layer == len(search.layers):
        yield prefix, search.error(layer - 1, hidden, screen=True)
        return
    for index in shortlists[layer]:
        uniform = (index,) * len(search.sites[layer])
        yield from _enumerate(
            search, (*prefix, uniform), search.run(layer, uniform, hidden, screen=True), shortlists
        )


def _refine(
    search: BlockSearch, best: Choice, error: float, shortlists: Sequence[Sequence[int]]
) -> tuple[Choice, float]:
    """Coordinate descent over single sites; ends with a sweep in which no site improves.

    A candidate that was clearly behind at a site is not tried there again.
    """
    screened = search.batches > 1
    tried: set[Choice] = {best}
    losers: set[tuple[int, int, int]] = set()  # layer, site, candidate
    scores: dict[Choice, float] = {}  # on the screening batches
    prefixes = [search.hidden]  # what enters each layer under `best`, as far as it was needed
    improved = True
    while improved:
        improved = False
        for layer, sites in enumerate(search.sites):
            for site, quantized in enumerate(sites):
                every = range(len(quantized.candidates))
                places = {
                    _with(best, layer, site, index): (layer, site, index)
                    for index in (shortlists[layer] if screened else every)
                    if (layer, site, index) not in losers
                }
                options = [choice for choice in places if choice not in tried]
                if not options:
                    continue
                for below in range(len(prefixes) - 1, layer):
                    prefixes.append(search.run(below, best[below], prefixes[below]))
                if screened:
                    promising = _promising(search, best, options, prefixes[layer], layer, scores)
                    clear = scores[best] * (1 + _CLEAR)
                    losers |= {places[option] for option in options if scores[option] > clear}
                    options = promising
                for option in options:
                    tried.add(option)
                    candidate = search.evaluate(option, prefixes[layer], layer)
                    if candidate > error * (1 + _CLEAR):
                        losers.add(places[option])
                    if candidate < error * (1 - _MIN_GAIN):
                        best, error, improved = option, candidate, True
                        del prefixes[layer + 1 :]
    return best, error


def _promising(
    search: BlockSearch,
    best: Choice,
    options: Sequence[Choice],
    hidden: Sequence[Tensor],
    layer: int,
    scores: dict[Choice, float],
) -> list[Choice]:
    """The best of `options` on the screening batches, if it beats `best` there."""
    for option in (best, *options):
        if option not in scores:
            scores[option] = search.evaluate(option, hidden, layer, screen=True)
    first = min((best, *options), key=scores.__getitem__)
    return [] if first == best else [first]


def _with(choice: Choice, layer: int, site: int, index: int) -> Choice:
    changed = (*choice[layer][:site], index, *choice[layer][site + 1 :])
    return (*choice[:layer], changed, *choice[layer + 1 :])
