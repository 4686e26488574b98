"""`linears_cpu`: what `linears` gives, or nothing where the call is not an ordinary one."""

import shutil

import pytest
import torch
from linear_calls import IMPOSSIBLE, arguments

from qvlm_hf.core.scheme import QuantScheme
from qvlm_hf.ops import cpu, cpu_operator, reference, schema
from qvlm_hf.ops.schema import linear, linears

OPERATOR = torch.ops.qvlm_hf.linears_cpu.default


@pytest.fixture(autouse=True)
def loaded():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    assert cpu_operator.load() is None


def lists(rest):
    weight, scale, zero_point, input_scale, input_zero_point, bias, *sizes = rest
    zero_points, biases = ([] if tensor is None else [tensor] for tensor in (zero_point, bias))
    return [weight], [scale], zero_points, input_scale, input_zero_point, biases, *sizes


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 4), (4, 4), (4, 8), (6, 6), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_as_through_python(granularity, weight_bits, activation_bits, dtype):
    for shape, symmetric in (((1, 1), True), ((2, 5), False)):
        rest = arguments(weight_bits, activation_bits, granularity, 35, 200, 64, shape[1], symmetric, dtype)
        x = torch.randn(*shape, 200).to(dtype)
        (y,) = OPERATOR(x, *lists(rest))
        assert torch.equal(y, cpu.linear(x, *rest))
        assert y.dtype == dtype


def test_floating_point_inputs_with_a_stored_scale():
    rest = list(arguments(4, 16, "none", 35, 200, 64, None, False, torch.float32))
    x, rest[3] = torch.randn(3, 200), torch.rand(200) + 0.5
    (y,) = OPERATOR(x, *lists(rest))
    assert torch.equal(y, cpu.linear(x, *rest))
    torch.testing.assert_close(y, reference.linear(x, *rest))
    rest[3] = rest[3].double()
    assert OPERATOR(x, *lists(rest)) == []


def test_several_modules_of_other_heights():
    rest = [arguments(4, 8, "dynamic_token", rows, 128, 128, None, False, torch.float32, seed=rows) for rows in (64, 8, 1)]
    x = torch.randn(3, 128)
    together = OPERATOR(x, *([one[i] for one in rest] for i in (0, 1, 2)), None, None, [one[5] for one in rest], *rest[0][6:])
    assert len(together) == 3
    for y, one in zip(together, rest, strict=True):
        assert torch.equal(y, cpu.linear(x, *one))


REST = arguments(4, 4, "channel", 8, 64, 32, None, False, torch.float32)


def changed(place, value):
    return (*REST[:place], value, *REST[place + 1 :])


@pytest.mark.parametrize(
    "rest",
    [
        changed(0, REST[0][:, :-1]), changed(0, REST[0].long()), changed(0, REST[0].t().contiguous().t()),
        changed(0, REST[0][0]),
        changed(1, REST[1].float()), changed(1, REST[1][:, :1]), changed(1, REST[1][:4]), changed(2, REST[2].int()),
        changed(2, REST[2][:4]),
        changed(3, None), changed(3, REST[3].double()), changed(3, REST[3][:32]), changed(4, REST[4].long()), changed(4, None),
        changed(5, REST[5].bfloat16()), changed(5, REST[5][:4]), changed(6, 65),
        changed(8, 16), changed(9, 3), changed(10, "token"), changed(11, 32),
        *(changed(place, value) for place, value, _ in IMPOSSIBLE), (*REST[:8], 8, 32, "none", 0),
    ],
)  # fmt: skip
def test_nothing_for_what_is_not_ordinary(rest):
    assert OPERATOR(torch.randn(2, 64), *lists(rest)) == []


@pytest.mark.parametrize("x", [torch.ones(2, 64).double(), torch.ones(2, 32), torch.ones(64, 2).t(), torch.ones(0, 64), torch.tensor(1.0)])
def test_nothing_for_such_inputs(x):
    assert OPERATOR(x, *lists(REST)) == []


def test_nothing_for_lists_that_do_not_match():
    x, (weight, scale, zero_point, *rest) = torch.randn(2, 64), lists(REST)
    assert OPERATOR(x, [], [], [], *rest) == []
    assert OPERATOR(x, weight, scale * 2, zero_point, *rest) == []
    assert OPERATOR(x, weight, scale, zero_point * 2, *rest) == []


def test_groups_that_overflow_or_begin_inside_a_byte_are_left_to_the_reference():
    for bits, length in ((8, 20000), (3, 20)):
        rest = arguments(bits, 8, "dynamic_token", 2, 20000, length, None, False, torch.float32)
        assert OPERATOR(torch.randn(1, 20000), *lists(rest)) == []
        assert cpu.kernel_name(20000, bits, 8, length).startswith("reference (")


def test_the_doors_use_it_where_nothing_is_recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(schema, "_called", lambda operator, *_: calls.append(operator))
    scheme = QuantScheme(weight_bits=4, activation_bits=4, granularity="channel", group_size=32)
    x, (weight, scale, zero_point, input_scale, input_zero_point, bias) = torch.randn(2, 64), REST[:6]
    single = (weight, scale, zero_point, input_scale, input_zero_point, bias, 64, scheme)
    several = ([weight], [scale], [zero_point], input_scale, input_zero_point, [bias], 64, scheme)
    with torch.no_grad():
        assert torch.equal(linear(x, *single), cpu.linear(x, *REST))
        assert torch.equal(linears(x, *several)[0], cpu.linear(x, *REST))
        assert calls == []
        linear(x, *single, reference=True)
        linear(x.double(), *single)
    linear(x, *single)
    linears(x, *several)
    ops = torch.ops.qvlm_hf
    assert calls == [ops.linear_reference.default, ops.linear.default, ops.linear.default, ops.linears.default]


def test_the_operator_itself():
    torch.library.opcheck(OPERATOR, (torch.randn(2, 64).double(), *lists(REST)))


def test_without_a_compiler_calls_go_through_python(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    cpu_operator.load.cache_clear()
    try:
        assert cpu_operator.load() == "no C++ compiler found: install g++ or set CXX"
        assert torch.equal(torch.ops.qvlm_hf.linear(torch.ones(1, 64), *REST), cpu.linear(torch.ones(1, 64), *REST))
    finally:
        cpu_operator.load.cache_clear()
