"""Cross-layer dependency (eq. 4, 5): against loops over numbers and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qvlm_hf.calibration.layers import LayerInput
from qvlm_hf.calibration.measure import entropy
from qvlm_hf.calibration.measure.entropy import (
    DependencyHistogram,
    conditional_entropy,
    layer_dependencies,
    soft_assignment,
)
from qvlm_hf.calibration.run import Calibration
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.models.graph import Layer, Segment


def assigned(units, levels):
    """p_m of eq. 5 for one value, in float64, straight from the formula."""
    weights = [math.exp(-((units - m) ** 2)) for m in range(levels)]
    return np.array([w / math.fsum(weights) for w in weights])


def brute_dependency(first, second, first_range, second_range, levels):
    """D of eq. 4 by looping over elements; ranges already of the values' shape."""
    joint = np.zeros((levels, levels))
    columns = [
        np.asarray(t, dtype=np.float64).reshape(-1)
        for t in (first, *first_range, second, *second_range)
    ]
    for a, a_low, a_high, b, b_low, b_high in zip(*columns, strict=True):
        a_units = (a - a_low) / ((a_high - a_low) / (levels - 1))
        b_units = (b - b_low) / ((b_high - b_low) / (levels - 1))
        joint += np.outer(assigned(a_units, levels), assigned(b_units, levels))
    return dependency(joint / columns[0].size)


def dependency(joint):
    """Eq. 4 of a joint distribution, term by term."""
    total = 0.0
    for row in joint:
        marginal = math.fsum(row)
        total -= math.fsum(p * math.log(p / marginal) for p in row if p > 0)
    return total


def marginal_entropy(p):
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def channel_range(x):
    """(smallest, largest) per channel of [..., H]."""
    return x.flatten(0, -2).amin(0), x.flatten(0, -2).amax(0)


def measured(first, second, first_range=None, second_range=None, *, levels=16, splits=None):
    """The streamed entropy of [tokens, H] values, in batches of the sizes `splits`."""
    histogram = DependencyHistogram(
        first_range or channel_range(first),
        second_range or channel_range(second),
        levels=levels,
        elements=first.numel(),
    )
    sizes = splits or [first.shape[0]]
    for a, b in zip(first.split(sizes), second.split(sizes), strict=True):
        histogram.update(a, b)
    return float(histogram.entropy())


def unit_range(levels, channels=1):
    """A range whose step is 1: values are levels."""
    return torch.zeros(channels), torch.full((channels,), levels - 1.0)


