"""CPU kernels of `qvlm_hf::linear`, `linears` and `rms_norm`: C++, compiled where it runs, checked before it is used.

The source is part of the package and is compiled at first use with the host's C++ compiler for the
host's own instruction set; the library is kept in the user's cache under a hash of source, flags,
compiler and processor. It computes with PyTorch's own OpenMP threads. Where there is no compiler,
or the result is not what the reference says, the reference computes, and `kernel_name` tells so.

Left out: repacking. The kernels read the bytes as they lie on disk, so a model is in memory once.
"""

import ctypes
import functools
import logging
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.packing import pack
from qvlm_hf.ops import native, reference
from qvlm_hf.ops.schema import Module, check_sizes, well_formed

__all__ = ["entries", "kernel_name", "linear", "linears"]

_SOURCES = tuple(
    Path(__file__).with_name(f"cpu_{name}")
    for name in ("kernels.cpp", "integer.h", "float.h", "weight.h", "fused.h", "number.h", "call.h")
)
# -ffp-contract=off: x / scale and its rounding must be what the reference computes, or 4-bit levels
# flip
_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
_INT32 = 2**30  # the kernels add two partial sums of a group
# Every width, granularity and way of 8-bit inputs, with one token, some and many.
_CHECKED = (
    (4, 4, "channel", 1), (4, 8, "dynamic_token", 9), (6, 8, "channel", 20), (8, 8, "dynamic_token", 1), (2, 4, "token", 7),
    (3, 6, "channel", 3), (5, 8, "token", 70), (7, 7, "dynamic_token", 12), (4, 16, "none", 2), (5, 16, "none", 1), (8, 16, "none", 5),
    (3, 16, "none", 40),
)  # fmt: skip
_DENSE_TOKENS = 32  # beyond, portable kernels leave floating-point inputs to PyTorch's product with a dequantized copy of that one weight
_GRANULARITIES = {"channel": 0, "token": 1, "dynamic_token": 2, "none": 3}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PORTABLE = 0
# What tests/bench/plain_pytorch.py measured: layers of 1024 x 1024 and of 4096 x 4096.
_SLOWER = "20 to 130 times slower per token (docs/benchmarks.md; remedies: docs/troubleshooting.md)"
_VARIANTS = {_PORTABLE: "cpu portable", 1: "cpu avx512-vnni"}


@dataclass(frozen=True)
class _Kernels:
    """The compiled library and its name, or why there is none."""

    library: ctypes.CDLL | None
    name: str


def kernel_name(in_features: int, weight_bits: int, activation_bits: int, group_length: int) -> str:
    """What computes a module on this CPU: "cpu avx512-vnni", "cpu portable", or "reference" with the reason."""
    return _misfit(in_features, weight_bits, activation_bits, group_length) or _kernels().name


def entries() -> dict[str, int] | None:
    """Where the kernels begin, by the names that `cpu_direct.use` has for them; None where there are none."""
    library = _kernels().library
    if library is None:
        return None
    names = ("linears", "square", "rms_norm")
    most_floats = _DENSE_TOKENS if library.qvlm_variant() == _PORTABLE else 2**62
    return {"most_floats": most_floats} | {
        name: native.address(getattr(library, f"qvlm_{name}")) for name in names
    }


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> Tensor:
    """`qvlm_hf::linear` on a CPU; arguments and errors as in `ops.schema.linear`."""
    sizes = (in_features, weight_bits, activation_bits, group_length, granularity, hadamard)
    modules = ((weight, weight_scale, weight_zero_point, bias),)
    library = _library(x, modules, input_scale, input_zero_point, *sizes)
    if library is None:
        return reference.linear(
            x, weight, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, *sizes
        )
    return _outputs(library, x, modules, input_scale, input_zero_point, *sizes[1:])[0]


