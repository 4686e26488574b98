"""`qvlm_hf::linears`: what `linear` gives for each module that shares the input, bit for bit, and
what PyTorch asks of an operator.
"""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import (
    DTYPES,
    GRANULARITIES,
    IMPOSSIBLE,
    OPS,
    arguments,
    cpu_kernel,
    flat,
    lists,
    make_site,
    one_by_one,
    with_threads,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qvlm_hf.format.packing import pack
from qvlm_hf.ops.linear import linears


def same(outputs, expected):
    assert len(outputs) == len(expected)
    assert all(torch.equal(y, one) for y, one in zip(outputs, expected, strict=True))


def check(site):
    outputs, expected = linears(*site), one_by_one(*site)
    same(outputs, expected)
    for y, one in zip(outputs, expected, strict=True):
        assert (y.dtype, y.shape, y.stride()) == (one.dtype, one.shape, one.stride())
    filled = [y.untyped_storage().data_ptr() for y in outputs if y.numel()]
    assert len(set(filled)) == len(filled)


@given(
    granularity=st.sampled_from(GRANULARITIES),
    bits=st.tuples(st.integers(2, 8), st.integers(3, 8)),
    tokens=st.sampled_from([1, 2, 3, 5, 8, 9, 20, 67, 193]),
    out_features=st.lists(
        st.sampled_from([1, 7, 15, 16, 17, 40, 64, 65, 130]), min_size=1, max_size=4
    ),
    sizes=st.sampled_from(
        [(64, 64), (43, -1), (520, 128), (96, 32), (200, 8), (1030, 256), (40, 13)]
    ),
    symmetric=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_linear_of_each_module(
    granularity, bits, tokens, out_features, sizes, symmetric, bias, dtype
):
    options = {"symmetric": symmetric, "bias": bias, "dtype": dtype}
    sizes = {"shape": (tokens, sizes[0]), "group_size": sizes[1]}
    check(make_site(granularity, out_features, *bits, **sizes, **options))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (1, 2, 3, 24), (0, 24), (2, 800, 24)])
