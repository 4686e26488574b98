"""`qvlm_hf::linears`: what `linear` gives for each module that shares the input, bit for bit, and what PyTorch asks of an operator."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import IMPOSSIBLE, arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qvlm_hf import ops
from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import cpu, reference

GRANULARITIES = ("channel", "token", "dynamic_token", "none")
MODULES = ("weight", "weight_scale", "weight_zero_point", "bias")  # lists, one tensor per module


def make_site(
    granularity,
    out_features,
    x,
    *,
    weight_bits=4,
    activation_bits=4,
    group_size=8,
    symmetric=False,
    bias=True,
    hadamard=None,
):
    """Keyword arguments of `ops.linears`: modules of `out_features` outputs that read the input x."""
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=16 if granularity == "none" else activation_bits,
        group_size=group_size,
        symmetric=symmetric,
        granularity=granularity,
        hadamard=hadamard,
    )
    in_features = x.shape[-1]
    groups, top = scheme.groups(in_features), 2**activation_bits - 1
    statics = {"channel": in_features, "token": x.shape[-2] if x.dim() > 1 else 1}.get(granularity)
    return {
        "x": x,
        "weight": [
            pack(torch.randint(0, 2**weight_bits, (n, in_features)).to(torch.uint8), weight_bits)
            for n in out_features
        ],
        "weight_scale": [(torch.rand(n, groups) + 0.1).bfloat16() for n in out_features],
        "weight_zero_point": []
        if symmetric
        else [torch.randint(0, 2**weight_bits, (n, groups)).to(torch.uint8) for n in out_features],
        "input_scale": None if statics is None else (torch.rand(statics) + 0.5) * 4 / top,
        "input_zero_point": None
        if statics is None
        else torch.randint(0, top + 1, (statics,), dtype=torch.int32),
        "bias": [torch.randn(n).to(x.dtype) for n in out_features] if bias else [],
        "in_features": in_features,
        "scheme": scheme,
    }


def one_by_one(site):
    rest = {name: value for name, value in site.items() if name not in MODULES}
    lists = [site[name] or [None] * len(site["weight"]) for name in MODULES]
    return [
        ops.linear(**rest, **dict(zip(MODULES, tensors, strict=True)))
        for tensors in zip(*lists, strict=True)
    ]


def op_arguments(site):
    s, k = site["scheme"], site["in_features"]
    tensors = [
        site[name]
        for name in (
            "x",
            "weight",
            "weight_scale",
            "weight_zero_point",
            "input_scale",
            "input_zero_point",
            "bias",
        )
    ]
    return (
        *tensors,
        k,
        s.weight_bits,
        s.activation_bits,
        s.group_length(k),
        s.granularity,
        s.hadamard or 0,
    )


def check(site):
    outputs, expected = ops.linears(**site), one_by_one(site)
    assert len(outputs) == len(expected)
    for y, one in zip(outputs, expected, strict=True):
        assert (y.dtype, y.shape, y.stride()) == (one.dtype, one.shape, one.stride())
        assert torch.equal(y, one)
    assert len({y.untyped_storage().data_ptr() for y in outputs if y.numel()}) == len(
        [y for y in outputs if y.numel()]
    )


@given(
    granularity=st.sampled_from(GRANULARITIES),
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(3, 8),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 20, 67, 193]),
    out_features=st.lists(
        st.sampled_from([1, 7, 15, 16, 17, 40, 64, 65, 130]), min_size=1, max_size=4
    ),
    sizes=st.sampled_from(
        [(64, 64), (43, -1), (520, 128), (96, 32), (200, 8), (1030, 256), (40, 13)]
    ),
    symmetric=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_linear_of_each_module(
    granularity, weight_bits, activation_bits, tokens, out_features, sizes, symmetric, bias, dtype
):
    x = (torch.randn(tokens, sizes[0]) * 2).to(dtype)
    check(
        make_site(
            granularity, out_features, x,
            weight_bits=weight_bits, activation_bits=activation_bits, group_size=sizes[1], symmetric=symmetric, bias=bias,
        )
    )  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (1, 2, 3, 24), (0, 24), (2, 800, 24)])
def test_shapes_with_a_transform(granularity, shape):
    if granularity == "token" and len(shape) == 1:
        pytest.skip("one token has no positions")
    if granularity == "token" and shape[-2] == 0:
        pytest.skip("no positions were ever calibrated")
    check(make_site(granularity, (5, 3), torch.randn(shape), hadamard=8))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_reference_takes_the_modules_one_by_one(granularity):
    site = make_site(granularity, (5, 3, 16), torch.randn(2, 3, 24))
    outputs = reference.linears(*op_arguments(site))
    expected = [
        reference.linear(
            site["x"],
            *tensors,
            site["input_scale"],
            site["input_zero_point"],
            bias,
            *op_arguments(site)[7:],
        )
        for *tensors, bias in zip(*(site[name] for name in MODULES), strict=True)
    ]
    assert all(torch.equal(y, one) for y, one in zip(outputs, expected, strict=True))
    for y, one in zip(ops.linears(**site), outputs, strict=True):  # and the kernels agree with it
        torch.testing.assert_close(y, one, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    site = make_site("channel", (3, 4), torch.randn(2, 26), weight_bits=5, group_size=13)
    assert cpu.kernel_name(26, 5, 4, 13).startswith("reference (groups of 13")
    check(site)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 30])
def test_threads_do_not_change_the_result(threads, tokens):
    site = make_site(
        "dynamic_token", (300, 40, 90), torch.randn(tokens, 512), group_size=128, activation_bits=8
    )
    before, expected = torch.get_num_threads(), one_by_one(site)
    try:
        torch.set_num_threads(threads)
        outputs = ops.linears(**site)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, one) for y, one in zip(outputs, expected, strict=True))


def test_views_give_the_same_bits():
    site = make_site("channel", (5, 3), torch.randn(4, 24))
    expected = ops.linears(**site)
    wide = torch.randn(4, 48)
    wide[:, ::2] = site["x"]
    tall = [torch.cat([weight, weight], 1)[:, : weight.shape[1]] for weight in site["weight"]]
    assert not tall[0].is_contiguous()
    assert all(
        torch.equal(y, one)
        for y, one in zip(
            ops.linears(**{**site, "x": wide[:, ::2], "weight": tall}), expected, strict=True
        )
    )


def test_no_modules_give_no_outputs():
    site = make_site("channel", (), torch.randn(4, 24))
    assert ops.linears(**site) == []


# Errors


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point", "bias"])
def test_lists_of_different_lengths_raise(name):
    site = make_site("channel", (5, 3), torch.randn(4, 24))
    site[name] = site[name][:1]
    with pytest.raises(
        ValueError, match=r"2 weights, .* each list must have one tensor per module"
    ):
        ops.linears(**site)


def test_another_number_of_inputs_raises():
    site = make_site("channel", (5, 3), torch.randn(4, 24))
    with pytest.raises(
        ValueError, match=re.escape("an input of shape (4, 20) does not end in in_features=24.")
    ):
        ops.linears(**{**site, "x": torch.randn(4, 20)})


@pytest.mark.parametrize(("place", "value", "message"), IMPOSSIBLE)
@pytest.mark.parametrize("modules", [0, 1, 2])
def test_impossible_numbers_given_to_the_operator_raise(place, value, message, modules):
    rest = list(arguments(4, 4, "channel", 8, 64, 32, None, False, torch.float32))
    for i in (0, 1, 2, 5):
        rest[i] = [rest[i]] * modules
    rest[place] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.qvlm_hf.linears(torch.randn(2, 64), *rest)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tokens", [5, 600])
@pytest.mark.parametrize(
    "group_size", [64, 41]
)  # the kernels, and what they leave to the reference
def test_autocast_changes_no_bit(granularity, tokens, group_size):
    site = make_site(
        granularity,
        (7, 3),
        torch.randn(tokens, 200),
        weight_bits=5,
        activation_bits=8,
        group_size=group_size,
    )
    with torch.no_grad():
        plain = ops.linears(**site)
        with torch.autocast("cpu", torch.bfloat16):
            again = ops.linears(**site)
    assert all(torch.equal(y, one) for y, one in zip(again, plain, strict=True))


def test_a_module_of_another_number_of_inputs_raises():
    site = make_site("channel", (5, 3), torch.randn(4, 24))
    site["weight"][1] = pack(torch.zeros(3, 16, dtype=torch.uint8), 4)
    with pytest.raises(
        ValueError,
        match=re.escape("a packed weight of shape (3, 2) does not hold 24 values of 4 bits"),
    ):
        ops.linears(**site)


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_a_wanted_gradient_raises_and_is_never_detached(wanted):
    site = make_site("channel", (5, 3), torch.randn(4, 24))
    (site["x"] if wanted == "x" else site["bias"][1]).requires_grad_()
    with pytest.raises(
        ValueError,
        match=re.escape("qvlm_hf::linears has no gradient: call qvlm_hf::linear for each module"),
    ):
        ops.linears(**site)
    with torch.no_grad():
        check(site)
    with torch.inference_mode():
        check(site)


# What PyTorch asks of an operator


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(granularity, full):
    site = make_site(
        granularity, (5, 3, 7), torch.randn(2, 3, 24), symmetric=not full, bias=full, hadamard=8
    )
    torch.library.opcheck(torch.ops.qvlm_hf.linears.default, op_arguments(site))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(21,), (5, 21), (2, 3, 21), (0, 21)])
def test_fake_shapes(dtype, shape):
    site = make_site("dynamic_token", (5, 3), torch.randn(shape).to(dtype))

    def moved(argument, move):
        if isinstance(argument, list):
            return [move(tensor) for tensor in argument]
        return move(argument) if isinstance(argument, Tensor) else argument

    real = ops.linears(**site)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.ops.qvlm_hf.linears(
            *(moved(argument, mode.from_tensor) for argument in op_arguments(site))
        )
    metas = torch.ops.qvlm_hf.linears(
        *(moved(argument, lambda tensor: tensor.to("meta")) for argument in op_arguments(site))
    )
    for y, fake, meta in zip(real, fakes, metas, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())
        assert (meta.shape, meta.dtype, meta.device.type) == (y.shape, y.dtype, "meta")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles_into_one_graph_with_equal_bits(granularity):
    site = make_site(granularity, (5, 3), torch.randn(2, 3, 24), hadamard=8)
    rest = {name: value for name, value in site.items() if name != "x"}

    def run(x):
        return [y + 1 for y in ops.linears(x * 1.0, **rest)]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for x in (site["x"], torch.randn(5, 3, 24)):
        assert all(torch.equal(y, one) for y, one in zip(compiled(x), run(x), strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_bits_plain_fake_and_compiled(context):
    """Where none is recorded the calls skip the autograd layer: modes and compilers below it must still see them."""
    site = make_site("dynamic_token", (5, 3), torch.randn(3, 24).requires_grad_())
    rest = {name: value for name, value in site.items() if name != "x"}
    expected = one_by_one(site)
    assert all(y.requires_grad for y in expected)
    with context():
        assert all(
            torch.equal(y, one)
            for y, one in zip(one_by_one(site) + ops.linears(**site), expected * 2, strict=True)
        )
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: [y + 1 for y in ops.linears(x, **rest)], fullgraph=True, backend="aot_eager"
        )
        assert all(
            torch.equal(y, one + 1) for y, one in zip(compiled(site["x"]), expected, strict=True)
        )
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = ops.linears(**{**site, "x": mode.from_tensor(site["x"])})
        assert [fake.shape for fake in fakes] == [y.shape for y in expected]
        traced = make_fx(lambda x: ops.linears(x, **rest))(site["x"].detach())
        assert torch.ops.qvlm_hf.linears.default in [node.target for node in traced.graph.nodes]
        assert not any(y.requires_grad for y in ops.linears(**site))
