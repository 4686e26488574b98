"""The joint search: never behind greedy, and ahead of it where layers depend on each other."""

import itertools
import math

import pytest
import torch
from tiny_calibrations import tiny_batches, tiny_calibration
from tiny_models import tiny_llava
from torch import nn

from qvlm_hf.calibration.layers import LayerInput, run_layer
from qvlm_hf.calibration.search import joint_search
from qvlm_hf.calibration.search.joint_search import BlockSearch, search_block
from qvlm_hf.calibration.search.ranges import initialize_sites
from qvlm_hf.calibration.search.sites import QuantizedSite, SiteCandidate, installed
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import choose_qparams
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.models.graph import Site


class OneLinear(nn.Module):
    """A layer that is one linear module, so that a block's error can be worked out by hand."""

    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*weight.T.shape, bias=False)
        self.linear.weight.data = weight

    def forward(self, x):
        return self.linear(x)


def planted_block():
    """Two layers of two channels under one range per position.

    Channel 0 is large and all but ignored by the second layer, channel 1 small and all that it
    passes on: the wide range is best for the first layer's own output, the clipped one for the
    block's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 2, generator=generator)
    x[..., 0] *= 8  # large, and useless to the second layer
    first, second = OneLinear(torch.eye(2)), OneLinear(torch.tensor([[0.001, 0.0], [0.0, 1.0]]))
    scheme = QuantScheme(weight_bits=8, activation_bits=3, group_size=-1, granularity="token")
    sites = []
    for layer in (first, second):
        candidates = []
        for percentile, spread in ((1.0, 24.0), (0.9, 3.0)):
            bound = torch.full((400, 1), spread)
            given = RangeCandidate(granularity="token", percentile=percentile)
            candidates.append(SiteCandidate(given, scheme, choose_qparams(-bound, bound, 3)))
        site = QuantizedSite(Site(("linear",)), [layer.linear], candidates)
        site.active = 0
        sites.append([site])
    entry = LayerInput(x, (), {}, None, ("planted",))
    middle = run_layer(first, [entry], [x])
    return BlockSearch(
        [first, second], sites, [entry], [x], [middle, run_layer(second, [entry], middle)]
    )


def brute_force(search):
    """Error of every combination of candidates of every site."""
    ranges = [[range(len(site.candidates)) for site in sites] for sites in search.sites]
    errors = {}
    for flat in itertools.product(*(r for row in ranges for r in row)):
        rest = iter(flat)
        choice = tuple(tuple(next(rest) for _ in row) for row in ranges)
        errors[choice] = search.evaluate(choice, search.hidden, 0)
    return errors


def test_finds_the_planted_joint_optimum_that_greedy_misses():
    search = planted_block()
    with installed(site for row in search.sites for site in row):
        errors = brute_force(search)
        result = search_block(search)
    best = min(errors, key=errors.get)
    assert result.choice == best
    assert result.joint == pytest.approx(errors[best])
    assert best[0] == (1,)  # clipping the large channel, which is worse for the first layer alone
    assert result.greedy > 1.5 * result.joint


def language_block(seed, scheme, batch_size=4):
    weight_bits, activation_bits = scheme
    calibration = tiny_calibration(
        tiny_llava(seed=seed).eval(),
        tiny_batches(8 if batch_size < 8 else 4, batch_size, seed),
        ["language"],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
    )
    (segment,) = calibration.segments
    inputs = calibration.inputs[segment.name]
    hidden = out = [entry.hidden for entry in inputs]
    layers = [calibration.model.get_submodule(layer.name) for layer in segment.layers]
    targets = []
    for layer in layers:
        out = run_layer(layer, inputs, out)
        targets.append(out)
    sites = initialize_sites(calibration, "language", segment.layers, inputs, hidden)
    return BlockSearch(layers, sites, inputs, hidden, targets)


@pytest.mark.parametrize("scheme", [(4, 4), (3, 4), (4, 8), (8, 8)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_never_behind_greedy_from_the_same_inputs(seed, scheme):
    search = language_block(seed, scheme)
    with installed(site for row in search.sites for site in row):
        result = search_block(search)
        # greedy, done by hand: each layer alone, its own output, the next fed by what it produces
        fresh = language_block(seed, scheme)
        hidden, choice = fresh.hidden, []
        with installed(site for row in fresh.sites for site in row):
            for layer in range(len(fresh.layers)):
                alone = search_block(fresh.sub_block(layer, hidden))
                assert alone.greedy == alone.joint
                choice.append(alone.choice[0])
                hidden = fresh.run(layer, alone.choice[0], hidden)
        assert search.evaluate(result.choice, search.hidden, 0) == pytest.approx(result.joint)
    greedy = fresh.error(len(fresh.layers) - 1, hidden)
    assert result.greedy == pytest.approx(greedy)
    assert result.joint <= greedy * (1 + 1e-6)
    assert result.joint <= result.initial * (1 + 1e-6)
    assert result.evaluations > 10


def test_deterministic():
    results = []
    for _ in range(2):
        search = language_block(3, (4, 4))
        with installed(site for row in search.sites for site in row):
            results.append(search_block(search))
    assert results[0] == results[1]


def test_no_single_site_improves_the_result():
    search = language_block(5, (4, 4), batch_size=8)  # one batch: nothing is screened away
    with installed(site for row in search.sites for site in row):
        result = search_block(search)
        for layer, sites in enumerate(search.sites):
            for place, site in enumerate(sites):
                for index in range(len(site.candidates)):
                    row = (*result.choice[layer][:place], index, *result.choice[layer][place + 1 :])
                    other = (*result.choice[:layer], row, *result.choice[layer + 1 :])
                    assert search.evaluate(other, search.hidden, 0) >= result.joint * (1 - 2e-4)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_clear_losers_are_tried_once(monkeypatch, batch_size):
    """Nearly the same error from fewer runs; screened (four batches) or not (one)."""
    found = {}
    for clear in (joint_search._CLEAR, math.inf):
        monkeypatch.setattr(joint_search, "_CLEAR", clear)
        searches = [language_block(seed, (4, 4), batch_size) for seed in range(3)]
        for search in searches:
            with installed(site for row in search.sites for site in row):
                found.setdefault(clear, []).append(search_block(search))
    few, every = found.values()
    assert sum(r.evaluations for r in few) < sum(r.evaluations for r in every)
    for one, other in zip(few, every, strict=True):
        assert one.joint == pytest.approx(other.joint, rel=0.005)
