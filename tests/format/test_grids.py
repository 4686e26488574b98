"""The grids of input values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qvlm_hf.format.grids import (
    QParams,
    _weight_grid,
    choose_qparams,
    dequantize,
    dynamic_group_quantize,
    dynamic_token_qparams,
    fake_quantize,
    quantize,
    shift_quantize,
)
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.scheme import QuantScheme

BITS = st.integers(2, 8)
BOUND = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-30)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


@given(BITS, BOUND, BOUND, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_error_is_half_a_step_inside_the_range(bits, a, b, places):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    qparams = choose_qparams(tensor(min(a, b)), tensor(max(a, b)), bits)
    x = tensor(low, high, *(low + (high - low) * place for place in places))
    scale = qparams.scale.item()
    # the scale itself is a rounded float32: a value may lie 2^bits * eps outside the outermost cell
    error = (fake_quantize(x, qparams) - x).abs().max().item()
    assert error <= scale * (0.5 + 2**bits * 1.2e-7)


@given(BITS, BOUND, BOUND, st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=20))
def test_grid_and_integers_are_the_formula_and_hold_zero(bits, a, b, values):
    qparams = choose_qparams(tensor(min(a, b)), tensor(max(a, b)), bits)
    low, high = np.float32(min(a, b, 0.0)), np.float32(max(a, b, 0.0))
    scale = (high - low) / np.float32(2**bits - 1)
    scale = scale if scale > 0 else np.float32(1)
    zero_point = min(round(float(-low / scale)), 2**bits - 1)
    assert (qparams.scale.dtype, qparams.zero_point.dtype) == (torch.float32, torch.int32)
    assert (qparams.scale.item(), qparams.zero_point.item(), qparams.bits) == (
        *(float(scale), zero_point, bits),
    )
    assert 0 <= zero_point <= 2**bits - 1
    values = [0.0, *values]
    x = tensor(*values)
    with np.errstate(over="ignore"):
        ratios = [float(np.float32(value) / scale) for value in values]
    clipped = [max(min(ratio, 1e9), -1e9) for ratio in ratios]  # infinity where scales are tiny
    expected = [min(max(round(ratio) + zero_point, 0), 2**bits - 1) for ratio in clipped]
    q = quantize(x, qparams)
    assert q.dtype == torch.uint8
    assert q.tolist() == expected
    assert expected[0] == zero_point
    shifted = shift_quantize(x, qparams)
    assert shifted.dtype == torch.float32
    assert shifted.tolist() == [e - zero_point for e in expected]
    assert torch.equal(dequantize(q, qparams), fake_quantize(x, qparams))
    products = np.array([np.float32(e - zero_point) * scale for e in expected])
    np.testing.assert_array_equal(dequantize(q, qparams).numpy(), products)


def test_grids_per_channel_broadcast_and_change_nothing():
    x = torch.randn(5, 7, 12) * 3
    before = x.clone()
    qparams = choose_qparams(x.amin((0, 1)) * 0.7, x.amax((0, 1)) * 0.7, 4)  # clips
    shifted = shift_quantize(x, qparams)
    assert torch.equal(shifted, quantize(x, qparams).float() - qparams.zero_point)
    assert torch.equal(x, before)
    assert set(quantize(x, qparams).unique().tolist()) == set(range(16))


def test_rounding_is_half_to_even_and_before_the_zero_point_is_added():
    qparams = QParams(tensor(1.0), torch.tensor([8], dtype=torch.int32), 4)
    x = tensor(-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5)
    assert shift_quantize(x, qparams).tolist() == [-2, -2, 0, 0, 2, 2, 4]
    # zero point 1.5 -> 2, 2.5 -> 2: ranges [-1.5, 13.5] and [-2.5, 12.5] have step 1
    assert choose_qparams(tensor(-1.5, -2.5), tensor(13.5, 12.5), 4).zero_point.tolist() == [2, 2]
    # round(0.5) + 1 is 1, round(0.5 + 1) is 2
    odd = QParams(tensor(1.0), torch.tensor([1], dtype=torch.int32), 4)
    assert quantize(tensor(0.5), odd).item() == 1


def test_divides_rather_than_multiplies_by_a_reciprocal():
    """The quotient and the product with the reciprocal differ in the last bit for many values."""
    scales = torch.arange(1, 2000, dtype=torch.float32) / 997
    x = (torch.arange(1, 2000, dtype=torch.float32) % 7 + 0.5) * scales
    quotient = torch.from_numpy(np.rint(x.numpy() / scales.numpy()))
    product = torch.from_numpy(np.rint(x.numpy() * (np.float32(1) / scales.numpy())))
    assert not torch.equal(quotient, product)
    qparams = QParams(scales, torch.zeros(1999, dtype=torch.int32), 8)
    assert torch.equal(shift_quantize(x, qparams), quotient)


def _power_of_two(divisor):
    return isinstance(divisor, int) and divisor & (divisor - 1) == 0


class Divisors(TorchDispatchMode):
    """Collects the devices of what is divided by; powers of two are divided exactly anyway."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.div and not _power_of_two(args[1]):
            self.devices.add(getattr(args[1], "device", None))
        return function(*args, **kwargs or {})


