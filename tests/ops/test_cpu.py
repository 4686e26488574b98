"""CPU kernels: the reference's values at real sizes, and an honest way out where they cannot run."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import arguments

from qvlm_hf.format.packing import pack
from qvlm_hf.ops import cpu, cpu_operator, native, reference

SOON_COMPILED = (
    "-O0",
    *(flag for flag in cpu._FLAGS[1:] if flag != "-march=native"),
)  # portable: 2 seconds instead of 10
TIGHT = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def compare(x, rest):
    expected, y = reference.linear(x, *rest).float(), cpu.linear(x, *rest).float()
    assert y.shape == expected.shape
    if y.numel():
        assert (y - expected).abs().max() <= TIGHT[x.dtype] * expected.abs().max()


@pytest.fixture
def fresh_kernels():
    """Whatever a test finds out about kernels, others find out again."""
    cpu._kernels.cache_clear()
    yield
    cpu._kernels.cache_clear()


def test_this_machine_has_kernels():
    """Where there is a compiler the kernels must compile and pass their self-check; where there is none, the name says so."""
    name = cpu.kernel_name(128, 4, 4, 64)
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert name in ("cpu avx512-vnni", "cpu portable")
    else:
        assert name == "reference (no C++ compiler found: install g++ or set CXX)"


@given(
    weight_bits=st.integers(2, 8),
    activation_bits=st.integers(3, 8),
    granularity=st.sampled_from(["channel", "token", "dynamic_token", "none"]),
    tokens=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 64, 193]),
    out_features=st.sampled_from([1, 15, 16, 17, 64, 65, 130]),
    sizes=st.sampled_from(
        [
            (64, 64),
            (43, 43),
            (520, 128),
            (256, 64),
            (96, 32),
            (344, 344),
            (200, 8),
            (1030, 256),
            (128, 16),
        ]
    ),
    symmetric=st.booleans(),
    dtype=st.sampled_from(list(TIGHT)),
    seed=st.integers(0, 3),
)
def test_equals_the_reference(
    weight_bits, activation_bits, granularity, tokens, out_features, sizes, symmetric, dtype, seed
):
    in_features, length = sizes
    rest = arguments(
        weight_bits,
        activation_bits,
        granularity,
        out_features,
        in_features,
        length,
        tokens,
        symmetric,
        dtype,
        seed,
    )
    compare(
        (torch.randn(2, tokens, in_features, generator=torch.Generator().manual_seed(seed)) * 2).to(
            dtype
        ),
        rest,
    )


@pytest.mark.parametrize("granularity", ["channel", "dynamic_token"])
@pytest.mark.parametrize("tokens", [1, 8, 40, 1000])
def test_sums_are_exact(granularity, tokens):
    """Scales of one: outputs are integers, and equal bit for bit.

    1000 tokens are more than the kernel takes at once.
    """
    x = torch.randint(-128, 128, (tokens, 512)).float()
    x[:, 0], x[:, 1] = -128, 127  # the range of a token is 255 steps of one
    integers = torch.randint(0, 256, (96, 512), dtype=torch.uint8)
    statics = granularity == "channel"
    rest = (
        pack(integers, 8), torch.ones(96, 4, dtype=torch.bfloat16), torch.full((96, 4), 128, dtype=torch.uint8),
        torch.ones(512) if statics else None, torch.full((512,), 128, dtype=torch.int32) if statics else None,
        None, 512, 8, 8, 128, granularity, 0,
    )  # fmt: skip
    exact = x.long() @ (integers.long() - 128).T
    assert torch.equal(cpu.linear(x, *rest).long(), exact)


@pytest.mark.parametrize("granularity", ["channel", "dynamic_token"])
@pytest.mark.parametrize("zero_point", [0, 1, 127, 128, 255])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_one_token_of_8_bits_is_exact_at_every_zero_point(granularity, zero_point, weight_bits):
    """One token is multiplied as two halves of q - z, which do not hold 255: at zero point 0 another way must be taken."""
    x = torch.randint(-zero_point, 256 - zero_point, (1, 512)).float()
    x[:, 0], x[:, 1] = -zero_point, 255 - zero_point
    integers = torch.randint(0, 2**weight_bits, (96, 512), dtype=torch.uint8)
    statics = (
        (torch.ones(512), torch.full((512,), zero_point, dtype=torch.int32))
        if granularity == "channel"
        else (None, None)
    )
    middle = torch.full((96, 4), 2 ** (weight_bits - 1), dtype=torch.uint8)
    sizes = (512, weight_bits, 8, 128, granularity, 0)
    y = cpu.linear(
        x,
        pack(integers, weight_bits),
        torch.ones(96, 4, dtype=torch.bfloat16),
        middle,
        *statics,
        None,
        *sizes,
    )
    assert torch.equal(y.long(), x.long() @ (integers.long() - 2 ** (weight_bits - 1)).T)


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
@pytest.mark.parametrize("length", [64, 128, 512])
def test_weights_meet_floating_point_inputs_exactly(weight_bits, tokens, length):
    """Small integers as inputs, powers of two as scales: every product and sum is exact, so every way must give the same bits."""
    rest = arguments(weight_bits, 16, "none", 83, 512, length, None, False, torch.float32)
    scale = torch.tensor([0.5, 1.0, 4.0]).bfloat16()[torch.randint(0, 3, (83, 512 // length))]
    x, rest = (
        torch.randint(-64, 65, (tokens, 512)).float(),
        (rest[0], scale, rest[2], None, None, None, *rest[6:]),
    )
    assert torch.equal(cpu.linear(x, *rest), reference.linear(x, *rest))


def test_every_float16_comes_in_and_out():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)[:, None]
    sizes = (1, 8, 16, 1, "none", 0)
    for factor in (1.0, 0.25, 1.0078125):  # as it is, down to subnormal numbers, with a rounding
        scale = torch.full((1, 1), factor).bfloat16()
        weight, zero_point = (
            torch.tensor([[2]], dtype=torch.int32),
            torch.ones(1, 1, dtype=torch.uint8),
        )
        y = cpu.linear(x, weight, scale, zero_point, None, None, None, *sizes)
        assert torch.equal(y.nan_to_num(nan=7.0), (x.float() * factor).half().nan_to_num(nan=7.0))


IMPOSSIBLE_NUMBERS = """
import os, torch
from linear_calls import IMPOSSIBLE, arguments
from qvlm_hf.ops import cpu, cpu_direct, cpu_operator
from test_cpu import SOON_COMPILED

