import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm_hf.format.grids import (
    QParams,
    choose_qparams,
    dequantize,
    dynamic_token_qparams,
    fake_quantize,
    quantize,
    shift_quantize,
)

BITS = st.integers(2, 8)
BOUND = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-30)


def one(value):
    return torch.tensor([value], dtype=torch.float32)


@given(BITS, BOUND, BOUND, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_error_is_half_a_step_inside_the_range(bits, a, b, places):
    low, high = min(a, b), max(a, b)
    qparams = choose_qparams(one(low), one(high), bits)
    low, high = min(low, 0.0), max(high, 0.0)
    x = torch.tensor(
        [low, high, *(low + (high - low) * place for place in places)], dtype=torch.float32
    )
    scale = qparams.scale.item()
    # the scale itself is a rounded float32: a value may lie 2^bits * eps outside the outermost cell
    error = (fake_quantize(x, qparams) - x).abs().max().item()
    assert error <= scale * (0.5 + 2**bits * 1.2e-7)


@given(BITS, BOUND, BOUND)
def test_grid_holds_zero_and_its_zero_point(bits, a, b):
    qparams = choose_qparams(one(min(a, b)), one(max(a, b)), bits)
    zero_point = qparams.zero_point.item()
    assert qparams.scale.dtype == torch.float32
    assert qparams.zero_point.dtype == torch.int32
    assert qparams.bits == bits
    assert qparams.scale.item() > 0
    assert 0 <= zero_point <= 2**bits - 1
    assert quantize(one(0.0), qparams).item() == zero_point
    assert fake_quantize(one(0.0), qparams).item() == 0.0


@given(BITS, BOUND, BOUND)
def test_grid_is_the_formula(bits, a, b):
    low, high = np.float32(min(a, b, 0.0)), np.float32(max(a, b, 0.0))
    qparams = choose_qparams(one(min(a, b)), one(max(a, b)), bits)
    scale = (high - low) / np.float32(2**bits - 1)
    scale = scale if scale > 0 else np.float32(1)
    assert qparams.scale.item() == float(scale)
    assert qparams.zero_point.item() == min(round(float(-low / scale)), 2**bits - 1)


@given(BITS, BOUND, BOUND, st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=20))
def test_integers_are_the_formula(bits, a, b, values):
    qparams = choose_qparams(one(min(a, b)), one(max(a, b)), bits)
    scale, zero_point = np.float32(qparams.scale.item()), qparams.zero_point.item()
    x = torch.tensor(values, dtype=torch.float32)
    with np.errstate(over="ignore"):
        ratios = [float(np.float32(value) / scale) for value in values]
    clipped = [
        max(min(ratio, 1e9), -1e9) for ratio in ratios
    ]  # infinity where the scale is tiny: round() refuses it
    expected = [min(max(round(ratio) + zero_point, 0), 2**bits - 1) for ratio in clipped]
    q = quantize(x, qparams)
    assert q.dtype == torch.uint8
    assert q.tolist() == expected
    assert shift_quantize(x, qparams).tolist() == [e - zero_point for e in expected]
    assert torch.equal(dequantize(q, qparams), fake_quantize(x, qparams))
    np.testing.assert_array_equal(
        dequantize(q, qparams).numpy(),
        np.array([np.float32(e - zero_point) * scale for e in expected]),
    )


def test_shift_quantize_is_quantize_minus_zero_point():
    x = torch.randn(5, 7, 12) * 3
    x_before = x.clone()
    qparams = choose_qparams(x.amin((0, 1)) * 0.7, x.amax((0, 1)) * 0.7, 4)  # clips
    shifted = shift_quantize(x, qparams)
    assert shifted.dtype == torch.float32
    assert torch.equal(shifted, quantize(x, qparams).float() - qparams.zero_point)
    assert torch.equal(x, x_before)
    assert set(quantize(x, qparams).unique().tolist()) == set(range(16))


def test_rounding_is_half_to_even():
    qparams = QParams(one(1.0), torch.tensor([8], dtype=torch.int32), 4)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert shift_quantize(x, qparams).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    # zero point 1.5 -> 2, 2.5 -> 2: ranges [-1.5, 13.5] and [-2.5, 12.5] have step 1
    assert choose_qparams(
        torch.tensor([-1.5, -2.5]), torch.tensor([13.5, 12.5]), 4
    ).zero_point.tolist() == [2, 2]


