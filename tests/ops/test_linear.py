"""`qvlm_hf::linear`: kernels and reference against a loop over single numbers, and what PyTorch asks of an operator.

Legend: B batch, T tokens, K in_features, N out_features, G groups of L inputs.
"""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from linear_calls import IMPOSSIBLE, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import linear

STATIC = ("channel", "token")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
F32 = np.float32
REFERENCE = [False]


@pytest.fixture(autouse=True, params=["kernel", "reference"])
def _backend(request):
    """Every test runs with the kernel that this machine has, and with the reference."""
    REFERENCE[0] = request.param == "reference"


@dataclass(frozen=True)
class Case:
    """An input and the tensors of one module; `integers` is `weight` before packing."""

    scheme: QuantScheme
    x: Tensor
    integers: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: Tensor | None
    reference: bool

    @property
    def arguments(self):
        statics = (
            self.weight_scale,
            self.weight_zero_point,
            self.input_scale,
            self.input_zero_point,
            self.bias,
        )
        return (self.weight, *statics, self.integers.shape[1])

    def run(self):
        return linear(self.x, *self.arguments, self.scheme, reference=self.reference)

    def op_arguments(self):
        s, k = self.scheme, self.integers.shape[1]
        return (
            self.x,
            *self.arguments,
            s.weight_bits,
            s.activation_bits,
            s.group_length(k),
            s.granularity,
            s.hadamard or 0,
        )