cpu._FLAGS = SOON_COMPILED
assert cpu.kernel_name(64, 4, 4, 64) == "cpu portable"
assert cpu_operator.load() is None
x, ops = torch.randn(2, 64), torch.ops.qvlm_hf
for place, value, message in IMPOSSIBLE:
    rest = list(arguments(4, 4, "channel", 8, 64, 32, None, False, torch.float32))
    rest[place] = value
    lists = [[tensor] if i in (0, 1, 2, 5) else tensor for i, tensor in enumerate(rest)]
    with torch.no_grad():
        assert cpu_direct.linears(x, *lists) is None
    for operator, given in ((ops.linear, rest), (ops.linears, lists)):
        try:
            operator(x, *given)
        except ValueError as error:
            assert str(error).startswith(message)
        else:
            raise AssertionError(message)
rest = arguments(4, 16, "none", 8, 64, 32, None, False, torch.float32)
lists = [[tensor] if i in (0, 1, 2, 5) else tensor for i, tensor in enumerate(rest)]
with torch.no_grad():  # more tokens are PyTorch's with floating-point inputs
    assert cpu_direct.linears(torch.randn(33, 64), *lists) is None
    assert torch.equal(cpu_direct.linears(torch.randn(32, 64).fill_(0.5), *lists)[0], cpu.linear(torch.full((32, 64), 0.5), *rest))
