"""`qvlm_hf::linear`: kernels and reference against a loop over single numbers, and what PyTorch
asks of an operator.

Legend: B batch, T tokens, K in_features, N out_features, G groups of L inputs.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from linear_calls import DTYPES, GRANULARITIES, IMPOSSIBLE, OPS, STATIC, arguments, make_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qvlm_hf.format.packing import pack
from qvlm_hf.ops.linear import linear

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
F32 = np.float32
REFERENCE = [False]


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def _backend(request):
    """Every test runs with the kernel that this machine has, and with the reference."""
    REFERENCE[0] = request.param == "reference"


def operator():
    return OPS.linear_reference if REFERENCE[0] else OPS.linear


def run(case):
    return linear(*case.call, reference=REFERENCE[0])


def hadamard_sign(i, j):
    return -1.0 if bin(i & j).count("1") % 2 else 1.0


def transform(row, block):
    """A row times the block Hadamard matrix, number by number; sums are exact here, the division is
    float32's.
    """
    if not block:
        return row
    y = []
    for start in range(0, len(row), block):
        part = [float(value) for value in row[start : start + block]]
        sums = (sum(hadamard_sign(i, j) * part[j] for j in range(block)) for i in range(block))
        y += [F32(F32(total) / F32(math.sqrt(block))) for total in sums]
    return y


def quantize_row(row, position, case):
    """(a, r of every input) of one token by the formulas of docs/format.md: Python integers (or
    float32 for "none"), one float32 division per value.
    """
    granularity, top = case.scheme.granularity, 2**case.scheme.activation_bits - 1
    scales, zero_points = case.tensors["input_scale"], case.tensors["input_zero_point"]
    factors = [1.0] * len(row)
    if granularity == "none":
        scales = torch.ones(len(row)) if scales is None else scales
        return [F32(x / F32(s)) for x, s in zip(row, scales, strict=True)], factors
    if granularity.startswith("dynamic"):
        grid = []
        length = case.scheme.group_length(len(row)) if "group" in granularity else len(row)
        for start in range(0, len(row), length):
            part = row[start : start + length]
            low, high = min([*part, F32(0)]), max([*part, F32(0)])
            scale = F32(F32(high - low) / F32(top))
            scale = scale if scale > 0 else F32(1)
            grid += [(scale, round(float(-low / scale)))] * len(part)
    elif granularity == "token":
        grid = [(F32(scales[position]), int(zero_points[position]))] * len(row)
    else:
        grid = [(F32(s), int(z)) for s, z in zip(scales, zero_points, strict=True)]
    a = []
    for value, (scale, zero_point) in zip(row, grid, strict=True):
        q = min(max(round(float(F32(value / scale))) + zero_point, 0), top)
        a.append(q - zero_point)
    return a, factors if granularity == "channel" else [float(scale) for scale, _ in grid]


def zero_points_of(case):
    """[N][G], those of symmetric weights too."""
    tensors, middle = case.tensors, 2 ** (case.scheme.weight_bits - 1)
    if tensors["weight_zero_point"] is not None:
        return tensors["weight_zero_point"].tolist()
    return torch.full(tensors["weight_scale"].shape, middle).tolist()


def by_loop(case):
    """(y, magnitude): the output in float64 around exact integer sums, and the sum of the absolute
    terms.
    """
    rows = case.x.detach().float().reshape(-1, case.x.shape[-1]).numpy()
    tokens = case.x.shape[-2] if case.x.dim() > 1 else 1
    length, zero_points = case.scheme.group_length(rows.shape[1]), zero_points_of(case)
    weight, weight_scale = case.integers.tolist(), case.tensors["weight_scale"].tolist()
    bias = case.tensors["bias"]
    bias = [0.0] * len(weight) if bias is None else bias.tolist()
    y, magnitude = np.zeros((2, len(rows), len(weight)))
    for m, row in enumerate(rows):
        a, factors = quantize_row(transform(list(row), case.scheme.hadamard), m % tokens, case)
        a = [v.item() if isinstance(v, F32) else v for v in a]
        for n, scales in enumerate(weight_scale):
            sums = [0] * len(scales)
            for k, value in enumerate(a):
                term = value * (weight[n][k] - zero_points[n][k // length])
                sums[k // length] += term
                magnitude[m, n] += abs(term) * scales[k // length] * factors[k]
            parts = zip(factors[::length], scales, sums, strict=True)
            y[m, n] = sum(r * scale * total for r, scale, total in parts) + bias[n]
            magnitude[m, n] += abs(bias[n])
    shape = (*case.x.shape[:-1], len(weight))
    return y.reshape(shape), magnitude.reshape(shape)


def check(case):
    y = run(case)
    expected, magnitude = by_loop(case)
    assert y.dtype == case.x.dtype
    assert y.shape == expected.shape
    # One rounding to the output's dtype, and float32 sums over groups (a few ulp of the terms).
    allowed = HALF_ULP[y.dtype] * 1.01 * np.abs(expected) + 1e-6 * magnitude
    error = np.abs(y.detach().double().numpy() - expected)
    assert (error <= allowed).all(), f"error {error.max()} at {expected.flat[error.argmax()]}"


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "dynamic_group"])
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", range(3, 9))
def test_every_width_of_weight_and_activation(granularity, weight_bits, activation_bits):
    check(make_case(granularity, weight_bits, activation_bits))


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("scaled_input", [False, True])
def test_every_width_of_weight_with_floating_point_inputs(weight_bits, scaled_input):
    check(make_case("none", weight_bits, scaled_input=scaled_input))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_symmetry_and_bias(granularity, symmetric, bias, dtype):
    check(make_case(granularity, 3, 5, symmetric=symmetric, bias=bias, dtype=dtype))


# a shape, outputs, group size; the last: one token without a batch
SHAPES = (
    *(((1, 1), 1, 8), ((5, 37), 7, 16), ((3, 37), 2, -1), ((2, 4, 33), 5, 32)),
    *(((1, 2, 3, 16), 4, 8), ((2, 9), 3, 128), ((3, 40), 3, 13), ((21,), 3, 8)),
)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("shape", "out_features", "group_size"), SHAPES)
def test_shapes_and_groups(granularity, shape, out_features, group_size):
    if granularity != "token" or len(shape) > 1:  # a position is a place in dimension -2
        sizes = {"shape": shape, "out_features": out_features, "group_size": group_size}
        check(make_case(granularity, 5, 6, **sizes))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("block", [2, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_comes_first_and_in_float32(granularity, block, dtype):
    sizes = {"shape": (2, 3, 48), "group_size": 16, "hadamard": block, "dtype": dtype}
    case = make_case(granularity, 4, 6, scaled_input=True, **sizes)
    check(case)
    plain = replace(case, scheme=replace(case.scheme, hadamard=None))
    assert (run(case) - run(plain)).abs().max() > 0.1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_empty_batches(granularity):
    for shape in [(0, 21), (0, 4, 21), (2, 0, 21)]:
        if granularity != "token" or shape[-2]:  # else no positions were ever calibrated
            y = run(make_case(granularity, shape=shape))
            assert (y.shape, y.dtype) == ((*shape[:-1], 3), torch.float32)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_views_give_the_same_bits_and_nothing_is_changed(granularity):
    case = make_case(granularity, shape=(4, 3, 24), hadamard=8)
    expected = run(case)
    tensors = [argument for argument in case.flat if isinstance(argument, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    strided = torch.randn(4, 3, 48)
    strided[..., ::2] = case.x
    transposed = case.x.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (strided[..., ::2], transposed):
        assert not view.is_contiguous()
        assert torch.equal(run(replace(case, x=view)), expected)
    run(case)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_rows_without_values():
    """All-zero, all-positive and all-negative tokens: the range of a token always holds 0."""
    rows = torch.zeros(21), torch.rand(21) + 3, -torch.rand(21) - 3, torch.full((21,), 2.5)
    case = replace(make_case("dynamic_token", shape=(4, 21)), x=torch.stack(rows))
    check(case)
    assert torch.equal(run(case)[0], case.tensors["bias"])


def given_integers(granularity, q, integers, weight_scale, zero_point):
    """A case of 8 bits whose inputs are integers and whose grids leave them as they are."""
    options = {"group_size": -1, "bias": False, "out_features": len(integers)}
    case = make_case(granularity, 8, 8, shape=q.shape, **options)
    tensors = {
        "weight": pack(integers, 8),
        "weight_scale": torch.full((len(integers), 1), weight_scale, dtype=torch.bfloat16),
        "weight_zero_point": torch.full((len(integers), 1), zero_point, dtype=torch.uint8),
    }
    if granularity in STATIC:
        tensors["input_scale"] = torch.ones_like(case.tensors["input_scale"])
        tensors["input_zero_point"] = torch.zeros_like(case.tensors["input_zero_point"])
    return replace(case, x=q.float(), integers=integers).changed(**tensors)


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "dynamic_group"])
def test_integer_sums_are_exact_beyond_float32(granularity):
    """Partial sums of 4 * 10^7 that cancel almost to nothing: a float32 accumulator (24 bits) gives
    another integer.
    """
    q = torch.randint(101, 256, (3, 4096))
    q[:, 0], q[:, 1] = 0, 255  # dynamic: the range is exactly 0 ... 255, its scale 1
    integers = torch.randint(200, 256, (6, 4096))
    integers[:, 2048:] = 255 - integers[:, :2048].flip(1)
    y = run(given_integers(granularity, q, integers, 0.75, 127)).numpy()
    exact = q.numpy().astype(np.int64) @ (integers.numpy().astype(np.int64) - 127).T
    np.testing.assert_array_equal(y, exact.astype(F32) * F32(0.75))
    terms = q.numpy()[:, None, :] * (integers.numpy() - 127)[None]
    assert np.abs(terms.cumsum(-1)).max() > 2 * 2**24
    inexact = terms.astype(F32).cumsum(-1, dtype=F32)[..., -1]
    assert (inexact != exact).any()  # the test would see the difference


@pytest.mark.parametrize("in_features", [255, 258, 259, 300, 1000, 2**16])
def test_every_sum_is_rounded_once(in_features):
    """Sums of positive products pass 2^24 at 259 inputs; at 2^16 even each of the many accumulators
    of a fast float32 product does.

    An exact sum is rounded once, when it becomes float32; an inexact one differs in its last bits
    almost everywhere.
    """
    q, integers = (torch.randint(200, 256, (rows, in_features)) for rows in (16, 32))
    exact = q.numpy().astype(np.int64) @ integers.numpy().astype(np.int64).T
    y = run(given_integers("channel", q, integers, 1, 0)).numpy()
    np.testing.assert_array_equal(y, exact.astype(F32))


# Errors


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point"])
def test_scales_of_another_shape_raise(name):
    """They would leave groups out without a word."""
    case = make_case("dynamic_token", shape=(2, 256), group_size=128)
    message = f"{name} has the shape (3, 1), not [out_features, groups] = (3, 2)."
    with pytest.raises(ValueError, match=re.escape(message)):
        run(case.changed(**{name: case.tensors[name][:, :1]}))


@pytest.mark.parametrize("recorded", [False, True])
def test_a_weight_that_was_never_loaded_raises(recorded):
    """It lies on the meta device; a result would be memory that nobody wrote."""
    x, *rest = make_case("channel").flat
    rest = [one.to("meta") if isinstance(one, Tensor) else one for one in rest]
    message = "the input is on cpu and the weight of a quantized module on meta"
    with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match=message):
        operator()(x, *rest)


def test_another_number_of_inputs_raises():
    case = make_case("dynamic_token")
    message = "an input of shape (2, 3, 20) does not end in in_features=21."
    with pytest.raises(ValueError, match=re.escape(message)):
        run(replace(case, x=case.x[..., :20]))


@pytest.mark.parametrize("shape", [(2, 4, 21), (2, 1, 21), (1, 21), (21,), (3, 2, 21)])
def test_another_number_of_positions_raises(shape):
    message = f"shape {shape} does not have the 3 positions that 'token' was calibrated for."
    with pytest.raises(ValueError, match=re.escape(message)):
        run(replace(make_case("token"), x=torch.zeros(shape)))


@pytest.mark.parametrize("granularity", STATIC)
@pytest.mark.parametrize("missing", ["input_scale", "input_zero_point"])
def test_a_static_module_without_its_scale_raises(granularity, missing):
    message = f"granularity '{granularity}' needs input_scale and input_zero_point: the module was not calibrated."
    with pytest.raises(ValueError, match=re.escape(message)):
        run(make_case(granularity).changed(**{missing: None}))


@pytest.mark.parametrize(("place", "value", "message"), IMPOSSIBLE)
def test_impossible_numbers_given_to_the_operator_raise(place, value, message):
    rest = list(arguments(4, 4, "channel", 8, 64, 32, None))
    rest[place] = value
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        operator()(torch.randn(2, 64), *rest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tokens", [5, 600])
def test_autocast_changes_no_bit(granularity, tokens):
    case = make_case(granularity, 4, 8, shape=(tokens, 200), out_features=7, group_size=64)
    case.x.requires_grad_()
    plain = run(case)
    (grad,) = torch.autograd.grad(plain.square().sum(), case.x)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(case)
        (again,) = torch.autograd.grad(y.square().sum(), case.x)
        with torch.no_grad():
            quick = run(case)
        # it is at work, and again after the call
        assert (case.x @ case.x.T).dtype == torch.bfloat16
    assert torch.equal(y, plain)
    assert torch.equal(quick, plain)
    assert torch.equal(again, grad)


def test_a_block_that_does_not_divide_raises():
    message = "a Hadamard block of 8 must be a power of two that divides 21"
    with pytest.raises(ValueError, match=message):
        run(make_case("dynamic_token", hadamard=8))


# Gradients


def float_weight(case):
    """W of docs/format.md's `dequantize`, number by number, in float64 [N, K]."""
    length, zero_points = case.scheme.group_length(case.integers.shape[1]), zero_points_of(case)
    weight, input_scale = np.zeros(tuple(case.integers.shape)), case.tensors["input_scale"]
    for n, row in enumerate(case.integers.tolist()):
        for k, value in enumerate(row):
            scale = float(case.tensors["weight_scale"][n, k // length])
            weight[n, k] = scale * (value - zero_points[n][k // length])
            if case.scheme.granularity in ("channel", "none") and input_scale is not None:
                weight[n, k] /= float(input_scale[k])
        block = case.scheme.hadamard or 1
        for start in range(0, len(row), block):
            part = weight[n, start : start + block].copy()
            for i in range(block):
                total = sum(hadamard_sign(i, j) * part[j] for j in range(block))
                weight[n, start + i] = total / math.sqrt(block)
    return weight


def trained(case):
    """Wants gradients of the input and the bias."""
    case.x.requires_grad_()
    case.tensors["bias"].requires_grad_()
    return case


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("hadamard", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_of_the_input_is_straight_through(granularity, hadamard, symmetric):
    options = {"hadamard": hadamard, "symmetric": symmetric, "scaled_input": True}
    case = trained(make_case(granularity, shape=(2, 3, 24), **options))
    grad = torch.randn(2, 3, 3)
    run(case).backward(grad)
    expected = grad.double().numpy() @ float_weight(case)
    np.testing.assert_allclose(case.x.grad.numpy(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case.tensors["bias"].grad, grad.sum((0, 1)))


@pytest.mark.parametrize("shape", [(24,), (5, 24), (1, 2, 3, 24), (0, 24)])
def test_gradients_of_any_number_of_dimensions(shape):
    case = trained(make_case("dynamic_token", shape=shape))
    grad = torch.randn(*shape[:-1], 3)
    run(case).backward(grad)
    assert case.x.grad.shape == shape
    torch.testing.assert_close(case.tensors["bias"].grad, grad.reshape(-1, 3).sum(0))


def test_gradient_without_bias_or_without_the_input():
    case = make_case("channel", bias=False)
    case.x.requires_grad_()
    run(case).sum().backward()
    assert case.x.grad is not None
    case = make_case("channel")
    bias = case.tensors["bias"].requires_grad_()
    run(case).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 6.0))
    assert case.x.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype):
    case = make_case("channel", dtype=dtype)
    case = trained(case.changed(bias=case.tensors["bias"].float()))
    run(case).sum().backward()
    bias = case.tensors["bias"]
    assert (case.x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)
    assert torch.equal(bias.grad, torch.full((3,), 6.0))


# What PyTorch asks of an operator


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(granularity, gradient):
    case = make_case(granularity, hadamard=8, shape=(2, 3, 24), symmetric=granularity == "token")
    torch.library.opcheck(operator().default, (trained(case) if gradient else case).flat)


def test_opcheck_of_the_gradient():
    case = make_case("channel", hadamard=8, shape=(2, 3, 24), bias=False)
    arguments = (torch.randn(2, 3, 3), *case.flat[1:])
    torch.library.opcheck(OPS.linear_input_grad.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(21,), (5, 21), (2, 3, 21), (0, 21)])
def test_fake_shapes(dtype, shape):
    case = make_case("dynamic_token", dtype=dtype, shape=shape)

    def moved(move):
        return (move(one) if isinstance(one, Tensor) else one for one in case.flat)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = operator()(*moved(mode.from_tensor))
    real, meta = run(case), operator()(*moved(lambda tensor: tensor.to("meta")))
    assert (y.shape, y.dtype, y.stride()) == (real.shape, real.dtype, real.stride())
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles_into_one_graph_with_equal_bits(granularity):
    case = make_case(granularity, hadamard=8, shape=(2, 3, 24))

    def more(x):
        return linear(x * 1.0, *case.call[1:]) + 1

    torch._dynamo.reset()
    compiled = torch.compile(more, fullgraph=True, backend="aot_eager")
    for x in (case.x, torch.randn(5, 3, 24)):
        assert torch.equal(compiled(x), more(x))
    x, y = case.x.clone().requires_grad_(), case.x.clone().requires_grad_()
    compiled(x).square().sum().backward()
    more(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