def test_divides_rather_than_multiplies_by_a_reciprocal():
    """4.5 / 0.9 in float32: the quotient and the product with the reciprocal differ in the last bit for many values; find some."""
    scales = torch.arange(1, 2000, dtype=torch.float32) / 997
    x = (torch.arange(1, 2000, dtype=torch.float32) % 7 + 0.5) * scales
    quotient = torch.from_numpy(np.rint(x.numpy() / scales.numpy()))
    product = torch.from_numpy(np.rint(x.numpy() * (np.float32(1) / scales.numpy())))
    assert not torch.equal(quotient, product)
    qparams = QParams(scales, torch.zeros(1999, dtype=torch.int32), 8)
    assert torch.equal(shift_quantize(x, qparams), quotient)


def test_rounds_before_adding_the_zero_point():
    """round(0.5) + 1 is 1, round(0.5 + 1) is 2."""
    qparams = QParams(one(1.0), torch.tensor([1], dtype=torch.int32), 4)
    assert quantize(one(0.5), qparams).item() == 1


def test_empty_range_and_ranges_on_one_side():
    qparams = choose_qparams(
        torch.tensor([0.0, 2.0, -6.0, 0.0]), torch.tensor([0.0, 3.0, -3.0, 1e-45]), 2
    )
    assert qparams.scale.tolist() == [1.0, 1.0, 2.0, 1.0]
    assert qparams.zero_point.tolist() == [0, 0, 3, 0]


def test_zero_point_stays_on_the_grid_of_a_subnormal_step():
    """A step of 1.4e-45 is -low / 300 rounded down: without a clamp the zero point would be 300."""
    qparams = choose_qparams(torch.tensor([-300 * 2.0**-149]), torch.tensor([0.0]), 8)
    assert qparams.scale.item() == 2.0**-149
    assert qparams.zero_point.item() == 255


def test_half_precision_bounds_are_computed_in_float32():
    low, high = (
        torch.tensor([-1.0, -0.3], dtype=torch.bfloat16),
        torch.tensor([2.0, 0.7], dtype=torch.bfloat16),
    )
    qparams = choose_qparams(low, high, 8)
    assert torch.equal(qparams.scale, (high.float() - low.float()) / 255)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_not_finite_bounds_raise(bad, where):
    bounds = [torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])]
    bounds[where][1] = bad
    if (where, bad) in ((0, math.inf), (1, -math.inf)):
        bounds[1 - where][1] = bad  # low = inf alone would be clamped to 0: the pair is the error
    with pytest.raises(
        ValueError,
        match=r"^a range holds NaN or infinity: the values it was taken from are not finite\.$",
    ):
        choose_qparams(*bounds, 4)


@pytest.mark.parametrize("bits", range(3, 9))
def test_dynamic_token_by_hand(bits):
    top = 2**bits - 1
    rows = torch.tensor(
        [[1.0, 2.0, 4.0], [-1.0, -2.0, -4.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 5.0], [2.0, 2.0, 2.0]]
    )
    qparams = dynamic_token_qparams(rows, bits)
    assert qparams.scale.shape == qparams.zero_point.shape == (5, 1)
    step = np.float32(8) / np.float32(top)
    four, two = np.float32(4) / np.float32(top), np.float32(2) / np.float32(top)
    assert qparams.scale.flatten().tolist() == [four, four, 1.0, step, two]
    assert qparams.zero_point.flatten().tolist() == [
        0,
        top,
        0,
        round(float(np.float32(3) / step)),
        0,
    ]
    assert quantize(rows, qparams)[0].max() == top
    assert quantize(rows, qparams)[1].tolist()[2] == 0
    assert quantize(rows, qparams)[2].tolist() == [0, 0, 0]
    torch.testing.assert_close(fake_quantize(rows, qparams)[4], rows[4])


@given(
    st.integers(3, 8),
    st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6), min_size=1, max_size=5
    ),
)
def test_dynamic_token_is_choose_qparams_per_row(bits, rows):
    x = torch.tensor(rows, dtype=torch.float32)
    dynamic, static = dynamic_token_qparams(x, bits), choose_qparams(x.amin(-1), x.amax(-1), bits)
    assert torch.equal(dynamic.scale[:, 0], static.scale)
    assert torch.equal(dynamic.zero_point[:, 0], static.zero_point)
    assert torch.equal(dynamic.zero_point, dynamic.zero_point.clamp(0, 2**bits - 1))


def test_dynamic_token_takes_empty_batches_and_half_precision():
    assert dynamic_token_qparams(torch.zeros(0, 8), 4).scale.shape == (0, 1)
    assert dynamic_token_qparams(torch.zeros(2, 0, 8), 4).scale.shape == (2, 0, 1)
    x = torch.randn(2, 3, 8).bfloat16()
    assert torch.equal(dynamic_token_qparams(x, 4).scale, dynamic_token_qparams(x.float(), 4).scale)
