"""`fast_path.linears`: what `linears` gives, or nothing where the call is not an ordinary one."""

import gc
import sys
import threading
import time
import weakref
from functools import partial

import pytest
import torch
from linear_calls import (
    DTYPES,
    GRANULARITIES,
    IMPOSSIBLE,
    NO_COMPILER,
    OPS,
    arguments,
    cpu_kernel,
    door,
    lists,
    needs_compiler,
    remove_compilers,
    run_python,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qvlm_hf.ops import fast_path
from qvlm_hf.ops import linear as doors

pytestmark = needs_compiler
REST = arguments(4, 4, "channel", 8, 64, 32, None)
ORDINARY = torch.randn(2, 64), *lists(REST)


@pytest.fixture(autouse=True)
def loaded():
    assert fast_path.load() is None
    with torch.no_grad():
        yield


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [(2, 4), (4, 4), (4, 8), (6, 6), (8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_through_python(granularity, bits, dtype):
    for shape, symmetric in (((1, 1), True), ((2, 5), False)):
        rest = arguments(*bits, granularity, 35, 200, 64, shape[1], symmetric, dtype)
        x = torch.randn(*shape, 200).to(dtype)
        (y,) = fast_path.linears(x, *lists(rest))
        assert torch.equal(y, OPS.linear(x, *rest))
        assert y.dtype == dtype


def test_floating_point_inputs_with_a_stored_scale():
    rest = list(arguments(4, 16, "none", 35, 200, 64, None))
    x, rest[3] = torch.randn(3, 200), torch.rand(200) + 0.5
    (y,) = fast_path.linears(x, *lists(rest))
    assert torch.equal(y, OPS.linear(x, *rest))
    torch.testing.assert_close(y, OPS.linear_reference(x, *rest))
    rest[3] = rest[3].double()
    assert fast_path.linears(x, *lists(rest)) is None


def test_transformed_inputs():
    rest = (*arguments(4, 4, "dynamic_token", 35, 192, 64, None)[:11], 64)
    x = torch.randn(3, 192)
    (y,) = fast_path.linears(x, *lists(rest))
    assert torch.equal(y, OPS.linear(x, *rest))
    torch.testing.assert_close(y, OPS.linear_reference(x, *rest))


def test_several_modules_of_other_heights():
    rest = [arguments(4, 8, "dynamic_token", n, 128, 128, None, seed=n) for n in (64, 8, 1)]
    x = torch.randn(3, 128)
    together = fast_path.linears(x, *lists(*rest))
    assert len(together) == 3
    assert all(torch.equal(y, OPS.linear(x, *one)) for y, one in zip(together, rest, strict=True))


def changed(place, value):
    return (*REST[:place], value, *REST[place + 1 :])


@pytest.mark.parametrize(
    "rest",
    [
        *(
            changed(0, weight)
            for packed in (REST[0],)
            for weight in (packed[:, :-1], packed.long(), packed.t().contiguous().t(), packed[0])
        ),
        *(changed(1, scale) for scale in (REST[1].float(), REST[1][:, :1], REST[1][:4])),
        *(changed(2, zero_point) for zero_point in (REST[2].int(), REST[2][:4])),
        *(changed(3, scale) for scale in (None, REST[3].double(), REST[3][:32])),
        *(changed(4, zero_point) for zero_point in (None, REST[4].long())),
        *(changed(5, bias) for bias in (REST[5].bfloat16(), REST[5][:4])),
        *(changed(*one) for one in ((6, 65), (8, 16), (9, 3), (10, "token"))),
        *(changed(place, value) for place, value, _ in IMPOSSIBLE),
        (*REST[:8], 8, 32, "none", 0),
    ],
)
def test_nothing_for_what_is_not_ordinary(rest):
    assert fast_path.linears(ORDINARY[0], *lists(rest)) is None


@pytest.mark.parametrize("shape", [(2, 32), (0, 64), (), (64, 2)])
def test_nothing_for_such_inputs(shape):
    assert (
        fast_path.linears(
            torch.ones(shape).mT if shape == (64, 2) else torch.ones(shape), *ORDINARY[1:]
        )
        is None
    )
    assert fast_path.linears(ORDINARY[0].double(), *ORDINARY[1:]) is None


def test_nothing_for_lists_that_do_not_match():
    x, weight, scale, zero_point, *rest = ORDINARY
    assert fast_path.linears(x, [], [], [], *rest) is None
    assert fast_path.linears(x, weight, scale * 2, zero_point, *rest) is None
    assert fast_path.linears(x, weight, scale, zero_point * 2, *rest) is None


def test_groups_that_overflow_or_begin_inside_a_byte_are_left_to_the_reference():
    for bits, length in ((8, 20000), (3, 20)):
        rest = arguments(bits, 8, "dynamic_token", 2, 20000, length, None)
        assert fast_path.linears(torch.randn(1, 20000), *lists(rest)) is None
        assert cpu_kernel(20000, bits, 8, length).startswith("reference (")


def test_the_doors_use_it_where_nothing_is_recorded(monkeypatch):
    calls = []
    monkeypatch.setattr(doors, "_dispatch", lambda operator, *_: calls.append(operator))
    x, (tensors, *numbers) = ORDINARY[0], door(REST)
    one, many = partial(doors.linear, x), partial(doors.linears, x)
    expected = OPS.linear(x, *REST)
    assert torch.equal(one(tensors, *numbers), expected)
    assert all(torch.equal(y, expected) for y in many([tensors] * 2, *numbers))
    rotated = (*arguments(4, 4, "dynamic_token", 35, 192, 64, None)[:11], 64)
    y = doors.linear(torch.ones(3, 192), *door(rotated))
    assert torch.equal(y, OPS.linear(torch.ones(3, 192), *rotated))
    assert calls == []
    one(tensors, *numbers, reference=True)
    doors.linear(x.double(), tensors, *numbers)
    with torch.enable_grad():
        one(tensors, *numbers)
        many([tensors], *numbers)
    names = ("linear_reference", "linear", "linear", "linears")
    assert calls == [getattr(OPS, name).default for name in names]


class Subclass(torch.Tensor):
    pass


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_nothing_for_tensors_that_are_more_than_memory():
    x, *rest = ORDINARY
    assert fast_path.linears(x, *rest) is not None
    assert fast_path.linears(nn.Parameter(x, requires_grad=False), *rest) is not None
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    imaginary = torch.complex(x, x).conj().imag
    for other in (x.as_subclass(Subclass), x.to("meta"), imaginary, x.to_sparse(), fake, 1, None):
        assert fast_path.linears(other, *rest) is None
    assert fast_path.linears(x, [rest[0][0].as_subclass(Subclass)], *rest[1:]) is None

    def mapped(one):
        assert fast_path.linears(one, *rest) is None
        return x

    torch.func.vmap(mapped)(x[None])
    with forward_ad.dual_level():
        assert fast_path.linears(forward_ad.make_dual(x, x), *rest) is None


@pytest.mark.parametrize("mode", [Counting, Watching, torch.enable_grad])
def test_nothing_where_somebody_watches(mode):
    with mode():
        assert fast_path.linears(*ORDINARY) is None
    assert fast_path.linears(*ORDINARY) is not None
    seen = []

    def traced(x):
        seen.append(fast_path.linears(x, *ORDINARY[1:]))
        return x + 1

    torch.jit.trace(traced, ORDINARY[0], check_trace=False)
    assert seen == [None]


def test_inference_tensors_are_taken():
    with torch.inference_mode():
        x = torch.randn(2, 64)
        (y,) = fast_path.linears(x, *lists(REST))
    assert y.is_inference()
    assert torch.equal(y, OPS.linear(x, *REST))


@pytest.mark.parametrize(
    ("place", "values"),
    [
        (1, [(), [1]]),
        (4, [1]),
        (7, [64.0, 2**70]),
        (8, [None]),
        (11, [b"none", "no"]),
        (12, [None]),
    ],
)
def test_nothing_for_arguments_of_other_types(place, values):
    for value in values:
        given = (*ORDINARY[:place], value, *ORDINARY[place + 1 :])
        assert fast_path.linears(*given) is None
    assert fast_path.linears(*ORDINARY[:-1]) is None


def test_the_profiler_sees_the_call():
    with torch.profiler.profile() as profile:
        fast_path.linears(*ORDINARY)
    assert "qvlm_hf::linears" in {event.name for event in profile.events()}


def test_no_memory_is_lost():
    """Results and arguments are freed: a reference too many would keep them."""
    x, *rest = torch.randn(2, 64), *lists(REST)
    held = [sys.getrefcount(one) for one in (x, rest[0], rest[0][0])]
    result = fast_path.linears(x, *rest)
    assert (sys.getrefcount(result), sys.getrefcount(result[0])) == (2, 2)
    assert fast_path.linears(x.double(), *rest) is None
    assert [sys.getrefcount(one) for one in (x, rest[0], rest[0][0])] == held


FIRST_CALL = """
import sys, torch
from qvlm_hf.ops import attention, fast_path, decode_attention, rms_norm
from linear_calls import arguments, cpu_kernel, lists

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
assert "reference" not in cpu_kernel()
with torch.no_grad():
    rest = lists(arguments(4, 4, "channel", 8, 64, 32, None))
    assert fast_path.linears(torch.ones(2, 64), *rest) is not None
    assert fast_path.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5) is not None
    assert fast_path.decode_attention(*[torch.ones(1, 2, 1, 64)] * 3, None, 0.5) is not None
print("taken")
"""


SLOW = ("cpu", "meta", "float64", "autocast")


@pytest.mark.parametrize(
    "mode", ["inference", *(pytest.param(mode, marks=pytest.mark.slow) for mode in SLOW)]
)
def test_the_mode_of_the_first_call_does_not_decide_for_all(mode):
    """In a process of its own: kernels are checked once."""
    assert run_python(FIRST_CALL, mode) == "taken\n"


def test_tensors_live_while_other_threads_empty_the_list():
    rest = arguments(4, 8, "dynamic_token", 512, 1024, 128, None)
    x = torch.randn(600, 1024)
    expected = OPS.linear(x, *rest)
    given = lists(rest)
    held = weakref.ref(given[0][0])
    del rest
    empty = lambda: (time.sleep(0.002), [one.clear() for one in given[:3]])  # noqa: E731
    thread = threading.Thread(target=empty)
    thread.start()
    found = fast_path.linears(x, *given)
    thread.join()
    gc.collect()
    assert held() is None
    # None: the list was empty before the call
    assert found is None or torch.equal(found[0], expected)


def test_without_a_compiler_calls_go_through_python(monkeypatch, tmp_path):
    x, expected = torch.ones(1, 64), OPS.linear(torch.ones(1, 64), *REST)  # by a kernel
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remove_compilers(monkeypatch)
    fast_path.load.cache_clear()
    try:
        assert fast_path.load() == NO_COMPILER
        assert torch.equal(OPS.linear(x, *REST), expected)
    finally:
        fast_path.load.cache_clear()


OTHER_TENSORS = """
import torch
torch.Tensor._cdata = property(lambda self: 1)
from qvlm_hf.ops import fast_path
print(fast_path.load())
"""


@pytest.mark.slow
def test_tensors_that_do_not_tell_where_they_lie_go_through_python():
    assert "_cdata is no longer" in run_python(OTHER_TENSORS)