def test_every_divisor_is_a_tensor_on_the_device():
    """CUDA multiplies by the reciprocal of a number, and of a tensor on the CPU."""
    x = torch.empty(2, 3, 64, device="meta")
    with Divisors() as seen:
        dynamic_token_qparams(x, 8)
        dynamic_group_quantize(x, 3, 32)
        block_hadamard(x, 32)
        for symmetric in (False, True):
            scheme = QuantScheme(
                weight_bits=3, activation_bits=8, group_size=32, symmetric=symmetric
            )
            _weight_grid(x, x, scheme)
    assert seen.devices == {torch.device("meta")}


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "zero_point"),
    [
        (0.0, 0.0, 2, 1.0, 0),
        (2.0, 3.0, 2, 1.0, 0),
        (-6.0, -3.0, 2, 2.0, 3),
        (0.0, 1e-45, 2, 1.0, 0),
        (-300 * 2.0**-149, 0.0, 8, 2.0**-149, 255),  # 300 without a clamp
    ],
)
def test_ranges_on_one_side_empty_and_subnormal(low, high, bits, scale, zero_point):
    qparams = choose_qparams(tensor(low), tensor(high), bits)
    assert (qparams.scale.item(), qparams.zero_point.item()) == (scale, zero_point)


def test_half_precision_is_computed_in_float32():
    low, high = tensor(-1.0, -0.3).bfloat16(), tensor(2.0, 0.7).bfloat16()
    assert torch.equal(choose_qparams(low, high, 8).scale, (high.float() - low.float()) / 255)
    x = torch.randn(2, 3, 8).bfloat16()
    assert torch.equal(dynamic_token_qparams(x, 4).scale, dynamic_token_qparams(x.float(), 4).scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_not_finite_bounds_raise(bad, where):
    bounds = [tensor(-1.0, -2.0), tensor(1.0, 2.0)]
    bounds[where][1] = bad
    if (where, bad) in ((0, math.inf), (1, -math.inf)):
        bounds[1 - where][1] = bad  # low = inf alone would be clamped to 0: the pair is the error
    message = r"^a range holds NaN or infinity: the values it was taken from are not finite\.$"
    with pytest.raises(ValueError, match=message):
        choose_qparams(*bounds, 4)


@pytest.mark.parametrize("bits", range(3, 9))
def test_dynamic_token_by_hand(bits):
    top = 2**bits - 1
    rows = torch.tensor(
        [[1.0, 2.0, 4.0], [-1.0, -2.0, -4.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 5.0], [2.0, 2.0, 2.0]]
    )
    qparams = dynamic_token_qparams(rows, bits)
    assert qparams.scale.shape == qparams.zero_point.shape == (5, 1)
    step, four, two = (np.float32(span) / np.float32(top) for span in (8, 4, 2))
    assert qparams.scale.flatten().tolist() == [four, four, 1.0, step, two]
    middle = round(float(np.float32(3) / step))
    assert qparams.zero_point.flatten().tolist() == [0, top, 0, middle, 0]
    q = quantize(rows, qparams)
    assert (q[0].max(), q[1, 2], q[2].tolist()) == (top, 0, [0, 0, 0])
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


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_dynamic_token_takes_empty_batches(shape):
    assert dynamic_token_qparams(torch.zeros(*shape, 8), 4).scale.shape == (*shape, 1)


@given(st.integers(3, 8), st.integers(1, 9), st.integers(1, 9), st.integers(0, 3))
def test_dynamic_group_is_dynamic_token_of_every_group(bits, length, channels, seed):
    x = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(seed))
    a, scales = dynamic_group_quantize(x, bits, length)
    for group, part in enumerate(x.split(length, dim=-1)):
        qparams = dynamic_token_qparams(part, bits)
        where = slice(group * length, group * length + part.shape[-1])
        assert torch.equal(a[..., where], shift_quantize(part, qparams))
        assert torch.equal(scales[..., group, None], qparams.scale)
    assert a.shape == x.shape
    assert scales.shape == (2, 3, -(-channels // length))
