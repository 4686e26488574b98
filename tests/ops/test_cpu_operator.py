"""`cpu_direct.linears`: what `linears` gives, or nothing where the call is not an ordinary one."""

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from linear_calls import IMPOSSIBLE, arguments
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import cpu, cpu_direct, cpu_operator, reference, schema
from qvlm_hf.ops.schema import linear, linears


@pytest.fixture(autouse=True)
def loaded():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    assert cpu_operator.load() is None
    with torch.no_grad():
        yield


def lists(rest):
    weight, scale, zero_point, input_scale, input_zero_point, bias, *sizes = rest
    zero_points, biases = ([] if tensor is None else [tensor] for tensor in (zero_point, bias))
    return [weight], [scale], zero_points, input_scale, input_zero_point, biases, *sizes


@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "none"])
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), [(2, 4), (4, 4), (4, 8), (6, 6), (8, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_as_through_python(granularity, weight_bits, activation_bits, dtype):
    for shape, symmetric in (((1, 1), True), ((2, 5), False)):
        rest = arguments(
            weight_bits, activation_bits, granularity, 35, 200, 64, shape[1], symmetric, dtype
        )
        x = torch.randn(*shape, 200).to(dtype)
        (y,) = cpu_direct.linears(x, *lists(rest))
        assert torch.equal(y, cpu.linear(x, *rest))
        assert y.dtype == dtype


def test_floating_point_inputs_with_a_stored_scale():
    rest = list(arguments(4, 16, "none", 35, 200, 64, None, False, torch.float32))
    x, rest[3] = torch.randn(3, 200), torch.rand(200) + 0.5
    (y,) = cpu_direct.linears(x, *lists(rest))
    assert torch.equal(y, cpu.linear(x, *rest))
    torch.testing.assert_close(y, reference.linear(x, *rest))
    rest[3] = rest[3].double()
    assert cpu_direct.linears(x, *lists(rest)) is None


def test_several_modules_of_other_heights():
    rest = [
        arguments(4, 8, "dynamic_token", rows, 128, 128, None, False, torch.float32, seed=rows)
        for rows in (64, 8, 1)
    ]
    x = torch.randn(3, 128)
    together = cpu_direct.linears(
        x,
        *([one[i] for one in rest] for i in (0, 1, 2)),
        None,
        None,
        [one[5] for one in rest],
        *rest[0][6:],
    )
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
    assert cpu_direct.linears(torch.randn(2, 64), *lists(rest)) is None


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 64).double(),
        torch.ones(2, 32),
        torch.ones(64, 2).t(),
        torch.ones(0, 64),
        torch.tensor(1.0),
    ],
)
def test_nothing_for_such_inputs(x):
    assert cpu_direct.linears(x, *lists(REST)) is None


def test_nothing_for_lists_that_do_not_match():
    x, (weight, scale, zero_point, *rest) = torch.randn(2, 64), lists(REST)
    assert cpu_direct.linears(x, [], [], [], *rest) is None
    assert cpu_direct.linears(x, weight, scale * 2, zero_point, *rest) is None
    assert cpu_direct.linears(x, weight, scale, zero_point * 2, *rest) is None


def test_groups_that_overflow_or_begin_inside_a_byte_are_left_to_the_reference():
    for bits, length in ((8, 20000), (3, 20)):
        rest = arguments(bits, 8, "dynamic_token", 2, 20000, length, None, False, torch.float32)
        assert cpu_direct.linears(torch.randn(1, 20000), *lists(rest)) is None
        assert cpu.kernel_name(20000, bits, 8, length).startswith("reference (")


def test_the_doors_use_it_where_nothing_is_recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(schema, "_called", lambda operator, *_: calls.append(operator))
    scheme = QuantScheme(weight_bits=4, activation_bits=4, granularity="channel", group_size=32)
    x, (weight, scale, zero_point, input_scale, input_zero_point, bias) = (
        torch.randn(2, 64),
        REST[:6],
    )
    single = (weight, scale, zero_point, input_scale, input_zero_point, bias, 64, scheme)
    several = ([weight], [scale], [zero_point], input_scale, input_zero_point, [bias], 64, scheme)
    assert torch.equal(linear(x, *single), cpu.linear(x, *REST))
    assert torch.equal(linears(x, *several)[0], cpu.linear(x, *REST))
    assert calls == []
    linear(x, *single, reference=True)
    linear(x.double(), *single)
    with torch.enable_grad():
        linear(x, *single)
        linears(x, *several)
    ops = torch.ops.qvlm_hf
    assert calls == [
        ops.linear_reference.default,
        ops.linear.default,
        ops.linear.default,
        ops.linears.default,
    ]


def ordinary():
    return torch.randn(2, 64), *lists(REST)


