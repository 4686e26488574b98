"""The grids of weights, group by group."""

import math

import numpy as np
import pytest
import torch

from qvlm_hf.format import grids
from qvlm_hf.format.grids import chosen_clip, group_expand, quantize_weight
from qvlm_hf.format.scheme import QuantScheme

any_bits = pytest.mark.parametrize("bits", range(2, 9))
either_kind = pytest.mark.parametrize("symmetric", [False, True])


def scheme(bits=4, group_size=16, symmetric=False):
    return QuantScheme(
        weight_bits=bits, activation_bits=4, group_size=group_size, symmetric=symmetric
    )


def bfloat16(value):
    """float32 to the nearest bfloat16, ties to even, as a float32; by integer arithmetic."""
    bits = np.asarray(value, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


def min_max(row, bits, symmetric):
    """One group rounded to nearest over its whole range, with a bfloat16 scale: dequantized."""
    low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
    top, half = 2**bits - 1, 2 ** (bits - 1)
    sides = max(-low / np.float32(half), high / np.float32(half - 1))
    scale = bfloat16(sides if symmetric else (high - low) / np.float32(top))
    scale = np.float32(1) if scale < 2.0**-126 else scale
    zero = half if symmetric else min(max(np.rint(-low / scale), 0), top)
    shifted = np.clip(np.rint(row / scale) + zero, 0, top) - zero
    return np.float32(scale) * shifted.astype(np.float32)


def groups_of(weight, length):
    return [
        (row, g, slice(g * length, (g + 1) * length))
        for row in range(weight.shape[0])
        for g in range(-(-weight.shape[1] // length))
    ]


def norm(error):
    return (np.abs(error).astype(np.float64) ** 2.4).sum()


WEIGHTS = {
    "heavy tails": lambda: torch.randn(6, 40) ** 3,  # shrinking pays
    "positive": lambda: torch.rand(40, 16) + 2,
    "negative": lambda: -torch.rand(40, 16) - 2,
}


@any_bits
@either_kind
@pytest.mark.parametrize("group_size", [16, 24, -1])
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_group_is_worse_than_its_full_range(bits, symmetric, group_size, name):
    weight = WEIGHTS[name]()
    quantized = quantize_weight(weight, scheme(bits, group_size, symmetric))
    got, w = quantized.dequantize().numpy(), weight.numpy()
    better = 0
    for row, _, part in groups_of(w, quantized.group_length):
        error = norm(got[row, part] - w[row, part])
        full = norm(min_max(w[row, part], bits, symmetric) - w[row, part])
        assert error <= full * (1 + 1e-5)
        better += error < full * (1 - 1e-5)
    if name == "heavy tails":
        assert better > 0 or bits > 4  # the ranges are searched, not just taken
    elif not symmetric:  # on the grid even where rounding the scale down would push it off
        outermost = 0 if name == "positive" else 2**bits - 1
        assert ((quantized.zero_point.int() - outermost).abs() <= 1).all()  # the scale is rounded


@any_bits
@either_kind
def test_integers_are_the_nearest_on_the_stored_grid(bits, symmetric):
    """They follow from the stored bfloat16 scale, and from nothing else."""
    weight = torch.randn(5, 40)
    quantized = quantize_weight(weight, scheme(bits, 16, symmetric))
    assert quantized.values.is_contiguous()
    assert [part.dtype for part in (quantized.values, quantized.scale, quantized.zero_point)] == [
        *(torch.uint8, torch.bfloat16, torch.uint8)
    ]
    assert quantized.scale.shape == quantized.zero_point.shape == (5, 3)
    w, scale, zero = weight.numpy(), quantized.scale.float().numpy(), quantized.zero_point.numpy()
    expected, dequantized = np.zeros((5, 40), np.uint8), np.zeros((5, 40), np.float32)
    for row, g, part in groups_of(w, 16):
        q = np.clip(np.rint(w[row, part] / scale[row, g]) + zero[row, g], 0, 2**bits - 1)
        expected[row, part] = q
        dequantized[row, part] = scale[row, g] * (q - zero[row, g]).astype(np.float32)
    np.testing.assert_array_equal(quantized.values.numpy(), expected)
    np.testing.assert_array_equal(quantized.dequantize().numpy(), dequantized)
    assert zero.max() <= 2**bits - 1
    assert not symmetric or (zero == 2 ** (bits - 1)).all()


def test_asymmetric_grid_follows_a_lopsided_weight():
    weight = torch.rand(4, 32) * 2 - 0.1  # -0.1 ... 1.9
    error = {
        kind: quantize_weight(weight, scheme(4, 32, kind))
        .dequantize()
        .sub(weight)
        .std(correction=0)
        for kind in (False, True)
    }
    assert error[False] < 1.1 * 2 / 15 / 12**0.5  # uniform rounding error of a step of 2/15
    assert error[True] > error[False] * 1.5  # half its levels lie below zero


@pytest.mark.parametrize(
    ("weight", "symmetric", "scale", "zero_point", "values"),
    [
        ([-3, 12, 0, 5, 1, -2, 7, 11], False, 1.0, 3, [0, 15, 3, 8, 4, 1, 10, 14]),
        ([0.5, 1, 7.5, 3, 2.5, 0, 4, 6.5], False, 0.5, 0, [1, 2, 15, 6, 5, 0, 8, 13]),
        # levels are -half ... half - 1: a group that ends at the negative bound uses the odd one
        ([-8, 7, 3, -1, 0, 1, 2, 4], True, 1.0, 8, [0, 15, 11, 7, 8, 9, 10, 12]),
    ],
)
def test_an_exact_grid_is_found_exactly(weight, symmetric, scale, zero_point, values):
    weight = torch.tensor([weight], dtype=torch.float32)
    quantized = quantize_weight(weight, scheme_ := scheme(4, 8, symmetric))
    assert (quantized.scale.item(), quantized.zero_point.item()) == (scale, zero_point)
    assert quantized.values.tolist() == [values]
    assert torch.equal(quantized.dequantize(), weight)
    if symmetric:  # +8 is no level
        assert not torch.equal(quantize_weight(-weight, scheme_).dequantize(), -weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@either_kind
def test_short_last_group_is_a_group_of_its_own(bits, symmetric):
    weight = torch.randn(3, 21)
    quantized = quantize_weight(weight, scheme(bits, 16, symmetric))
    alone = quantize_weight(weight[:, 16:], scheme(bits, 16, symmetric))
    assert quantized.values.shape == quantized.dequantize().shape == (3, 21)
    assert torch.equal(quantized.values[:, 16:], alone.values)
    assert torch.equal(quantized.scale[:, 1:], alone.scale)
    assert torch.equal(quantized.zero_point[:, 1:], alone.zero_point)


def test_whole_row():
    weight = torch.randn(3, 1000)
    quantized, wide = (quantize_weight(weight, scheme(4, size)) for size in (-1, 1000))
    assert (quantized.scale.shape, quantized.group_length) == ((3, 1), 1000)
    assert torch.equal(quantized.dequantize(), wide.dequantize())


@either_kind
def test_zero_rows_and_zero_groups_stay_zero(symmetric):
    weight = torch.randn(3, 32)
    weight[1] = 0
    weight[2, :16] = 0
    quantized = quantize_weight(weight, scheme(4, 16, symmetric))
    assert (quantized.dequantize()[weight == 0] == 0).all()
    assert (quantized.dequantize()[2, 16:] != 0).any()
    assert (quantized.scale > 0).all()


@either_kind
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-20, 1e-30, 1e-38, 1e-40, 1e-44])
def test_tiny_weights_keep_their_relative_error_or_become_zero(size, symmetric):
    normal = size > 1e-38  # steps below hold few bits in float32 and bfloat16, if at all
    weight = torch.randn(4, 32) * size if normal else torch.full((2, 16), size)
    quantized = quantize_weight(weight, scheme(8 if normal else 4, 16, symmetric))
    assert (quantized.scale >= torch.finfo(torch.bfloat16).tiny).all()
    found = quantized.dequantize()
    if normal:
        assert ((found - weight).abs().amax() / weight.abs().amax()).item() < 0.01
    else:
        assert (found == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    weight = torch.randn(4, 32).to(dtype)
    before = weight.clone()
    low, full = quantize_weight(weight, scheme()), quantize_weight(weight.float(), scheme())
    assert torch.equal(low.values, full.values)
    assert torch.equal(low.scale, full.scale)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_not_finite_weights_raise(bad, dtype):
    weight = torch.randn(4, 32).to(dtype)
    weight[2, 5] = bad
    wider = ", or load it in a wider dtype than float16," if dtype == torch.float16 else ""
    message = f"^the weight holds NaN or infinity: repair the checkpoint{wider} before quantizing"
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, scheme())


def test_group_expand():
    per_group = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert group_expand(per_group, 3, 8).tolist() == [
        [1, 1, 1, 2, 2, 2, 3, 3],
        [4, 4, 4, 5, 5, 5, 6, 6],
    ]


@pytest.mark.parametrize("clipped", [False, True])
def test_rows_at_once_change_only_the_speed(monkeypatch, clipped):
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    clip = torch.linspace(0.6, 1, 27).view(9, 3) if clipped else None
    found = []
    for count in (1, 2**8, 2**20):
        monkeypatch.setattr(grids, "_CACHED", count)
        found.append(quantize_weight(weight, scheme(), clip))
    for other in found[1:]:
        for part in ("values", "scale", "zero_point"):
            assert torch.equal(getattr(found[0], part), getattr(other, part))


@any_bits
@either_kind
def test_the_factors_that_were_chosen_give_the_same_again(bits, symmetric):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(bits))
    found = quantize_weight(weight, kind := scheme(bits, 16, symmetric))
    again = quantize_weight(weight, kind, chosen_clip(weight, found, kind))
    for part in ("values", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(again, part))
