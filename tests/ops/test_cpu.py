"""CPU kernels: the reference's values at real sizes, and an honest way out where they cannot run."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import (
    DTYPES,
    GRANULARITIES,
    NO_COMPILER,
    OPS,
    agree,
    arguments,
    cpu_kernel,
    has_compiler,
    lists,
    needs_compiler,
    remove_compilers,
    run_python,
    with_threads,
)

from qvlm_hf.format.grids import QuantizedWeight, grouped_weight, quantize_weight
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.packing import pack, unpack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import attention, cpu, fast_path, native, private_folders, reference
from qvlm_hf.ops.call import CallScheme

CLASSES = ("cpu avx512-vnni", "cpu avx2-vnni", "cpu avx2", "cpu portable")

# portable: 2 seconds instead of 10
SOON_COMPILED = ("-O0", *(flag for flag in cpu._FLAGS[1:] if flag != "-march=native"))


def compare(x, rest):
    agree(OPS.linear(x, *rest), OPS.linear_reference(x, *rest))


@pytest.fixture
def fresh_kernels(monkeypatch, tmp_path):
    """An empty cache; whatever a test finds out about kernels, others find out again."""
    fast_path.load()  # kept: what a test changes shall not fail this for good
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._kernels.cache_clear()
    yield tmp_path
    cpu._kernels.cache_clear()


@pytest.fixture
def soon_compiled(monkeypatch, fresh_kernels):
    """Compiles the library as the kernels do, but fast."""
    if not has_compiler:
        pytest.skip("no compiler")
    monkeypatch.setattr(cpu, "_FLAGS", SOON_COMPILED)
    return lambda: native.load(Path, cpu._SOURCES, cpu._FLAGS, native.openmp())


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory):
    """A cache that holds the library, compiled as `soon_compiled` does, and the way into it."""
    if not has_compiler:
        pytest.skip("no compiler")
    direct = native.load(Path, fast_path._SOURCES, fast_path._FLAGS, fast_path._LINKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("filled")))
        folder = native.load(Path, cpu._SOURCES, SOON_COMPILED, native.openmp()).parent
    shutil.copy2(direct, folder)  # 20 seconds of compiling that others have done
    return folder.parent


def test_a_granularity_that_no_kernel_knows_is_refused():
    schemes = [
        CallScheme(None, None, 64, 4, 8, 32, granularity, 0) for granularity in GRANULARITIES
    ]
    assert [cpu.misfit(scheme) for scheme in schemes] == [None] * len(GRANULARITIES)
    unknown = schemes[0]._replace(granularity="new")
    assert cpu.misfit(unknown) == "no CPU kernel knows granularity 'new'"
    with pytest.raises(ValueError, match=r"granularity='new'"):
        reference._quantize_input(torch.ones(1, 64), unknown)


def test_this_machine_has_kernels():
    """Where there is a compiler the kernels must compile and pass their self-check; where there is
    none, the name says so.
    """
    assert cpu_kernel() in (CLASSES if has_compiler else (f"reference ({NO_COMPILER})",))


@given(
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(3, 8),
    granularity=st.sampled_from(GRANULARITIES),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 64, 193]),
    out_features=st.sampled_from([1, 15, 16, 17, 64, 65, 130]),
    sizes=st.sampled_from(
        [
            *((64, 64), (43, 43), (520, 128), (256, 64), (96, 32)),
            *((344, 344), (200, 8), (1030, 256), (128, 16)),
        ]
    ),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)
def test_equals_the_reference(
    weight_bits, activation_bits, granularity, tokens, out_features, sizes, symmetric, dtype, seed
):
    bits = weight_bits, activation_bits
    rest = arguments(*bits, granularity, out_features, *sizes, tokens, symmetric, dtype, seed)
    x = torch.randn(2, tokens, sizes[0], generator=torch.Generator().manual_seed(seed)) * 2
    compare(x.to(dtype), rest)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("granularity", ["channel", "token", "dynamic_token", "dynamic_group"])
@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)])
def test_a_token_that_is_not_finite_gives_nan_and_others_what_they_gave(
    value, granularity, tokens, bits
):
    rest = arguments(*bits, granularity, 70, 96, 32, tokens, False, torch.float32, 0)
    x = torch.randn(2, tokens, 96, generator=torch.Generator().manual_seed(0))
    spoilt = x.clone()
    spoilt[1, tokens // 2, 95] = value
    for operator in (OPS.linear, OPS.linear_reference):
        before, after = operator(x, *rest), operator(spoilt, *rest)
        assert after[1, tokens // 2].isnan().all()
        before[1, tokens // 2] = after[1, tokens // 2] = 0
        assert torch.equal(before, after)
    (many,) = OPS.linears(spoilt, *lists(rest))
    assert torch.equal(many.nan_to_num(), OPS.linear(spoilt, *rest).nan_to_num())


@pytest.mark.parametrize("granularity", ["channel", "dynamic_token", "dynamic_group"])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "zero_point"),
    [*((1, z) for z in (0, 1, 127, 128, 255)), *((tokens, 128) for tokens in (8, 40, 1000))],
)
def test_sums_are_exact(granularity, weight_bits, tokens, zero_point):
    """Scales of one: outputs are integers, and equal bit for bit.

    One token is multiplied as two halves of q - z, which do not hold 255: at zero point 0 another
    way must be taken. 1000 tokens are more than the kernel takes at once.
    """
    x = torch.randint(-zero_point, 256 - zero_point, (tokens, 512)).float()
    # the range of a token, and of each of its groups, is 255 steps of one
    x[:, ::128], x[:, 1::128] = -zero_point, 255 - zero_point
    integers, middle = torch.randint(0, 2**weight_bits, (96, 512)), 2 ** (weight_bits - 1)
    grid = torch.ones(512), torch.full((512,), zero_point, dtype=torch.int32)
    y = OPS.linear(
        x,
        pack(integers.to(torch.uint8), weight_bits),
        torch.ones(96, 4, dtype=torch.bfloat16),
        torch.full((96, 4), middle, dtype=torch.uint8),
        *(grid if granularity == "channel" else (None, None)),
        None,
        *(512, weight_bits, 8, 128, granularity, 0),
    )
    assert torch.equal(y.long(), x.long() @ (integers - middle).T)


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
@pytest.mark.parametrize(("k", "length"), [(512, 64), (512, 128), (512, 512), (43, 43)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_meet_floating_point_inputs_exactly(weight_bits, tokens, k, length, dtype):
    """Small integers as inputs, powers of two as scales: every product and sum is exact, so every
    way must give the same bits.
    """
    rest = arguments(weight_bits, 16, "none", 83, k, length, None)
    scale = torch.tensor([0.5, 1.0, 4.0]).bfloat16()[torch.randint(0, 3, (83, k // length))]
    x = torch.randint(-64, 65, (tokens, k)).to(dtype)
    rest = (rest[0], scale, rest[2], None, None, None, *rest[6:])
    assert torch.equal(OPS.linear(x, *rest), OPS.linear_reference(x, *rest))


def compare_transforms():
    """A weight of rows of the identity shows what the kernels make of an input."""
    for block in (2, 4, 8, 16, 32, 256, 4096):
        k = 2 * block
        rows = torch.arange(0, k, max(k // 64, 1))
        integers = torch.zeros(len(rows), k, dtype=torch.uint8)
        integers[torch.arange(len(rows)), rows] = 1
        scale, zero = torch.ones(len(rows), 1).bfloat16(), torch.zeros(len(rows), 1).byte()
        for tokens, dtype in ((1, torch.float32), (12, torch.float32), (12, torch.bfloat16)):
            x = (torch.randn(tokens, k) * 100).to(dtype)
            numbers = (k, 8, 16, k, "none", block)
            y = OPS.linear(x, pack(integers, 8), scale, zero, None, None, None, *numbers)
            assert torch.equal(y, block_hadamard(x.float(), block)[:, rows].to(dtype))


@needs_compiler
def test_the_transform_has_the_bits_of_the_reference():
    assert cpu_kernel().startswith("cpu")
    compare_transforms()


@pytest.fixture(params=["avx2", "avx2-vnni"])
def forced_class(request, monkeypatch):
    """The kernels of a class of processors below this one's; what the user's cache has stays."""
    fast_path.load()
    monkeypatch.setenv("QVLM_CPU", request.param)
    cpu._kernels.cache_clear()
    name = cpu_kernel()
    if name.startswith("reference (QVLM_CPU"):
        cpu._kernels.cache_clear()
        pytest.skip(name)
    assert name == f"cpu {request.param}"[: len(name)]  # without VNNI the second is the first
    yield name
    cpu._kernels.cache_clear()


@needs_compiler
def test_a_forced_class_equals_the_reference(forced_class):
    """Every width with inputs that meet it in another way, odd sizes, one token to many."""
    for weight_bits in range(2, 9):
        for activation_bits, granularity in (
            (8, "channel"),
            (8, "dynamic_token"),
            (8, "dynamic_group"),
            (3, "token"),
            (16, "none"),
        ):
            for tokens, out_features, sizes in (
                (1, 17, (520, 128)),
                (3, 65, (43, 43)),
                (8, 3, (96, 32)),
                (70, 130, (200, 8)),
            ):
                bits = weight_bits, activation_bits
                rest = arguments(*bits, granularity, out_features, *sizes, tokens, tokens == 3)
                x = (
                    torch.randn(tokens, sizes[0], generator=torch.Generator().manual_seed(tokens))
                    * 2
                )
                compare(x, rest)
    compare_transforms()
    torch.library.opcheck(
        OPS.linear.default, (x, *rest), test_utils=("test_schema", "test_faketensor")
    )


@needs_compiler
@pytest.mark.parametrize("activation_bits", range(3, 9))
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_a_forced_class_adds_the_largest_products_exactly(
    forced_class, weight_bits, activation_bits
):
    """Where sums of two products of bytes could saturate, or 16 bits overflow."""
    top, k = 2**activation_bits - 1, 128
    integers = torch.full((40, k), 2**weight_bits - 1, dtype=torch.uint8)
    numbers = k, weight_bits, activation_bits, k, "channel", 0
    scale, zero = torch.ones(40, 1, dtype=torch.bfloat16), torch.zeros(40, 1, dtype=torch.uint8)
    for zero_point in (0, 1, top // 2 + 1, top):
        grid = torch.ones(k), torch.full((k,), zero_point, dtype=torch.int32)
        for tokens in (1, 2, 5, 20):
            x = torch.full((tokens, k), float(top - zero_point))
            x[::2] = -zero_point
            y = OPS.linear(x, pack(integers, weight_bits), scale, zero, *grid, None, *numbers)
            assert torch.equal(y, x.sum(-1, keepdim=True).expand(-1, 40) * (2**weight_bits - 1))


def test_an_unknown_class_is_named(monkeypatch, fresh_kernels):
    monkeypatch.setenv("QVLM_CPU", "mmx")
    assert cpu_kernel() == (
        "reference (QVLM_CPU=mmx must be one of avx2, avx2-vnni, portable)"
        if has_compiler
        else f"reference ({NO_COMPILER})"
    )


def test_every_float16_comes_in_and_out():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)[:, None]
    weight, one = torch.tensor([[2]], dtype=torch.int32), torch.ones(1, 1, dtype=torch.uint8)
    for factor in (1.0, 0.25, 1.0078125):  # as it is, down to subnormal numbers, with a rounding
        scale = torch.full((1, 1), factor).bfloat16()
        y = OPS.linear(x, weight, scale, one, None, None, None, 1, 8, 16, 1, "none", 0)
        assert torch.equal(y.nan_to_num(nan=7.0), (x.float() * factor).half().nan_to_num(nan=7.0))


IMPOSSIBLE_NUMBERS = """
import torch
from linear_calls import IMPOSSIBLE, OPS, arguments, cpu_kernel, lists
from qvlm_hf.ops import cpu, fast_path
from test_cpu import SOON_COMPILED