def make_case(
    granularity,
    weight_bits=4,
    activation_bits=4,
    *,
    shape=(2, 3, 21),
    out_features=3,
    group_size=8,
    symmetric=False,
    bias=True,
    dtype=torch.float32,
    hadamard=None,
    scaled_input=False,
):
    """Random tensors; the activation grid covers about 80 % of the input, so that both ends are clipped."""
    activation_bits = 16 if granularity == "none" else activation_bits
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        group_size=group_size,
        symmetric=symmetric,
        granularity=granularity,
        hadamard=hadamard,
    )
    in_features = shape[-1]
    groups = -(-in_features // (group_size if group_size > 0 else in_features))
    # Multiples of 1/64: their sums are exact, so that a Hadamard matrix gives the same bits in any
    # order of adding.
    x = (torch.randn(shape) * 2 + 0.5).mul(64).round().div(64).to(dtype)
    top = 2**activation_bits - 1
    statics = {
        "channel": in_features,
        "token": shape[-2] if len(shape) > 1 else 1,
        "none": in_features if scaled_input else None,
    }.get(granularity)
    integers = torch.randint(0, 2**weight_bits, (out_features, in_features)).to(torch.uint8)
    return Case(
        scheme=scheme,
        x=x,
        integers=integers,
        weight=pack(integers, weight_bits),
        weight_scale=(torch.rand(out_features, groups) + 0.1).to(torch.bfloat16),
        weight_zero_point=None
        if symmetric
        else torch.randint(0, 2**weight_bits, (out_features, groups)).to(torch.uint8),
        input_scale=None
        if statics is None
        else (torch.rand(statics) + 0.5) * (1 if granularity == "none" else 4 / top),
        input_zero_point=torch.randint(top // 4, top - top // 4 + 1, (statics,), dtype=torch.int32)
        if granularity in STATIC
        else None,
        bias=torch.randn(out_features).to(dtype) if bias else None,
        reference=REFERENCE[0],
    )


def hadamard_sign(i, j):
    return -1.0 if bin(i & j).count("1") % 2 else 1.0


def transform(row, block):
    """A row times the block Hadamard matrix, number by number; sums are exact here, the division is float32's."""
    if not block:
        return row
    y = []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        y += [
            F32(
                F32(sum(hadamard_sign(i, j) * float(part[j]) for j in range(block)))
                / F32(math.sqrt(block))
            )
            for i in range(block)
        ]
    return y


def quantize_row(row, position, case):
    """(a, r) of one token by the formulas of docs/format.md: Python integers (or float32 for "none"), one float32 division per value."""
    granularity, top = case.scheme.granularity, 2**case.scheme.activation_bits - 1
    if granularity == "none":
        return [
            value if case.input_scale is None else F32(value / F32(case.input_scale[k]))
            for k, value in enumerate(row)
        ], F32(1)
    if granularity == "dynamic_token":
        low, high = min([*row, F32(0)]), max([*row, F32(0)])
        scale = F32(F32(high - low) / F32(top))
        scale = scale if scale > 0 else F32(1)
        grid = [(scale, round(float(-low / scale)))] * len(row)
        row_scale = scale
    elif granularity == "token":
        scale = F32(case.input_scale[position])
        grid, row_scale = [(scale, int(case.input_zero_point[position]))] * len(row), scale
    else:
        grid = [
            (F32(s), int(z))
            for s, z in zip(case.input_scale.numpy(), case.input_zero_point, strict=True)
        ]
        row_scale = F32(1)
    a = []
    for value, (scale, zero_point) in zip(row, grid, strict=True):
        q = min(max(round(float(F32(value / scale))) + zero_point, 0), top)
        a.append(q - zero_point)
    return a, row_scale


def by_loop(case):
    """(y, magnitude): the output in float64 around exact integer sums, and the sum of the absolute terms."""
    rows = case.x.detach().float().reshape(-1, case.x.shape[-1]).numpy()
    tokens = case.x.shape[-2] if case.x.dim() > 1 else 1
    length, half = case.scheme.group_length(rows.shape[1]), 2 ** (case.scheme.weight_bits - 1)
    weight, weight_scale = case.integers.tolist(), case.weight_scale.double().tolist()
    zero_points = (
        [[half] * len(row) for row in weight_scale]
        if case.weight_zero_point is None
        else case.weight_zero_point.tolist()
    )
    y = np.zeros((len(rows), len(weight)))
    magnitude = np.zeros_like(y)
    for m, row in enumerate(rows):
        a, row_scale = quantize_row(transform(list(row), case.scheme.hadamard), m % tokens, case)
        a = [float(v) if case.scheme.granularity == "none" else int(v) for v in a]
        for n in range(len(weight)):
            sums = [0] * len(weight_scale[n])
            for k, value in enumerate(a):
                term = value * (weight[n][k] - zero_points[n][k // length])
                sums[k // length] += term
                magnitude[m, n] += abs(term) * weight_scale[n][k // length] * float(row_scale)
            y[m, n] = float(row_scale) * sum(
                scale * total for scale, total in zip(weight_scale[n], sums, strict=True)
            )
            if case.bias is not None:
                y[m, n] += float(case.bias[n])
                magnitude[m, n] += abs(float(case.bias[n]))
    shape = (*case.x.shape[:-1], len(weight))
    return y.reshape(shape), magnitude.reshape(shape)


def check(case):
    y = case.run()
    expected, magnitude = by_loop(case)
    assert y.dtype == case.x.dtype
    assert y.shape == expected.shape
    # One rounding to the output's dtype, and float32 sums over groups (a few ulp of the terms).
    allowed = HALF_ULP[y.dtype] * 1.01 * np.abs(expected) + 1e-6 * magnitude
    error = np.abs(y.detach().double().numpy() - expected)
    assert (error <= allowed).all(), f"error {error.max()} at {expected.flat[error.argmax()]}"


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token"])
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", range(3, 9))
def test_every_width_of_weight_and_activation(granularity, weight_bits, activation_bits):
    check(make_case(granularity, weight_bits, activation_bits))


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("scaled_input", [False, True])
def test_every_width_of_weight_with_floating_point_inputs(weight_bits, scaled_input):
    check(make_case("none", weight_bits, scaled_input=scaled_input))


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_symmetry_and_bias(granularity, symmetric, bias, dtype):
    check(make_case(granularity, 3, 5, symmetric=symmetric, bias=bias, dtype=dtype))


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize(
    ("shape", "out_features", "group_size"),
    [
        ((1, 1), 1, 8),
        ((5, 37), 7, 16),
        ((3, 37), 2, -1),
        ((2, 4, 33), 5, 32),
        ((1, 2, 3, 16), 4, 8),
        ((2, 9), 3, 128),
        ((3, 40), 3, 13),
    ],
)
def test_shapes_and_groups(granularity, shape, out_features, group_size):
    check(
        make_case(granularity, 5, 6, shape=shape, out_features=out_features, group_size=group_size)
    )


@pytest.mark.parametrize("granularity", ["channel", "dynamic_token", "none"])
def test_one_token_without_a_batch(granularity):
    check(make_case(granularity, shape=(21,)))


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize("block", [2, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_comes_first_and_in_float32(granularity, block, dtype):
    case = make_case(
        granularity,
        4,
        6,
        shape=(2, 3, 48),
        group_size=16,
        hadamard=block,
        scaled_input=granularity == "none",
        dtype=dtype,
    )
    check(case)
    plain = replace(case, scheme=replace(case.scheme, hadamard=None))
    assert (case.run() - plain.run()).abs().max() > 0.1


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
def test_empty_batches(granularity):
    for shape in [(0, 21), (0, 4, 21), (2, 0, 21)]:
        if granularity == "token" and shape[-2] == 0:
            continue  # no positions were ever calibrated
        case = make_case(granularity, shape=shape)
        y = case.run()
        assert y.shape == (*shape[:-1], 3)
        assert y.dtype == torch.float32


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
def test_views_give_the_same_bits_and_nothing_is_changed(granularity):
    case = make_case(granularity, shape=(4, 3, 24), hadamard=8)
    expected = case.run()
    tensors = [argument for argument in case.op_arguments() if isinstance(argument, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    strided = torch.randn(4, 3, 48)
    strided[..., ::2] = case.x
    transposed = case.x.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (strided[..., ::2], transposed):
        assert not view.is_contiguous()
        assert torch.equal(replace(case, x=view).run(), expected)
    case.run()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_rows_without_values():
    """All-zero, all-positive and all-negative tokens: the range of a token always holds 0."""
    case = make_case("dynamic_token", shape=(4, 21))
    x = torch.stack(
        [torch.zeros(21), torch.rand(21) + 3, -torch.rand(21) - 3, torch.full((21,), 2.5)]
    )
    check(replace(case, x=x))
    assert torch.equal(replace(case, x=x).run()[0], case.bias)


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token"])
def test_integer_sums_are_exact_beyond_float32(granularity):
    """Partial sums of 4 * 10^7 that cancel almost to nothing: a float32 accumulator (24 bits) gives another integer."""
    tokens, in_features, out_features = 3, 4096, 6
    base = make_case(
        granularity,
        8,
        8,
        shape=(tokens, in_features),
        out_features=out_features,
        group_size=-1,
        bias=False,
    )
    q = torch.randint(101, 256, (tokens, in_features))
    q[:, 0], q[:, 1] = 0, 255  # dynamic: the range is exactly 0 ... 255, its scale 1
    half = in_features // 2
    integers = torch.randint(200, 256, (out_features, in_features))
    integers[:, half:] = 255 - integers[:, :half].flip(1)
    statics = {"channel": in_features, "token": tokens}.get(granularity)
    case = replace(
        base,
        x=q.float(),
        integers=integers,
        weight=pack(integers, 8),
        weight_scale=torch.full((out_features, 1), 0.75, dtype=torch.bfloat16),
        weight_zero_point=torch.full((out_features, 1), 127, dtype=torch.uint8),
        input_scale=None if statics is None else torch.ones(statics),
        input_zero_point=None if statics is None else torch.zeros(statics, dtype=torch.int32),
    )
    exact = q.numpy().astype(np.int64) @ (integers.numpy().astype(np.int64) - 127).T
    np.testing.assert_array_equal(case.run().numpy(), exact.astype(F32) * F32(0.75))
    terms = q.numpy()[:, None, :] * (integers.numpy() - 127)[None]
    assert np.abs(terms.cumsum(-1)).max() > 2 * 2**24
    assert (
        terms.astype(F32).cumsum(-1, dtype=F32)[..., -1] != exact
    ).any()  # the test would see the difference


@pytest.mark.parametrize("in_features", [255, 258, 259, 300, 1000, 2**16])
def test_every_sum_is_rounded_once(in_features):
    """Sums of positive products pass 2^24 at 259 inputs; at 2^16 even each of the many accumulators of a fast float32 product does.

    An exact sum is rounded once, when it becomes float32; an inexact one differs in its last bits
    almost everywhere.
    """
    tokens, out_features = 16, 32
    base = make_case(
        "channel",
        8,
        8,
        shape=(tokens, in_features),
        out_features=out_features,
        group_size=-1,
        bias=False,
    )
    q, integers = (
        torch.randint(200, 256, (tokens, in_features)),
        torch.randint(200, 256, (out_features, in_features)),
    )
    case = replace(
        base,
        x=q.float(),
        integers=integers,
        weight=pack(integers, 8),
        weight_scale=torch.ones(out_features, 1, dtype=torch.bfloat16),
        weight_zero_point=torch.zeros(out_features, 1, dtype=torch.uint8),
        input_scale=torch.ones(in_features),
        input_zero_point=torch.zeros(in_features, dtype=torch.int32),
    )
    exact = q.numpy().astype(np.int64) @ integers.numpy().astype(np.int64).T
    np.testing.assert_array_equal(case.run().numpy(), exact.astype(F32))


# Errors


def test_scales_of_another_shape_raise():
    """They would leave groups out without a word."""
    rest = list(arguments(4, 8, "dynamic_token", 3, 256, 128, None, False, torch.float32))
    for place, name in ((1, "weight_scale"), (2, "weight_zero_point")):
        wrong = [*rest[:place], rest[place][:, :1], *rest[place + 1 :]]
        with pytest.raises(
            ValueError,
            match=re.escape(f"{name} has the shape (3, 1), not [out_features, groups] = (3, 2)."),
        ):
            torch.ops.qvlm_hf.linear(torch.randn(2, 256), *wrong)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_weight_that_was_never_loaded_raises(recorded):
    """It lies on the meta device; a result would be memory that nobody wrote."""
    weight, *rest = (
        one.to("meta") if isinstance(one, torch.Tensor) else one
        for one in arguments(4, 4, "channel", 8, 64, 32, None, False, torch.float32)
    )
    with (
        torch.set_grad_enabled(recorded),
        pytest.raises(
            ValueError, match="the input is on cpu and the weight of a quantized module on meta"
        ),
    ):
        torch.ops.qvlm_hf.linear(torch.randn(2, 64), weight, *rest)


def test_another_number_of_inputs_raises():
    case = make_case("dynamic_token")
    with pytest.raises(
        ValueError, match=re.escape("an input of shape (2, 3, 20) does not end in in_features=21.")
    ):
        replace(case, x=case.x[..., :20]).run()


@pytest.mark.parametrize("shape", [(2, 4, 21), (2, 1, 21), (1, 21), (21,), (3, 2, 21)])
def test_another_number_of_positions_raises(shape):
    message = (
        f"an input of shape {shape} does not have the 3 positions that 'token' was calibrated for."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(make_case("token"), x=torch.zeros(shape)).run()


@pytest.mark.parametrize("granularity", STATIC)
@pytest.mark.parametrize("missing", ["input_scale", "input_zero_point"])
def test_a_static_module_without_its_scale_raises(granularity, missing):
    message = f"granularity '{granularity}' needs input_scale and input_zero_point: the module was not calibrated."
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(make_case(granularity), **{missing: None}).run()


@pytest.mark.parametrize(("place", "value", "message"), IMPOSSIBLE)
def test_impossible_numbers_given_to_the_operator_raise(place, value, message):
    rest = list(arguments(4, 4, "channel", 8, 64, 32, None, False, torch.float32))
    rest[place] = value
    operator = torch.ops.qvlm_hf.linear_reference if REFERENCE[0] else torch.ops.qvlm_hf.linear
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        operator(torch.randn(2, 64), *rest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize("tokens", [5, 600])
def test_autocast_changes_no_bit(granularity, tokens):
    case = make_case(granularity, 4, 8, shape=(tokens, 200), out_features=7, group_size=64)
    case.x.requires_grad_()
    plain = case.run()
    (grad,) = torch.autograd.grad(plain.square().sum(), case.x)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run()
        (again,) = torch.autograd.grad(y.square().sum(), case.x)
        with torch.no_grad():
            quick = case.run()
        assert (
            case.x @ case.x.T
        ).dtype == torch.bfloat16  # it is at work, and again after the call
    assert torch.equal(y, plain)
    assert torch.equal(quick, plain)
    assert torch.equal(again, grad)


def test_a_block_that_does_not_divide_raises():
    with pytest.raises(
        ValueError, match="a Hadamard block of 8 must be a power of two that divides 21"
    ):
        make_case("dynamic_token", hadamard=8).run()


# Gradients


def float_weight(case):
    """W of docs/format.md's `dequantize`, number by number, in float64 [N, K]."""
    length, half = (
        case.scheme.group_length(case.integers.shape[1]),
        2 ** (case.scheme.weight_bits - 1),
    )
    weight = np.zeros(tuple(case.integers.shape))
    for n, row in enumerate(case.integers.tolist()):
        for k, value in enumerate(row):
            zero_point = (
                half
                if case.weight_zero_point is None
                else int(case.weight_zero_point[n, k // length])
            )
            weight[n, k] = float(case.weight_scale[n, k // length]) * (value - zero_point)
            if case.scheme.granularity in ("channel", "none") and case.input_scale is not None:
                weight[n, k] /= float(case.input_scale[k])
        if block := case.scheme.hadamard:
            for start in range(0, len(row), block):
                part = weight[n, start : start + block].copy()
                for i in range(block):
                    weight[n, start + i] = sum(
                        hadamard_sign(i, j) * part[j] for j in range(block)
                    ) / math.sqrt(block)
    return weight


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize("hadamard", [None, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_of_the_input_is_straight_through(granularity, hadamard, symmetric):
    case = make_case(
        granularity,
        shape=(2, 3, 24),
        hadamard=hadamard,
        symmetric=symmetric,
        scaled_input=granularity == "none",
    )
    case = replace(case, x=case.x.requires_grad_(), bias=case.bias.requires_grad_())
    grad = torch.randn(2, 3, 3)
    case.run().backward(grad)
    np.testing.assert_allclose(
        case.x.grad.numpy(), grad.double().numpy() @ float_weight(case), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(case.bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("shape", [(24,), (5, 24), (1, 2, 3, 24), (0, 24)])
def test_gradients_of_any_number_of_dimensions(shape):
    case = make_case("dynamic_token", shape=shape)
    case = replace(case, x=case.x.requires_grad_(), bias=case.bias.requires_grad_())
    grad = torch.randn(*shape[:-1], 3)
    case.run().backward(grad)
    assert case.x.grad.shape == shape
    torch.testing.assert_close(case.bias.grad, grad.reshape(-1, 3).sum(0))


def test_gradient_without_bias_or_without_the_input():
    case = make_case("channel", bias=False)
    x = case.x.requires_grad_()
    replace(case, x=x).run().sum().backward()
    assert x.grad is not None
    case = make_case("channel")
    bias = case.bias.requires_grad_()
    replace(case, bias=bias).run().sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((3,), 6.0))
    assert case.x.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype):
    case = make_case("channel", dtype=dtype)
    x, bias = case.x.requires_grad_(), case.bias.float().requires_grad_()
    replace(case, x=x, bias=bias).run().sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)
    assert torch.equal(bias.grad, torch.full((3,), 6.0))


# What PyTorch asks of an operator


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(granularity, gradient):
    case = make_case(granularity, hadamard=8, shape=(2, 3, 24), symmetric=granularity == "token")
    if gradient:
        case = replace(case, x=case.x.requires_grad_(), bias=case.bias.requires_grad_())
    operator = torch.ops.qvlm_hf.linear_reference if case.reference else torch.ops.qvlm_hf.linear
    torch.library.opcheck(operator.default, case.op_arguments())


def test_opcheck_of_the_gradient():
    case = make_case("channel", hadamard=8, shape=(2, 3, 24))
    packed, scale, zero, input_scale = case.arguments[:4]
    torch.library.opcheck(
        torch.ops.qvlm_hf.linear_input_grad.default,
        (torch.randn(2, 3, 3), packed, scale, zero, input_scale, 24, 4, 8, "channel", 8),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(21,), (5, 21), (2, 3, 21), (0, 21)])
def test_fake_shapes(dtype, shape):
    case = make_case("dynamic_token", dtype=dtype, shape=shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = torch.ops.qvlm_hf.linear(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in case.op_arguments())
        )
    real = case.run()
    assert (y.shape, y.dtype, y.stride()) == (real.shape, real.dtype, real.stride())
    meta = torch.ops.qvlm_hf.linear(
        *(a.to("meta") if isinstance(a, Tensor) else a for a in case.op_arguments())
    )
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
def test_compiles_into_one_graph_with_equal_bits(granularity):
    case = make_case(granularity, hadamard=8, shape=(2, 3, 24))

    def run(x):
        return linear(x * 1.0, *case.arguments, case.scheme) + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.x), run(case.x))
    other = torch.randn(5, 3, 24)
    assert torch.equal(compiled(other), run(other))
    x, y = case.x.clone().requires_grad_(), case.x.clone().requires_grad_()
    compiled(x).square().sum().backward()
    run(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