def linears(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Sequence[Tensor],
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> list[Tensor]:
    """`qvlm_hf::linears` on a CPU; arguments and errors as in `ops.schema.linears`."""
    sizes = (in_features, weight_bits, activation_bits, group_length, granularity, hadamard)
    modules = reference.per_module(weight, weight_scale, weight_zero_point, bias)
    library = _library(x, modules, input_scale, input_zero_point, *sizes)
    if library is None:
        return reference.linears(
            x, weight, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, *sizes
        )
    return _outputs(library, x, modules, input_scale, input_zero_point, *sizes[1:])


def _library(
    x: Tensor,
    modules: Sequence[Module],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> ctypes.CDLL | None:
    """The kernels if they take such a call; the reference takes all others, and has the words for what is wrong with their tensors."""
    check_sizes(in_features, weight_bits, activation_bits, group_length, granularity, hadamard)
    if not well_formed(
        x,
        modules,
        input_scale,
        input_zero_point,
        in_features,
        weight_bits,
        group_length,
        granularity,
    ):
        return None
    return (
        _kernels().library
        if _misfit(in_features, weight_bits, activation_bits, group_length) is None
        else None
    )


def _outputs(
    library: ctypes.CDLL,
    x: Tensor,
    modules: Sequence[Module],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
    hadamard: int,
) -> list[Tensor]:
    """The output of each module, by the kernels."""
    values = block_hadamard(x.float(), hadamard) if hadamard else x
    tokens = x.shape[:-1].numel()
    if granularity == "none" and tokens > _DENSE_TOKENS and library.qvlm_variant() == _PORTABLE:
        scaled = values.float() if input_scale is None else values.float() / input_scale
        return [
            _dense(scaled, *module, weight_bits, group_length).to(x.dtype) for module in modules
        ]
    if values.dtype not in _DTYPES:
        values = values.float()
    values = values.contiguous()
    outputs = [values.new_empty((*x.shape[:-1], module[0].shape[0])) for module in modules]
    if x.numel() and outputs:
        sizes = (weight_bits, activation_bits, group_length)
        _compute(
            library, values, modules, outputs, input_scale, input_zero_point, *sizes, granularity
        )
    return outputs if values.dtype == x.dtype else [y.to(x.dtype) for y in outputs]


def _compute(
    library: ctypes.CDLL,
    x: Tensor,
    modules: Sequence[Module],
    outputs: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    weight_bits: int,
    activation_bits: int,
    group_length: int,
    granularity: str,
) -> None:
    """Fills the outputs.

    One argument of plain words: ctypes takes a microsecond for each handful of arguments.
    """
    in_features = x.shape[-1]
    kept: list[Tensor] = []  # copies, alive until the kernels are done

    def pointer(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.is_contiguous():
            return tensor.data_ptr()
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    groups, row_bytes = -(-in_features // group_length), -(-in_features * weight_bits // 32) * 4
    positions = 0 if granularity != "token" or input_scale is None else input_scale.shape[0]
    words = [
        x.data_ptr(), pointer(input_scale), pointer(input_zero_point), _DTYPES[x.dtype], x.numel() // in_features, in_features,
        groups, group_length, row_bytes, weight_bits, activation_bits, _GRANULARITIES[granularity], positions, len(modules),
    ]  # fmt: skip
    for (weight, weight_scale, weight_zero_point, bias), y in zip(modules, outputs, strict=True):
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
            kept.append(bias)
        words += (
            pointer(bias),
            y.data_ptr(),
            pointer(weight),
            pointer(weight_scale),
            pointer(weight_zero_point),
            y.shape[-1],
        )
    library.qvlm_linears(_words(len(words)).pack(*words))


def _dense(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    group_length: int,
) -> Tensor:
    """float32 [..., N] of floating-point inputs, float32 [..., K] with their scale divided out, by a dequantized copy of the weight."""
    dense = reference.dequantize_weight(
        weight, scale, zero_point, None, x.shape[-1], weight_bits, group_length, "none", 0
    )
    with reference.exact_products(x):
        return functional.linear(x, dense, None if bias is None else bias.float())


@functools.cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")


@functools.cache
def _misfit(
    in_features: int, weight_bits: int, activation_bits: int, group_length: int
) -> str | None:
    """Why the kernels do not take such a module, or None."""
    if group_length < in_features and group_length * weight_bits % 8:
        return f"reference (groups of {group_length} x {weight_bits} bits do not start at a byte)"
    if (
        activation_bits <= 8
        and group_length * (2**weight_bits - 1) * (2**activation_bits - 1) >= _INT32
    ):
        return f"reference (a sum over {group_length} inputs can leave int32)"
    return None


@functools.cache
def _kernels() -> _Kernels:
    """Compiles, loads and checks the library, once per process."""
    try:
        library = _load()
        name = _VARIANTS[library.qvlm_variant()]
        wrong = native.apart(lambda: _self_check(library))
        if not wrong:
            return _Kernels(library, name)
        reason = f"the compiled kernel is wrong for {wrong}"
    except (
        OSError,
        RuntimeError,
        ValueError,
        subprocess.TimeoutExpired,
    ) as error:  # ValueError: shlex, of CXX
        reason = str(error)
    logging.getLogger(__name__).warning(
        "quantized layers run in plain PyTorch, correct but %s: %s", _SLOWER, reason
    )
    return _Kernels(None, f"reference ({reason})")


def _load() -> ctypes.CDLL:
    library = native.load(_SOURCES, _FLAGS, native.openmp())
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.qvlm_variant.argtypes, library.qvlm_variant.restype = [], ctypes.c_int
    library.qvlm_linears.argtypes = [ctypes.c_char_p]
    library.qvlm_square.argtypes = [pointer, pointer, size, size]
    library.qvlm_rms_norm.argtypes = [
        pointer,
        pointer,
        pointer,
        ctypes.c_float,
        pointer,
        size,
        size,
        size,
    ]
    for function in (library.qvlm_linears, library.qvlm_square, library.qvlm_rms_norm):
        function.restype = None
    return library


def _self_check(library: ctypes.CDLL) -> str | None:
    """The first small case that does not come out as the reference has it, or None."""
    generator = torch.Generator().manual_seed(0)
    for weight_bits, activation_bits, granularity, tokens in _CHECKED:
        modules: list[Module] = [_random_module(weight_bits, rows, generator) for rows in (70, 5)]
        length = {"channel": 136, "token": tokens}.get(granularity)
        statics = (
            None
            if length is None
            else torch.rand(length, generator=generator, dtype=torch.float32).add(0.1),
            None
            if length is None
            else torch.randint(
                0, 2**activation_bits, (length,), generator=generator, dtype=torch.int32
            ),
        )
        x = torch.randn(tokens, 136, generator=generator, dtype=torch.float32)
        outputs = _outputs(
            library, x, modules, *statics, weight_bits, activation_bits, 128, granularity, 0
        )
        for (weight, scale, zero, bias), y in zip(modules, outputs, strict=True):
            expected = reference.linear(
                x,
                weight,
                scale,
                zero,
                *statics,
                bias,
                136,
                weight_bits,
                activation_bits,
                128,
                granularity,
                0,
            )
            if not torch.allclose(y, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
                return f"W{weight_bits}A{activation_bits} {granularity}, {tokens} tokens"
    return _check_norm(library, generator)


def _check_norm(library: ctypes.CDLL, generator: torch.Generator) -> str | None:
    for dtype, number in _DTYPES.items():
        x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((30, 34), 34))
        y, squares = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        library.qvlm_square(x.data_ptr(), squares.data_ptr(), x.numel(), number)
        sums = squares.sum(-1)
        library.qvlm_rms_norm(
            x.data_ptr(), weight.data_ptr(), sums.data_ptr(), 1e-5, y.data_ptr(), 30, 34, number
        )
        if not torch.equal(y, reference.rms_norm(x, weight, 1e-5)):
            return f"RMSNorm in {dtype}"
    return None


def _random_module(weight_bits: int, rows: int, generator: torch.Generator) -> Module:
    """The tensors of a module of `rows` outputs and 136 inputs in groups of 128."""
    integers = torch.randint(0, 2**weight_bits, (rows, 136), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, 2, generator=generator).add(0.5).bfloat16()
    zero_point = torch.randint(0, 2**weight_bits, (rows, 2), generator=generator, dtype=torch.uint8)
    return (
        pack(integers, weight_bits),
        scale,
        zero_point,
        torch.randn(rows, generator=generator, dtype=torch.float32),
    )