print("refused")
"""


def test_impossible_numbers_do_not_reach_portable_kernels(tmp_path):
    """In a process of its own: they end it there."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPOSSIBLE_NUMBERS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


BEHIND = """
import ctypes, mmap, sys, torch
from qvlm_hf.ops import cpu, reference
from linear_calls import arguments

def at_the_end(tensor):  # of a page behind which nothing may be read
    size = tensor.numel() * tensor.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + pages), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    copy.copy_(tensor)
    return copy

for granularity, activation_bits in (("none", 16), ("dynamic_token", 8), ("channel", 4)):
    for weight_bits in range(2, 9):
        for rows, in_features, length in ((1, 32, 32), (3, 256, 128), (70, 136, 64)):
            rest = arguments(weight_bits, activation_bits, granularity, rows, in_features, length, 1, False, torch.float32)
            packed = tuple(at_the_end(t) if t is not None else None for t in rest[:3]) + rest[3:]
            for tokens in (1, 2, 4, 8, 30):
                x = at_the_end(torch.randn(tokens, in_features))
                assert torch.allclose(cpu.linear(x, *packed), reference.linear(x, *rest), rtol=1e-4, atol=1e-4)
print("kept inside")
"""


def test_nothing_is_read_behind_a_tensor():
    """In a process of its own: reading there ends it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", BEHIND], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (0, "kept inside\n"), done.stderr


@pytest.mark.parametrize("tokens", [1, 30])
def test_threads_do_not_change_the_result(tokens):
    rest = arguments(4, 8, "dynamic_token", 300, 512, 128, tokens, False, torch.float32)
    x, threads = torch.randn(tokens, 512), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpu.linear(x, *rest))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def test_what_does_not_fit_is_named_and_left_to_the_reference():
    assert (
        cpu.kernel_name(26, 5, 4, 13) == "reference (groups of 13 x 5 bits do not start at a byte)"
    )
    assert (
        cpu.kernel_name(2**16, 8, 8, 2**16)
        == f"reference (a sum over {2**16} inputs can leave int32)"
    )
    compare(torch.randn(3, 26), arguments(5, 4, "channel", 7, 26, 13, 3, False, torch.float32))


CHANGES = {
    "weight of another width": lambda t: (t[0].float(), *t[1:]),
    "scale of another dtype": lambda t: (t[0], t[1].float(), *t[2:]),
    "zero point of another dtype": lambda t: (*t[:2], t[2].int(), *t[3:]),
    "grid of another dtype": lambda t: (*t[:3], t[3].double(), *t[4:]),
}
WRONG = {
    "bias": lambda t: (*t[:5], torch.zeros(3), *t[6:]),
    "zero point": lambda t: (*t[:2], t[2][:3], *t[3:]),
    "scale": lambda t: (t[0], t[1][:3], *t[2:]),
    "grid": lambda t: (*t[:3], t[3][:5], *t[4:]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_tensors_of_other_dtypes_are_left_to_the_reference(change):
    x, rest = torch.randn(2, 64), arguments(4, 8, "channel", 8, 64, 32, 1, False, torch.float32)
    rest = change(rest)
    if rest[0].dtype != torch.int32:
        with pytest.raises((ValueError, RuntimeError)):
            cpu.linear(x, *rest)
        return
    assert torch.equal(cpu.linear(x, *rest), reference.linear(x, *rest))


@pytest.mark.parametrize("change", WRONG.values(), ids=list(WRONG))
def test_no_kernel_reads_beyond_a_tensor(change):
    x, rest = torch.randn(2, 64), arguments(4, 8, "channel", 8, 64, 32, 1, False, torch.float32)
    with pytest.raises((ValueError, RuntimeError)):
        cpu.linear(x, *change(rest))


def test_without_a_compiler_the_reference_computes_and_says_so(monkeypatch, fresh_kernels, caplog):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert (
        cpu.kernel_name(64, 4, 4, 64) == "reference (no C++ compiler found: install g++ or set CXX)"
    )
    rest = arguments(4, 4, "channel", 8, 64, 64, 3, False, torch.float32)
    x = torch.randn(3, 64)
    assert torch.equal(cpu.linear(x, *rest), reference.linear(x, *rest))
    (record,) = caplog.records
    text = record.getMessage()
    assert "plain PyTorch, correct but 20 to 130 times slower per token" in text
    assert text.endswith(": no C++ compiler found: install g++ or set CXX")


def test_a_compiler_that_fails_is_reported_in_its_own_words(monkeypatch, fresh_kernels, tmp_path):
    compiler = tmp_path / "cxx"
    script = (
        "#!/bin/sh",
        'if [ "$1" = --version ]; then exit 0; fi',
        'echo "x.cpp:3: error: no such instruction" >&2',
        "exit 1",
    )
    compiler.write_text("\n".join(script))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert (
        cpu.kernel_name(64, 4, 4, 64)
        == "reference (cxx failed: x.cpp:3: error: no such instruction)"
    )
    assert not [
        path for path in (tmp_path / "cache" / "qvlm_hf").iterdir() if path.suffix != ".lock"
    ]


def test_without_a_place_to_write_the_reference_computes_and_says_so(
    monkeypatch, fresh_kernels, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    monkeypatch.setattr(native, "_TEMPORARY", ())
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    name = cpu.kernel_name(64, 4, 4, 64)
    assert name.startswith(
        f"reference ({tmp_path}/file/qvlm_hf: [Errno {errno.EEXIST}] File exists: '{tmp_path}/file'"
    )
    assert "name a directory of yours in XDG_CACHE_HOME" in name
    cpu.kernel_name(64, 4, 8, 64)
    (record,) = caplog.records  # once
    assert record.getMessage().endswith(name.removeprefix("reference (").removesuffix(")"))


def test_kernels_are_kept_elsewhere_where_the_cache_cannot_be_written(
    monkeypatch, fresh_kernels, tmp_path, caplog
):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cpu, "_FLAGS", SOON_COMPILED)
    assert cpu.kernel_name(64, 4, 4, 64) == "cpu portable"
    (record,) = caplog.records
    assert (
        f"because of {tmp_path}/file/qvlm_hf: [Errno {errno.EEXIST}] File exists"
        in record.getMessage()
    )


def test_a_compiler_that_hangs_or_is_misspelt_is_no_disaster(monkeypatch, fresh_kernels, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", 'g++ "')
    assert cpu.kernel_name(64, 4, 4, 64) == "reference (No closing quotation)"
    cpu._kernels.cache_clear()
    compiler = tmp_path / "slow"
    compiler.write_text("#!/bin/sh\nexec sleep 5\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "_SECONDS", 0.2)
    assert "timed out" in cpu.kernel_name(64, 4, 4, 64)


def test_cxx_is_taken_at_its_word(monkeypatch, fresh_kernels, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nope/g++")
    assert cpu.kernel_name(64, 4, 4, 64) == "reference (CXX=/nope/g++ is not there)"
    cpu._kernels.cache_clear()
    monkeypatch.setenv("CXX", "true")
    assert (
        cpu.kernel_name(64, 4, 4, 64)
        == f"reference ({shutil.which('true')} reported success and wrote nothing)"
    )
    if compiler := shutil.which("g++"):
        monkeypatch.setenv("CXX", f"{compiler} -DASKED=1")
        assert native.compiler() == [compiler, "-DASKED=1"]


@pytest.mark.parametrize("damage", ["empty", "cut", "one byte"])
def test_a_damaged_library_is_compiled_again(monkeypatch, fresh_kernels, tmp_path, caplog, damage):
    """A library that lost its end loads, and kills the process at the first call: it must not be loaded."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_FLAGS", SOON_COMPILED)
    library = native.compiled(cpu._SOURCES, cpu._FLAGS, native.openmp())
    whole = library.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "empty": b"",
        "cut": whole[:middle],
        "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }[damage]
    library.write_bytes(damaged)
    assert cpu.kernel_name(64, 4, 4, 64).startswith("cpu ")
    assert len(library.read_bytes()) == len(whole)
    assert not [record for record in caplog.records if "plain PyTorch" in record.getMessage()]