class Subclass(torch.Tensor):
    pass


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_for_tensors_that_are_more_than_memory():
    x, *rest = ordinary()
    assert cpu_direct.linears(x, *rest) is not None
    assert cpu_direct.linears(nn.Parameter(x, requires_grad=False), *rest) is not None
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    for other in (
        x.as_subclass(Subclass),
        x.to("meta"),
        torch.complex(x, x).conj().imag,
        x.to_sparse(),
        fake,
        1,
        None,
    ):
        assert cpu_direct.linears(other, *rest) is None
    assert cpu_direct.linears(x, [rest[0][0].as_subclass(Subclass)], *rest[1:]) is None
    torch.func.vmap(
        lambda one: x + (cpu_direct.linears(one, *rest) is None or pytest.fail("vmap is not seen"))
    )(x[None])
    with forward_ad.dual_level():
        assert cpu_direct.linears(forward_ad.make_dual(x, x), *rest) is None


@pytest.mark.parametrize("mode", [Counting, Watching, torch.enable_grad])
def test_nothing_where_somebody_watches(mode):
    arguments = ordinary()
    with mode():
        assert cpu_direct.linears(*arguments) is None
    assert cpu_direct.linears(*arguments) is not None
    seen = []
    torch.jit.trace(
        lambda x: seen.append(cpu_direct.linears(x, *arguments[1:])) or x + 1,
        arguments[0],
        check_trace=False,
    )
    assert seen == [None]


def test_inference_tensors_are_taken():
    with torch.inference_mode():
        x = torch.randn(2, 64)
        (y,) = cpu_direct.linears(x, *lists(REST))
    assert y.is_inference()
    assert torch.equal(y, cpu.linear(x, *REST))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (1, ()),
        (1, [1]),
        (4, 1),
        (7, 64.0),
        (7, 2**70),
        (8, None),
        (11, b"none"),
        (11, "no"),
        (12, None),
    ],
)
def test_nothing_for_arguments_of_other_types(place, value):
    given = list(ordinary())
    given[place] = value
    assert cpu_direct.linears(*given) is None
    assert cpu_direct.linears(*given[:-1]) is None


def test_the_profiler_sees_the_call():
    with torch.profiler.profile() as profile:
        cpu_direct.linears(*ordinary())
    assert "qvlm_hf::linears" in {event.name for event in profile.events()}


def test_no_memory_is_lost():
    """Results and arguments are freed: a reference too many would keep them."""
    x, *rest = ordinary()
    held = [sys.getrefcount(one) for one in (x, rest[0], rest[0][0])]
    result = cpu_direct.linears(x, *rest)
    assert (sys.getrefcount(result), sys.getrefcount(result[0])) == (2, 2)
    assert cpu_direct.linears(x.double(), *rest) is None
    assert [sys.getrefcount(one) for one in (x, rest[0], rest[0][0])] == held


FIRST_CALL = """
import sys, torch
from qvlm_hf.ops import attention, cpu, cpu_direct, decode_attention, rms_norm
from linear_calls import arguments

def first():
    rms_norm(torch.ones(2, 8, device="cpu"), torch.ones(8, device="cpu"), 1e-5)
    decode_attention(*[torch.ones(1, 2, 1, 64, device="cpu")] * 3)

mode = sys.argv[1]
if mode == "float64":
    torch.set_default_dtype(torch.float64)
modes = {"inference": torch.inference_mode(), "cpu": torch.device("cpu"), "meta": torch.device("meta")}
with torch.no_grad(), modes.get(mode, torch.autocast("cpu", torch.bfloat16)):
    first()
torch.set_default_dtype(torch.float32)
assert attention.load() is None, attention.load()
assert "reference" not in cpu.kernel_name(64, 4, 4, 32)
weight, scale, zero_point, input_scale, input_zero_point, bias, *sizes = arguments(4, 4, "channel", 8, 64, 32, None, False, torch.float32)
with torch.no_grad():
    assert cpu_direct.linears(torch.ones(2, 64), [weight], [scale], [zero_point], input_scale, input_zero_point, [bias], *sizes) is not None
    assert cpu_direct.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5) is not None
    assert cpu_direct.decode_attention(*[torch.ones(1, 2, 1, 64)] * 3, None, 0.5) is not None
print("taken")
"""


@pytest.mark.parametrize("mode", ["inference", "cpu", "meta", "float64", "autocast"])
def test_the_mode_of_the_first_call_does_not_decide_for_all(mode):
    """In a process of its own: kernels are checked once."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL, mode],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "taken\n"), done.stderr


def test_tensors_live_while_other_threads_empty_the_list():
    rest = arguments(4, 8, "dynamic_token", 512, 1024, 128, None, False, torch.float32)
    x = torch.randn(600, 1024)
    expected = cpu.linear(x, *rest)
    given = lists(rest)
    held = weakref.ref(given[0][0])
    del rest
    thread = threading.Thread(
        target=lambda: (time.sleep(0.002), [one.clear() for one in given[:3]])
    )
    thread.start()
    found = cpu_direct.linears(x, *given)
    thread.join()
    gc.collect()
    assert held() is None
    assert found is None or torch.equal(
        found[0], expected
    )  # None: the list was empty before the call


def test_without_a_compiler_calls_go_through_python(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    cpu_operator.load.cache_clear()
    try:
        assert cpu_operator.load() == "no C++ compiler found: install g++ or set CXX"
        assert torch.equal(
            torch.ops.qvlm_hf.linear(torch.ones(1, 64), *REST), cpu.linear(torch.ones(1, 64), *REST)
        )
    finally:
        cpu_operator.load.cache_clear()