def correlated(tokens, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(tokens, channels, generator=generator)
    return first, torch.tanh(first) * 3 + 0.5 * torch.randn(tokens, channels, generator=generator)


# ---- eq. 5 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [8, 16, 256])
def test_soft_assignment_is_the_formula(levels):
    units = torch.tensor([-1.5, 0.0, 0.25, 0.5, 1.0, 3.49, levels - 1.0, levels + 0.75])
    p = soft_assignment(units, levels)
    assert p.shape == (8, levels)
    torch.testing.assert_close(p.sum(-1), torch.ones(8))
    expected = np.stack([assigned(float(u), levels) for u in units])
    np.testing.assert_allclose(p.numpy(), expected, rtol=1e-4, atol=1e-7)


# ---- eq. 4 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("joint", "expected"),
    [
        (torch.eye(4) / 4, 0.0),  # the second level is known, and 0 log 0 is 0
        (torch.full((4, 4), 1 / 16), math.log(4)),
        # rows are the first layer: given row 0 the second is a fair coin, given row 1 it is known
        (torch.tensor([[0.25, 0.25], [0.0, 0.5]]), 0.5 * math.log(2)),
        (torch.tensor([[0.25, 0.0], [0.25, 0.5]]), -0.25 * math.log(1 / 3) - 0.5 * math.log(2 / 3)),
    ],
)
def test_conditional_entropy_by_hand(joint, expected):
    assert conditional_entropy(joint) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [8, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_histogram_equals_a_loop_over_elements(levels, seed):
    first, second = correlated(40, 5, seed)
    ranges = [tuple(bound.expand(40, 5) for bound in channel_range(x)) for x in (first, second)]
    expected = brute_dependency(first, second, *ranges, levels)
    assert measured(first, second, levels=levels) == pytest.approx(expected, abs=1e-5)


def test_ranges_per_position():
    first, second = (x.view(6, 5, 4) for x in correlated(30, 4))  # [samples, positions, channels]
    bounds = [(x.amin((0, 2))[:, None], x.amax((0, 2))[:, None]) for x in (first, second)]
    histogram = DependencyHistogram(*bounds, levels=8, elements=first.numel())
    for a, b in zip(first.split([2, 4]), second.split([2, 4]), strict=True):
        histogram.update(a, b)
    per_position = brute_dependency(
        first, second, *(tuple(low.expand(6, 5, 4) for low in pair) for pair in bounds), 8
    )
    assert float(histogram.entropy()) == pytest.approx(per_position, abs=1e-5)
    # it is no per-channel range
    assert abs(measured(first.flatten(0, 1), second.flatten(0, 1), levels=8) - per_position) > 1e-3


def test_independent_levels_give_the_entropy_of_the_second():
    levels = 16
    first = torch.arange(levels).repeat_interleave(levels).float()[:, None]
    # every pair once: independent without any noise
    second = torch.arange(levels).repeat(levels).float()[:, None]
    marginal = np.mean([assigned(m, levels) for m in range(levels)], axis=0)
    d = measured(first, second, unit_range(levels), unit_range(levels))
    assert d == pytest.approx(marginal_entropy(marginal), abs=1e-5)
    assert 0.99 * math.log(levels) < d <= math.log(levels)


def test_the_second_is_conditioned_on_the_first_and_not_the_other_way_round():
    levels = 16
    first = torch.tensor([0.0, 5.0, 10.0, 15.0]).repeat(20)[:, None]
    second = torch.tensor([0.0, 0.0, 15.0, 15.0]).repeat(20)[:, None]
    forward = measured(first, second, unit_range(levels), unit_range(levels))
    assert forward == pytest.approx(marginal_entropy(assigned(0.0, levels)), abs=1e-3)
    backward = measured(second, first, unit_range(levels), unit_range(levels))
    assert backward > forward + 0.9 * math.log(2)


@given(st.integers(0, 10_000), st.sampled_from([8, 16, 32]), st.integers(1, 30), st.integers(1, 4))
def test_bounds(seed, levels, tokens, channels):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, tokens, channels, generator=generator).exp()
    assert 0.0 <= measured(first, second, levels=levels) <= math.log(levels) + 1e-6


# ---- what it must not depend on ------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [16 * 7, 1, None])  # 7 of 300 elements; less than one; all
@pytest.mark.parametrize("splits", [None, [1, 20, 29], [1] * 50])
def test_chunks_and_batches_change_nothing(monkeypatch, chunk, splits):
    first, second = correlated(50, 6)
    whole = measured(first, second)
    monkeypatch.setattr(entropy, "_CHUNK", chunk or entropy._CHUNK)
    assert measured(first, second, splits=splits) == pytest.approx(whole, abs=1e-6)


def test_the_scale_of_a_channel_changes_nothing():
    first, second = correlated(200, 4)
    factor, shift = torch.tensor([1.0, 100.0, 0.01, -3.0]), torch.tensor([0.0, -50.0, 2.0, 1.0])
    before = measured(first, second)
    assert measured(first * factor.abs() + shift, second) == pytest.approx(before, abs=1e-4)
    assert measured(first, second * factor.abs() - shift) == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("splits", [None, [4] * 1500])