def test_a_library_that_cannot_be_loaded_is_compiled_again(monkeypatch, fresh_kernels, tmp_path):
    """Whole, but not for this machine."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_FLAGS", SOON_COMPILED)
    library = native.compiled(cpu._SOURCES, cpu._FLAGS, native.openmp())
    text = b"not a library"
    library.write_bytes(text + hashlib.sha256(text).digest())
    assert cpu.kernel_name(64, 4, 4, 64).startswith("cpu ")
    assert library.stat().st_size > 1000


def test_a_wrong_kernel_is_not_used(monkeypatch, fresh_kernels):
    if cpu._kernels().library is None:
        pytest.skip("no kernels on this machine")
    cpu._kernels.cache_clear()
    monkeypatch.setattr(
        cpu.reference, "linear", lambda x, weight, *_: torch.ones(*x.shape[:-1], weight.shape[0])
    )
    assert (
        cpu.kernel_name(64, 4, 4, 64)
        == "reference (the compiled kernel is wrong for W4A4 channel, 1 tokens)"
    )


def test_compiled_once_per_source_and_machine(monkeypatch, fresh_kernels, tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_FLAGS", SOON_COMPILED)
    first = native.compiled(cpu._SOURCES, cpu._FLAGS, native.openmp())
    assert first.parent == tmp_path / "qvlm_hf"
    assert {path.name for path in first.parent.iterdir()} == {
        first.name,
        first.with_suffix(".lock").name,
    }
    stamp = os.stat(first).st_mtime_ns
    assert native.compiled(cpu._SOURCES, cpu._FLAGS, native.openmp()) == first
    assert os.stat(first).st_mtime_ns == stamp
    monkeypatch.setattr(cpu, "_FLAGS", (*cpu._FLAGS, "-DX=1"))
    assert native.compiled(cpu._SOURCES, cpu._FLAGS, native.openmp()) != first


def test_the_portable_variant_computes_the_same(monkeypatch, fresh_kernels, tmp_path):
    """What a CPU without AVX-512 runs, compiled here without it."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        cpu, "_FLAGS", tuple(flag for flag in cpu._FLAGS if flag != "-march=native")
    )
    with torch.autocast("cpu", torch.bfloat16):  # the self-check does not see it
        assert cpu.kernel_name(64, 4, 4, 64) == "cpu portable"
    for granularity in ("channel", "token", "dynamic_token", "none"):
        for weight_bits, activation_bits in ((4, 4), (3, 8), (6, 6), (8, 8)):
            for tokens, dtype in ((1, torch.float32), (12, torch.float16), (70, torch.bfloat16)):
                rest = arguments(
                    weight_bits, activation_bits, granularity, 35, 200, 64, tokens, False, dtype
                )
                x = torch.randn(tokens, 200).to(dtype)
                compare(x, rest)
                twice = cpu.linears(
                    x,
                    *[[t, t] if t is not None else [] for t in rest[:3]],
                    *rest[3:5],
                    [rest[5]] * 2,
                    *rest[6:],
                )
                assert all(torch.equal(y, cpu.linear(x, *rest)) for y in twice)
                with torch.autocast("cpu", torch.bfloat16):
                    assert torch.equal(cpu.linear(x, *rest), twice[0])


def test_the_source_travels_with_the_package():
    for source in (*cpu._SOURCES, *cpu_operator._SOURCES):
        assert source.is_file()
        assert source.parent == Path(cpu.__file__).parent