cpu._FLAGS = SOON_COMPILED
assert cpu_kernel() == "cpu portable"
assert fast_path.load() is None
x = torch.randn(2, 64)
for place, value, message in IMPOSSIBLE:
    rest = list(arguments(4, 4, "channel", 8, 64, 32, None))
    rest[place] = value
    with torch.no_grad():
        assert fast_path.linears(x, *lists(rest)) is None
    for operator, given in ((OPS.linear, rest), (OPS.linears, lists(rest))):
        try:
            operator(x, *given)
        except ValueError as error:
            assert str(error).startswith(message)
        else:
            raise AssertionError(message)
rest = arguments(4, 16, "none", 8, 64, 32, None)
with torch.no_grad():  # more tokens are PyTorch's with floating-point inputs
    assert fast_path.linears(torch.randn(33, 64), *lists(rest)) is None
    x = torch.full((32, 64), 0.5)
    assert torch.equal(fast_path.linears(x, *lists(rest))[0], OPS.linear(x, *rest))
print("refused")
"""


def test_impossible_numbers_do_not_reach_portable_kernels(filled_cache):
    """In a process of its own: they end it there."""
    assert run_python(IMPOSSIBLE_NUMBERS, XDG_CACHE_HOME=str(filled_cache)) == "refused\n"


BEHIND = """
import ctypes, mmap, torch
from linear_calls import OPS, arguments