def test_subsampling_stays_close_however_the_batches_fall(monkeypatch, splits):
    """A fifth of the tokens; with batches of 4 the stride is longer than a batch."""
    first, second = correlated(6000, 4)
    ranges = channel_range(first), channel_range(second)
    second[::4] = 0.0  # every batch's first token is special, as an attention sink is
    whole = measured(first, second, *ranges, levels=8)
    monkeypatch.setattr(entropy, "HISTOGRAM_VALUES", first.numel() * 8 // 5)
    assert measured(first, second, *ranges, levels=8, splits=splits) == pytest.approx(
        whole, abs=0.02
    )


def test_subsampling_keeps_to_the_budget(monkeypatch):
    """The work is bounded: tokens are counted where their levels are assigned."""
    seen = []
    assign = entropy.soft_assignment
    monkeypatch.setattr(
        entropy,
        "soft_assignment",
        lambda units, levels: (seen.append(units.numel()), assign(units, levels))[1],
    )
    monkeypatch.setattr(entropy, "HISTOGRAM_VALUES", 16 * 400)
    first, second = correlated(1000, 4)
    measured(first, second, splits=[100] * 10)
    assert 200 <= sum(seen) / 2 <= 400  # of 4000, for both layers each


def test_shapes_must_agree():
    histogram = DependencyHistogram(unit_range(8, 4), unit_range(8, 4), levels=8, elements=40)
    with pytest.raises(ValueError, match=r"shapes \(10, 4\) and \(9, 4\) have no common elements"):
        histogram.update(torch.zeros(10, 4), torch.zeros(9, 4))


# ---- from a segment ------------------------------------------------------------------------------


def dependencies(layers, hidden, valid=None, component="language", dead=(), **options):
    """`layer_dependencies` of layers in a row, fed with hidden states per batch."""
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    named = tuple(Layer(f"layers.{i}", (), dead=i in dead, module=m) for i, m in enumerate(layers))
    segment = Segment(component, named)
    masks = valid or [None] * len(hidden)
    inputs = [
        LayerInput(h, (), {}, mask, (f"data.json:{i}",))
        for i, (h, mask) in enumerate(zip(hidden, masks, strict=True))
    ]
    settings = CalibrationSettings(**options)
    calibration = Calibration(model=model, settings=settings, inputs={segment.name: inputs})
    return layer_dependencies(calibration, segment)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_padded_tokens_do_not_count(batch_size):
    layers = [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)]
    valid = torch.arange(10).expand(8, 10) < torch.tensor([10, 7, 9, 4, 10, 3, 8, 6])[:, None]
    clean = torch.randn(8, 10, 6)
    hidden = torch.where(valid[..., None], clean, 1e4)
    outputs, values = [], clean[valid]
    with torch.no_grad():
        for layer in layers:
            values = layer(values)
            outputs.append(values)
    found = dependencies(layers, hidden.split(batch_size), valid.split(batch_size))
    ranges = [tuple(bound.expand_as(x) for bound in channel_range(x)) for x in outputs]
    brute = [
        brute_dependency(outputs[i], outputs[i + 1], ranges[i], ranges[i + 1], 16) for i in range(2)
    ]
    assert found == pytest.approx(brute, abs=1e-4)


@pytest.mark.parametrize(("bits", "levels"), [(3, 8), (4, 16), (8, 256), (16, 256)])
def test_levels_follow_the_activation_bits(bits, levels):
    layers, hidden = [nn.Linear(4, 4), nn.Tanh()], torch.randn(2, 20, 4)
    with torch.no_grad():
        first = layers[0](hidden).flatten(0, 1)
        expected = measured(first, layers[1](first), levels=levels)
    found = dependencies(layers, [hidden], activation_bits=bits)
    assert found == pytest.approx([expected], abs=1e-5)


def test_token_granularity_takes_ranges_per_position():
    layers = [nn.Linear(4, 4), nn.Tanh()]
    hidden = torch.randn(6, 5, 4) * torch.arange(1, 6)[:, None]
    with torch.no_grad():
        first = layers[0](hidden)
        second = layers[1](first)
    ranges = [
        tuple(f((0, 2))[:, None].expand(6, 5, 4) for f in (x.amin, x.amax)) for x in (first, second)
    ]
    found = dependencies(
        layers, hidden.split(2), component="vision", activation_granularity={"vision": "token"}
    )
    assert found == pytest.approx([brute_dependency(first, second, *ranges, 16)], abs=1e-5)


def test_dead_layers_and_single_layers_have_no_dependency():
    layers, hidden = [nn.Linear(4, 4) for _ in range(3)], [torch.randn(2, 5, 4)]
    both = dependencies(layers, hidden)
    assert len(both) == 2
    assert dependencies(layers, hidden, dead=[2]) == both[:1]
    assert dependencies(layers[:1], hidden) == []


def test_an_output_that_is_not_finite_is_named():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    layers[1].weight.data[0, 0] = torch.nan
    message = r"\Athe output of layers\.1 holds NaN or infinity for the samples data\.json:0: .+\Z"
    with pytest.raises(ValueError, match=message):
        dependencies(layers, torch.randn(2, 1, 5, 4).unbind())
