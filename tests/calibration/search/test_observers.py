"""Range statistics: streamed tails against torch.quantile, L_p errors, grids of candidates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm_hf.calibration.search.observers import LpError, TailObserver, candidate_qparams
from qvlm_hf.calibration.settings import RangeCandidate
from qvlm_hf.format.grids import QParams, choose_qparams

PERCENTILES = (0.9, 0.95, 0.99, 0.999, 0.9999, 1.0)


def quantiles(values, percentile):
    """(1 - p, p) quantiles of [series, n], in float64: places between two values are exact."""
    values = values.double()
    return torch.quantile(values, 1 - percentile, dim=1), torch.quantile(values, percentile, dim=1)


def observed(values, sizes, percentile):
    observer = TailObserver(count=values.shape[1], percentile=percentile)
    for part in values.split(sizes, dim=1):
        observer.update(part)
    return observer


def assert_range(observer, values, percentile):
    for got, expected, extreme in zip(
        observer.range(percentile),
        quantiles(values, percentile),
        (values.amin(1), values.amax(1)),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
        if percentile == 1.0:
            assert torch.equal(got, extreme)  # not a rounding away


@st.composite
def splits(draw, total):
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


@given(
    st.data(),
    st.integers(1, 4),
    st.integers(1, 300),
    st.sampled_from(PERCENTILES),
    st.integers(0, 1000),
)
def test_streamed_tails_are_quantiles(data, series, n, smallest, seed):
    values = torch.randn(series, n, generator=torch.Generator().manual_seed(seed)) * 3
    if seed % 3 == 0:
        values = values.round()  # ties
    observer = observed(values, data.draw(splits(n)), smallest)
    for percentile in (p for p in PERCENTILES if p >= smallest):
        assert_range(observer, values, percentile)


def test_count_may_be_an_upper_bound():
    values = torch.randn(3, 200)
    observer = TailObserver(count=1000, percentile=0.9)
    observer.update(values)
    assert_range(observer, values, 0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values(dtype):
    values = torch.randn(2, 50).to(dtype)
    low, high = observed(values, [20, 30], 0.95).range(0.95)
    assert low.dtype == high.dtype == torch.float32
    assert_range(observed(values, [20, 30], 0.95), values.float(), 0.95)


def test_nothing_observed():
    message = "no value was observed: calibration did not reach this input"
    with pytest.raises(ValueError, match=message):
        TailObserver(count=10, percentile=0.99).range(1.0)


def grid(low, high, bits):
    """Scale and zero point of a range that holds 0, in float32 like the package."""
    low, high = (
        np.minimum(np.float32(low), np.float32(0)),
        np.maximum(np.float32(high), np.float32(0)),
    )
    scale = (high - low) / np.float32(2**bits - 1)
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_lp_error_of_every_candidate(bits):
    x = torch.randn(6, 5, 7) * torch.arange(1, 8)
    channel = choose_qparams(x.amin((0, 1)) * 0.8, x.amax((0, 1)) * 0.8, bits)
    position = choose_qparams(x.amin((0, 2)), x.amax((0, 2)), bits)
    position = QParams(position.scale[:, None], position.zero_point[:, None], bits)
    errors = LpError([channel, position, None], bits)
    for part in x.split([1, 5]):
        errors.update(part)
    expected = []
    for axes, factor in (((0, 1), 0.8), ((0, 2), 1), (2, 1)):
        bounds = (
            f(axis=axes, keepdims=True) * np.float32(factor) for f in (x.numpy().min, x.numpy().max)
        )
        scale, zero = grid(*bounds, bits)
        q = np.clip(np.rint(x.numpy() / scale) + zero, 0, 2**bits - 1)
        expected.append((np.abs(x.numpy() - scale * (q - zero)) ** 2.4).sum())
    assert errors.totals == pytest.approx(expected, rel=1e-4)


def observers(x):
    """Of [B, T, C], as the initialisation makes them."""
    channel = TailObserver(count=x.shape[0] * x.shape[1], percentile=0.9)
    token = TailObserver(count=x.shape[0] * x.shape[2], percentile=0.9)
    channel.update(x.flatten(0, 1).T)
    token.update(x.transpose(0, 1).flatten(1))
    return {"channel": channel, "token": token}


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("percentile", [1.0, 0.95])
@pytest.mark.parametrize("margin", [1.0, 1.25])
@pytest.mark.parametrize("bits", [4, 8])
def test_candidate_grids(granularity, percentile, margin, bits):
    x = torch.randn(6, 5, 7) + torch.linspace(-2, 2, 7)
    series = x.flatten(0, 1).T if granularity == "channel" else x.transpose(0, 1).flatten(1)
    low, high = quantiles(series, percentile)
    scale, zero = grid((low * margin).numpy(), (high * margin).numpy(), bits)
    candidate = RangeCandidate(granularity=granularity, percentile=percentile, margin=margin)
    got = candidate_qparams(candidate, observers(x), bits)
    assert got.bits == bits
    # broadcasts against [B, T, C]
    assert got.scale.shape == got.zero_point.shape == ((7,) if granularity == "channel" else (5, 1))
    np.testing.assert_allclose(got.scale.flatten().numpy(), scale, rtol=1e-5)
    np.testing.assert_array_equal(got.zero_point.flatten().numpy(), zero)


def test_a_range_found_at_run_time_has_no_grid():
    for granularity in ("dynamic_token", "none"):
        assert candidate_qparams(RangeCandidate(granularity=granularity), {}, 4) is None


@given(
    st.floats(-50, 50),
    st.floats(0.001, 3),
    st.sampled_from([1.0, 1.1, 1.25]),
    st.sampled_from([1.0, 0.95]),
)
def test_every_range_includes_zero(centre, width, margin, percentile):
    x = centre + width * (torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1)) - 0.5)
    for granularity in ("channel", "token"):
        got = candidate_qparams(
            RangeCandidate(granularity=granularity, percentile=percentile, margin=margin),
            observers(x),
            4,
        )
        assert ((got.zero_point >= 0) & (got.zero_point <= 15)).all()
        lowest, highest = -got.zero_point * got.scale, (15 - got.zero_point) * got.scale
        assert (lowest <= 0).all()
        assert (highest >= 0).all()