def at_the_end(tensor):  # of a page behind which nothing may be read
    size = tensor.numel() * tensor.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    copy.copy_(tensor)
    return copy

for granularity, activation_bits in (
    ("none", 16), ("dynamic_token", 8), ("channel", 4), ("dynamic_group", 4)
):
    for weight_bits in range(2, 9):
        for sizes in ((1, 32, 32), (3, 256, 128), (70, 136, 64)):
            rest = arguments(weight_bits, activation_bits, granularity, *sizes, 1)
            packed = (*map(at_the_end, rest[:3]), *rest[3:])
            for tokens in (1, 2, 4, 8, 30):
                x = at_the_end(torch.randn(tokens, sizes[1]))
                y, expected = OPS.linear(x, *packed), OPS.linear_reference(x, *rest)
                assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
print("kept inside")
"""


def test_nothing_is_read_behind_a_tensor():
    """In a process of its own: reading there ends it."""
    assert run_python(BEHIND) == "kept inside\n"


@pytest.mark.parametrize("tokens", [1, 30])
def test_threads_do_not_change_the_result(tokens):
    rest = arguments(4, 8, "dynamic_token", 300, 512, 128, tokens)
    x = torch.randn(tokens, 512)
    first, *others = with_threads(lambda: OPS.linear(x, *rest))
    assert all(torch.equal(first, other) for other in others)


def test_what_does_not_fit_is_named_and_left_to_the_reference():
    reason = "groups of 13 x 5 bits do not start at a byte"
    assert cpu_kernel(26, 5, 4, 13) == f"reference ({reason})"
    reason = f"a sum over {2**16} inputs can leave int32"
    assert cpu_kernel(2**16, 8, 8, 2**16) == f"reference ({reason})"
    compare(torch.randn(3, 26), arguments(5, 4, "channel", 7, 26, 13, 3))


# place in `arguments`, the change, whether the reference computes it all the same
CHANGES = {
    "weight of another dtype": (0, lambda weight: weight.float(), False),
    "scale of another dtype": (1, lambda scale: scale.float(), True),
    "zero point of another dtype": (2, lambda zero_point: zero_point.int(), True),
    "grid of another dtype": (3, lambda scale: scale.double(), True),
    "short scale": (1, lambda scale: scale[:3], False),
    "short zero point": (2, lambda zero_point: zero_point[:3], False),
    "short grid": (3, lambda scale: scale[:5], False),
    "short bias": (5, lambda _: torch.zeros(3), False),
}


@pytest.mark.parametrize(("place", "change", "computed"), CHANGES.values(), ids=list(CHANGES))
def test_no_kernel_reads_tensors_of_another_form(place, change, computed):
    x, rest = torch.randn(2, 64), list(arguments(4, 8, "channel", 8, 64, 32, 1))
    rest[place] = change(rest[place])
    if computed:
        assert torch.equal(OPS.linear(x, *rest), OPS.linear_reference(x, *rest))
    else:
        with pytest.raises((ValueError, RuntimeError)):
            OPS.linear(x, *rest)


def test_without_a_compiler_the_reference_computes_and_says_so(monkeypatch, fresh_kernels, caplog):
    remove_compilers(monkeypatch)
    assert cpu_kernel() == f"reference ({NO_COMPILER})"
    x, rest = torch.randn(3, 64), arguments(4, 4, "channel", 8, 64, 64, 3)
    assert torch.equal(OPS.linear(x, *rest), OPS.linear_reference(x, *rest))
    (text,) = [one.getMessage() for one in caplog.records if one.name == cpu.__name__]
    assert "plain PyTorch, correct but 20 to 130 times slower per token" in text
    assert text.endswith(f": {NO_COMPILER}")


def script(path, *lines):
    """A compiler: a shell script that has no version."""
    path.write_text("\n".join(("#!/bin/sh", 'if [ "$1" = --version ]; then exit 0; fi', *lines)))
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_fails_is_reported_in_its_own_words(monkeypatch, fresh_kernels):
    lines = 'echo "x.cpp:3: error: no such instruction" >&2', "exit 1"
    monkeypatch.setenv("CXX", script(fresh_kernels / "cxx", *lines))
    assert cpu_kernel() == "reference (cxx failed: x.cpp:3: error: no such instruction)"
    left = (fresh_kernels / "qvlm_hf").iterdir()
    assert not [path for path in left if path.suffix != ".lock"]


@needs_compiler
def test_without_a_place_to_write_the_reference_computes_and_says_so(
    monkeypatch, fresh_kernels, caplog
):
    file = fresh_kernels / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setenv("TMPDIR", str(file))
    monkeypatch.setattr(private_folders, "_TEMPORARY", ())
    name = cpu_kernel()
    error = f"[Errno {errno.EEXIST}] File exists: '{file}'"
    assert name.startswith(f"reference ({file}/qvlm_hf: {error}")
    assert "name a directory of yours in XDG_CACHE_HOME" in name
    cpu_kernel(64, 4, 8)
    (record,) = caplog.records  # once
    assert record.getMessage().endswith(name.removeprefix("reference (").removesuffix(")"))


def test_kernels_are_kept_elsewhere_where_the_cache_cannot_be_written(
    monkeypatch, soon_compiled, tmp_path, caplog
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert cpu_kernel() == "cpu portable"
    record = caplog.records[0]
    reason = f"because of {file}/qvlm_hf: [Errno {errno.EEXIST}] File exists"
    assert reason in record.getMessage()


def test_a_compiler_that_hangs_is_no_disaster(monkeypatch, fresh_kernels):
    monkeypatch.setenv("CXX", script(fresh_kernels / "slow", "exec sleep 5"))
    monkeypatch.setattr(native, "_SECONDS", 0.2)
    assert "timed out" in cpu_kernel()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ('g++ "', "No closing quotation"),
        ("/nope/g++", "CXX=/nope/g++ is not there"),
        ("true", f"{shutil.which('true')} reported success and wrote nothing"),
    ],
)
def test_cxx_is_taken_at_its_word(monkeypatch, fresh_kernels, asked, reason):
    monkeypatch.setenv("CXX", asked)
    assert cpu_kernel() == f"reference ({reason})"


def test_cxx_may_have_flags(monkeypatch):
    if compiler := shutil.which("g++"):
        monkeypatch.setenv("CXX", f"{compiler} -DASKED=1")
        assert native.compiler() == [compiler, "-DASKED=1"]


NOT_OF_THIS_MACHINE = b"not a library"
DAMAGES = {
    "empty": lambda code: b"",
    "cut": lambda code: code[: len(code) // 2],
    "one byte": lambda code: code[:999] + bytes([code[999] ^ 1]) + code[1000:],
    "whole, but not for this machine": lambda code: (
        NOT_OF_THIS_MACHINE + hashlib.sha256(NOT_OF_THIS_MACHINE).digest()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_library_is_compiled_again(filled_cache, soon_compiled, tmp_path, caplog, damage):
    """A library that lost its end loads, and kills the process at the first call: it must not be
    loaded.
    """
    shutil.copytree(filled_cache, tmp_path, dirs_exist_ok=True)
    library = soon_compiled()
    whole = library.read_bytes()
    library.write_bytes(damage(whole))
    assert cpu_kernel().startswith("cpu ")
    assert len(library.read_bytes()) == len(whole)
    assert not [record for record in caplog.records if "plain PyTorch" in record.getMessage()]


@needs_compiler
def test_a_wrong_kernel_is_not_used(monkeypatch):
    cpu._kernels.cache_clear()
    wrong = lambda x, weights, _: [torch.ones(*x.shape[:-1], len(one.weight)) for one in weights]  # noqa: E731
    monkeypatch.setattr(cpu.reference, "linears", wrong)
    try:
        reason = (
            "the compiled kernel is wrong for W4A4 channel, 1 tokens, 300 inputs in groups of 128"
        )
        assert cpu_kernel() == f"reference ({reason})"
    finally:
        cpu._kernels.cache_clear()


def test_compiled_once_per_source_and_machine(monkeypatch, soon_compiled, tmp_path):
    first = soon_compiled()
    assert first.parent == tmp_path / "qvlm_hf"
    assert set(first.parent.iterdir()) == {first, first.with_suffix(".lock")}
    stamp = os.stat(first).st_mtime_ns
    assert soon_compiled() == first
    assert os.stat(first).st_mtime_ns == stamp
    monkeypatch.setattr(cpu, "_FLAGS", (*cpu._FLAGS, "-DX=1"))
    assert soon_compiled() != first


@needs_compiler
def test_the_portable_variant_computes_the_same(monkeypatch, fresh_kernels):
    """What a CPU without AVX-512 runs, compiled here without it."""
    flags = tuple(flag for flag in cpu._FLAGS if flag != "-march=native")
    monkeypatch.setattr(cpu, "_FLAGS", flags)
    with torch.autocast("cpu", torch.bfloat16):  # the self-check does not see it
        assert cpu_kernel() == "cpu portable"
    for granularity in GRANULARITIES:
        for bits in ((4, 4), (3, 8), (6, 6), (8, 8)):
            for tokens, dtype in ((1, torch.float32), (12, torch.float16), (70, torch.bfloat16)):
                rest = arguments(*bits, granularity, 35, 200, 64, tokens, False, dtype)
                x = torch.randn(tokens, 200).to(dtype)
                compare(x, rest)
                expected = OPS.linear(x, *rest)
                assert all(torch.equal(y, expected) for y in OPS.linears(x, *lists(rest, rest)))
                with torch.autocast("cpu", torch.bfloat16):
                    assert torch.equal(OPS.linear(x, *rest), expected)


@needs_compiler
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize(("in_features", "group_size"), [(300, 128), (70, 8), (43, -1), (64, 32)])
def test_rounding_gives_the_bytes_of_quantize_weight_or_a_lower_error(
    weight_bits, symmetric, in_features, group_size
):
    """Where two factors on a range are equally good but for rounding, either may win."""
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=8,
        group_size=group_size,
        symmetric=symmetric,
        granularity="dynamic_token",
    )
    for dtype in DTYPES:
        weight = (torch.randn(67, in_features) * torch.rand(67, 1)).to(dtype)
        weight[5], weight[6] = 0, weight[6] * 1e-3
        rounded, expected = cpu.round_weight(weight, scheme), quantize_weight(weight, scheme)
        assert (rounded.weight_zero_point is None) == symmetric
        zero = expected.zero_point if symmetric else rounded.weight_zero_point
        integers = unpack(rounded.weight, weight_bits, in_features)
        found = QuantizedWeight(integers, rounded.weight_scale, zero, expected.group_length)
        errors = [
            grouped_weight((one.dequantize() - weight).double().abs() ** 2.4, scheme).sum(-1)
            for one in (found, expected)
        ]
        same = found.scale == expected.scale
        assert same.float().mean() > 0.99
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
        rows = same.all(1) & (zero == expected.zero_point).all(1)
        assert torch.equal(integers[rows], expected.values[rows])


@needs_compiler
def test_no_weight_is_rounded_that_the_kernels_do_not_know():
    scheme = QuantScheme(weight_bits=4, activation_bits=8, granularity="dynamic_token")
    bad = torch.randn(3, 8)
    bad[1, 2] = float("nan")
    for weight in (bad, torch.randn(3, 8).double(), torch.randn(3, 8, device="meta")):
        assert cpu.round_weight(weight, scheme) is None


@pytest.mark.parametrize("module", [cpu, fast_path, attention])
def test_the_source_travels_with_the_package(module):
    folder = Path(module.__file__).with_name("csrc")
    assert all(source.is_file() and source.parent == folder for source in module._SOURCES)
