import math

import numpy as np
import pytest
import torch

from qvlm_hf.format.grids import group_expand, quantize_weight
from qvlm_hf.format.scheme import QuantScheme


def scheme(bits=4, group_size=16, symmetric=False):
    return QuantScheme(
        weight_bits=bits, activation_bits=4, group_size=group_size, symmetric=symmetric
    )


def bfloat16(value):
    """float32 to the nearest bfloat16, ties to even, as a float32; in integer arithmetic on the bits."""
    bits = np.asarray(value, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


def min_max(row, bits, symmetric):
    """Round-to-nearest over the whole range of one group, with a bfloat16 scale: dequantized values."""
    low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
    top, half = 2**bits - 1, 2 ** (bits - 1)
    scale = (
        max(-low / np.float32(half), high / np.float32(half - 1))
        if symmetric
        else (high - low) / np.float32(top)
    )
    scale = bfloat16(scale)
    if scale < 2.0**-126:
        scale = np.float32(1)
    zero = half if symmetric else min(max(np.rint(-low / scale), 0), top)
    return np.float32(scale) * (np.clip(np.rint(row / scale) + zero, 0, top) - zero).astype(
        np.float32
    )


def groups_of(weight, length):
    return [
        (row, g, slice(g * length, (g + 1) * length))
        for row in range(weight.shape[0])
        for g in range(-(-weight.shape[1] // length))
    ]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 24, -1])
def test_no_group_is_worse_than_its_full_range(bits, symmetric, group_size):
    weight = torch.randn(6, 40) ** 3  # heavy tails: shrinking pays
    quantized = quantize_weight(weight, scheme(bits, group_size, symmetric))
    got, w = quantized.dequantize().numpy(), weight.numpy()
    better = 0
    for row, _, part in groups_of(w, quantized.group_length):
        error = (np.abs(got[row, part] - w[row, part]).astype(np.float64) ** 2.4).sum()
        full = (
            np.abs(min_max(w[row, part], bits, symmetric) - w[row, part]).astype(np.float64) ** 2.4
        ).sum()
        assert error <= full * (1 + 1e-5)
        better += error < full * (1 - 1e-5)
    if bits <= 4:
        assert better > 0  # the ranges are searched, not just taken


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_groups_on_one_side_of_zero(bits, symmetric, sign):
    """The grid holds 0 all the same, and the zero point stays on it even where rounding the scale down would push it off."""
    weight = sign * (torch.rand(40, 16) + 2)
    quantized = quantize_weight(weight, scheme(bits, 16, symmetric))
    got, w = quantized.dequantize().numpy(), weight.numpy()
    for row in range(40):
        error = (np.abs(got[row] - w[row]).astype(np.float64) ** 2.4).sum()
        assert error <= (
            np.abs(min_max(w[row], bits, symmetric) - w[row]).astype(np.float64) ** 2.4
        ).sum() * (1 + 1e-5)
    if not symmetric:
        outermost = 0 if sign > 0 else 2**bits - 1
        assert (
            (quantized.zero_point.int() - outermost).abs() <= 1
        ).all()  # one off where the scale was rounded up


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_are_the_nearest_on_the_stored_grid(bits, symmetric):
    """The scale was rounded to bfloat16 BEFORE the integers were chosen: they follow from what is stored, and from nothing else."""
    weight = torch.randn(5, 40)
    quantized = quantize_weight(weight, scheme(bits, 16, symmetric))
    assert quantized.values.dtype == torch.uint8
    assert quantized.values.is_contiguous()
    assert quantized.scale.dtype == torch.bfloat16
    assert quantized.zero_point.dtype == torch.uint8
    assert quantized.scale.shape == quantized.zero_point.shape == (5, 3)
    w, scale, zero = weight.numpy(), quantized.scale.float().numpy(), quantized.zero_point.numpy()
    expected, dequantized = np.zeros((5, 40), np.uint8), np.zeros((5, 40), np.float32)
    for row, g, part in groups_of(w, 16):
        q = np.clip(np.rint(w[row, part] / scale[row, g]) + zero[row, g], 0, 2**bits - 1)
        expected[row, part] = q
        dequantized[row, part] = scale[row, g] * (q - zero[row, g]).astype(np.float32)
    np.testing.assert_array_equal(quantized.values.numpy(), expected)
    np.testing.assert_array_equal(quantized.dequantize().numpy(), dequantized)
    if symmetric:
        assert (quantized.zero_point == 2 ** (bits - 1)).all()
    else:
        assert quantized.zero_point.max() <= 2**bits - 1


def test_asymmetric_grid_follows_a_lopsided_weight():
    weight = torch.rand(4, 32) * 2 - 0.1  # -0.1 ... 1.9
    error = {
        s: (quantize_weight(weight, scheme(4, 32, s)).dequantize() - weight)
        .square()
        .mean()
        .sqrt()
        .item()
        for s in (False, True)
    }
    assert error[False] < 1.1 * 2 / 15 / 12**0.5  # uniform rounding error of a step of 2/15
    assert error[True] > error[False] * 1.5  # half its levels lie below zero


def test_symmetric_uses_the_odd_level():
    """Levels are -half ... half-1: a group that ends at the negative bound needs no wider step."""
    weight = torch.tensor([[-8.0, 7.0, 3.0, -1.0, 0.0, 1.0, 2.0, 4.0]])
    quantized = quantize_weight(weight, scheme(4, 8, True))
    assert quantized.scale.item() == 1.0
    assert quantized.values.tolist() == [[0, 15, 11, 7, 8, 9, 10, 12]]
    assert torch.equal(quantized.dequantize(), weight)
    assert not torch.equal(
        quantize_weight(-weight, scheme(4, 8, True)).dequantize(), -weight
    )  # +8 is no level


def test_exact_grid_is_found_exactly():
    weight = torch.tensor(
        [[-3.0, 12.0, 0.0, 5.0, 1.0, -2.0, 7.0, 11.0], [0.5, 1.0, 7.5, 3.0, 2.5, 0.0, 4.0, 6.5]]
    )
    quantized = quantize_weight(weight, scheme(4, 8))
    assert quantized.scale.flatten().tolist() == [1.0, 0.5]
    assert quantized.zero_point.flatten().tolist() == [3, 0]
    assert quantized.values.tolist() == [[0, 15, 3, 8, 4, 1, 10, 14], [1, 2, 15, 6, 5, 0, 8, 13]]
    assert torch.equal(quantized.dequantize(), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_short_last_group_is_a_group_of_its_own(bits, symmetric):
    weight = torch.randn(3, 21)
    quantized = quantize_weight(weight, scheme(bits, 16, symmetric))
    alone = quantize_weight(weight[:, 16:], scheme(bits, 16, symmetric))
    assert quantized.values.shape == (3, 21)
    assert torch.equal(quantized.values[:, 16:], alone.values)
    assert torch.equal(quantized.scale[:, 1:], alone.scale)
    assert torch.equal(quantized.zero_point[:, 1:], alone.zero_point)
    assert quantized.dequantize().shape == (3, 21)


def test_whole_row():
    weight = torch.randn(3, 1000)
    quantized = quantize_weight(weight, scheme(4, -1))
    assert quantized.scale.shape == (3, 1)
    assert quantized.group_length == 1000
    wide = quantize_weight(weight, scheme(4, 1000))
    assert torch.equal(quantized.values, wide.values)
    assert torch.equal(quantized.dequantize(), wide.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_rows_and_zero_groups_stay_zero(symmetric):
    weight = torch.randn(3, 32)
    weight[1] = 0
    weight[2, :16] = 0
    quantized = quantize_weight(weight, scheme(4, 16, symmetric))
    dequantized = quantized.dequantize()
    assert (dequantized[1] == 0).all()
    assert (dequantized[2, :16] == 0).all()
    assert (dequantized[2, 16:] != 0).any()
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-20, 1e-30])
def test_tiny_weights_keep_their_relative_error(size, symmetric):
    weight = torch.randn(4, 32) * size
    quantized = quantize_weight(weight, scheme(8, 16, symmetric))
    assert (quantized.scale > 0).all()
    assert ((quantized.dequantize() - weight).abs().amax() / weight.abs().amax()).item() < 0.01


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "size", [1e-38, 1e-40, 1e-44]
)  # steps of 6e-40 and less: float32 and bfloat16 hold them with few bits, if at all
def test_weights_below_the_smallest_scale_become_zero(size, symmetric):
    quantized = quantize_weight(torch.full((2, 16), size), scheme(4, 16, symmetric))
    assert torch.isfinite(quantized.dequantize()).all()
    assert (quantized.scale >= torch.finfo(torch.bfloat16).tiny).all()
    assert quantized.dequantize().abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    weight = torch.randn(4, 32).to(dtype)
    before = weight.clone()
    low, full = quantize_weight(weight, scheme()), quantize_weight(weight.float(), scheme())
    assert torch.equal(low.values, full.values)
    assert torch.equal(low.scale, full.scale)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_weights_raise(bad):
    weight = torch.randn(4, 32)
    weight[2, 5] = bad
    with pytest.raises(
        ValueError,
        match=r"^the weight holds NaN or infinity: repair the checkpoint before quantizing it\.$",
    ):
        quantize_weight(weight, scheme())


def test_group_expand():
    per_group = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert group_expand(per_group, 3, 8).tolist() == [
        [1, 1, 1, 2, 2, 2, 3, 3],
        [4, 4, 4, 5, 5, 5, 6, 6],
    ]