def test_shapes_with_a_transform(granularity, shape):
    if granularity != "token" or (len(shape) > 1 and shape[-2]):  # else there are no positions
        check(make_site(granularity, (5, 3), shape=shape, hadamard=8))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_kernels_and_reference_agree(granularity):
    x, weights, *numbers = make_site(granularity, (5, 3, 16), shape=(2, 3, 24))
    expected = one_by_one(x, weights, *numbers, reference=True)
    for y, one in zip(linears(x, weights, *numbers), expected, strict=True):
        torch.testing.assert_close(y, one, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_do_not_take_goes_to_the_reference():
    assert cpu_kernel(26, 5, 4, 13).startswith("reference (groups of 13")
    check(make_site("channel", (3, 4), 5, shape=(2, 26), group_size=13))


@pytest.mark.parametrize("tokens", [1, 30])
def test_threads_do_not_change_the_result(tokens):
    options = {"shape": (tokens, 512), "group_size": 128}
    site = make_site("dynamic_token", (300, 40, 90), 4, 8, **options)
    for outputs in with_threads(lambda: linears(*site)):
        same(outputs, one_by_one(*site))


def test_views_give_the_same_bits():
    x, weights, *numbers = make_site("channel", (5, 3), shape=(4, 24))
    wide = torch.randn(4, 48)
    wide[:, ::2] = x
    tall = [one | {"weight": torch.cat([one["weight"]] * 2, 1)[:, :3]} for one in weights]
    assert not tall[0]["weight"].is_contiguous()
    same(linears(wide[:, ::2], tall, *numbers), linears(x, weights, *numbers))


def test_no_modules_give_no_outputs():
    given = [
        [] if isinstance(own, list) else own
        for own in lists(arguments(4, 4, "channel", 8, 64, 32, 1))
    ]
    assert OPS.linears(torch.randn(2, 64), *given) == []


# Errors


@pytest.mark.parametrize("place", [2, 3, 6])
def test_lists_of_different_lengths_raise(place):
    given = list(flat(*make_site("channel", (5, 3), shape=(4, 24))))
    given[place] = given[place][:1]
    message = r"2 weights, .* each list must have one tensor per module"
    with pytest.raises(ValueError, match=message):
        OPS.linears(*given)


def test_another_number_of_inputs_raises():
    _, *site = make_site("channel", (5, 3), shape=(4, 24))
    message = "an input of shape (4, 20) does not end in in_features=24."
    with pytest.raises(ValueError, match=re.escape(message)):
        linears(torch.randn(4, 20), *site)


def test_a_module_of_another_number_of_inputs_raises():
    site = make_site("channel", (5, 3), shape=(4, 24))
    site[1][1]["weight"] = pack(torch.zeros(3, 16, dtype=torch.uint8), 4)
    message = "a packed weight of shape (3, 2) does not hold 24 values of 4 bits"
    with pytest.raises(ValueError, match=re.escape(message)):
        linears(*site)


@pytest.mark.parametrize(("place", "value", "message"), IMPOSSIBLE)
@pytest.mark.parametrize("modules", [0, 1, 2])
def test_impossible_numbers_given_to_the_operator_raise(place, value, message, modules):
    rest = list(arguments(4, 4, "channel", 8, 64, 32, None))
    rest[place] = value
    given = [own * modules if isinstance(own, list) else own for own in lists(rest)]
    with pytest.raises(ValueError, match=re.escape(message)):
        OPS.linears(torch.randn(2, 64), *given)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tokens", [5, 600])
@pytest.mark.parametrize("group_size", [64, 41])  # the kernels, and what they leave to others
def test_autocast_changes_no_bit(granularity, tokens, group_size):
    sizes = {"shape": (tokens, 200), "group_size": group_size}
    site = make_site(granularity, (7, 3), 5, 8, **sizes)
    with torch.no_grad():
        plain = linears(*site)
        with torch.autocast("cpu", torch.bfloat16):
            same(linears(*site), plain)


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_a_wanted_gradient_raises_and_is_never_detached(wanted):
    site = make_site("channel", (5, 3), shape=(4, 24))
    (site[0] if wanted == "x" else site[1][1]["bias"]).requires_grad_()
    message = "qvlm_hf::linears has no gradient: call qvlm_hf::linear for each module"
    with pytest.raises(ValueError, match=re.escape(message)):
        linears(*site)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            check(site)


# What PyTorch asks of an operator


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(granularity, full):
    options = {"symmetric": not full, "bias": full, "hadamard": 8}
    site = make_site(granularity, (5, 3, 7), shape=(2, 3, 24), **options)
    torch.library.opcheck(OPS.linears.default, flat(*site))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(21,), (5, 21), (2, 3, 21), (0, 21)])
def test_fake_shapes(dtype, shape):
    site = make_site("dynamic_token", (5, 3), shape=shape, dtype=dtype)

    def moved(move):
        tensors = torch.utils._pytree.tree_map_only(Tensor, move, flat(*site))
        return OPS.linears(*tensors)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = moved(mode.from_tensor)
    metas = moved(lambda tensor: tensor.to("meta"))
    for y, fake, meta in zip(linears(*site), fakes, metas, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())
        assert (meta.shape, meta.dtype, meta.device.type) == (y.shape, y.dtype, "meta")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiles_into_one_graph_with_equal_bits(granularity):
    x, *rest = make_site(granularity, (5, 3), shape=(2, 3, 24), hadamard=8)

    def run(x):
        return [y + 1 for y in linears(x * 1.0, *rest)]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for other in (x, torch.randn(5, 3, 24)):
        same(compiled(other), run(other))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_bits_plain_fake_and_compiled(context):
    """Where none is recorded the calls skip the autograd layer: modes and compilers below it must
    still see them.
    """
    x, *rest = make_site("dynamic_token", (5, 3), shape=(3, 24))
    x.requires_grad_()
    expected = one_by_one(x, *rest)
    assert all(y.requires_grad for y in expected)
    with context():
        same(one_by_one(x, *rest), expected)
        same(linears(x, *rest), expected)
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: [y + 1 for y in linears(x, *rest)], fullgraph=True, backend="aot_eager"
        )
        same(compiled(x), [y + 1 for y in expected])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = linears(mode.from_tensor(x), *rest)
        assert [fake.shape for fake in fakes] == [y.shape for y in expected]
        traced = make_fx(lambda x: linears(x, *rest))(x.detach())
        assert OPS.linears.default in [node.target for node in traced.graph.nodes]
        assert not any(y.requires_grad for y in linears(x, *rest))
