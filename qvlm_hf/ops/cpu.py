"""CPU kernels of `linear`, `linears` and `rms_norm`: C++, compiled and checked where it runs.

The sources (csrc/) are part of the package. The host's C++ compiler compiles them at first use for
the host's own instruction set. The user's cache keeps the library under a hash of sources, flags,
compiler and processor. The kernels compute with PyTorch's own OpenMP threads. Where there is no
compiler, or a result is not the reference's, the reference computes and `kernel_name` tells so.

The processor's class decides what is compiled: AVX-512, AVX2, or plain loops (csrc/cpu_vector.h).

Left out: repacking. The kernels read the bytes as they lie on disk, so a model is in memory once.
"""

import ctypes
import functools
import logging
import struct
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qvlm_hf.format.grids import CLIPS, quantize_weight
from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.packing import pack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.ops import native, reference
from qvlm_hf.ops.call import CallScheme, Loaded, Packed, int32_overflow

__all__ = ["entries", "load", "misfit", "round_weight"]

_SOURCES = native.sources(
    *("cpu_kernels.cpp", "cpu_integer.cpp", "cpu_float.cpp", "cpu_quantize.h", "cpu_unpack.h"),
    *("cpu_vector.h", "cpu_token.h", "cpu_portable.h", "cpu_weight.h", "cpu_fused.h"),
    *("cpu_number.h", "cpu_call.h", "cpu_round.cpp"),
)
# -ffp-contract=off: x / scale and its rounding must be what the reference computes, or 4-bit levels
# flip; -fno-trapping-math: a comparison need not raise flags, or no loop with one is vectorised
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-fopenmp", "-shared", "-fPIC"),
)
# Every width, granularity and way of 8-bit inputs, with one token, some and many.
_CHECKED = tuple(
    reference.Case(*case)
    for case in (
        (4, 4, "channel", 1),
        (4, 8, "dynamic_token", 9),
        (6, 8, "channel", 20),
        (8, 8, "dynamic_token", 1),
        (2, 4, "token", 7),
        (3, 6, "channel", 3),
        (5, 8, "token", 70),
        (7, 7, "dynamic_token", 12),
        (4, 4, "dynamic_group", 1),
        (8, 8, "dynamic_group", 9),
        (4, 16, "none", 2),
        (5, 16, "none", 1),
        (8, 16, "none", 5),
        (3, 16, "none", 40),
        (4, 8, "dynamic_token", 2, 192, 96, (70,), 64),
        (8, 16, "none", 10, 200, 200, (70,), 8),
    )
)
# Many tokens are multiplied in another way where the processor multiplies bfloat16.
_CHECKED_BFLOAT16 = (reference.Case(3, 16, "none", 9), reference.Case(8, 16, "none", 40))
# Beyond so many tokens, portable kernels leave floating-point inputs to PyTorch's product with a
# dequantized copy of that one weight.
_DENSE_TOKENS = 32
# As cpu_direct.cpp has them.
_GRANULARITIES = {"channel": 0, "token": 1, "dynamic_token": 2, "none": 3, "dynamic_group": 4}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PORTABLE = 0
_VARIANTS = {_PORTABLE: "cpu portable", 32: "cpu avx2", 33: "cpu avx2-vnni", 64: "cpu avx512-vnni"}
# What tests/bench/plain_pytorch.py measured: layers of 1024 x 1024 and of 4096 x 4096.
_SLOWER = "20 to 130 times slower per token (docs/benchmarks.md; remedies: docs/troubleshooting.md)"


def misfit(scheme: CallScheme) -> str | None:
    """Why the kernels do not take such modules, or None."""
    if scheme.granularity not in _GRANULARITIES:
        return f"no CPU kernel knows granularity {scheme.granularity!r}"
    length, bits = scheme.group_length, scheme.weight_bits
    if length < scheme.in_features and length * bits % 8:
        return f"groups of {length} x {bits} bits do not start at a byte"
    return int32_overflow(scheme)


def load(_: torch.device) -> Loaded:
    """Compiles and checks the kernels, once per process."""
    name, library = _kernels()
    return name, None if library is None else functools.partial(_compute, library)


def entries() -> dict[str, int] | None:
    """Where the kernels begin, by their names in `fast_path.use`; None where there are none."""
    _, library = _kernels()
    if library is None:
        return None
    names = ("linears", "square", "rms_norm")
    most_floats = _DENSE_TOKENS if library.qvlm_variant() == _PORTABLE else 2**62
    addresses = {name: native.address(getattr(library, f"qvlm_{name}")) for name in names}
    return {"most_floats": most_floats} | addresses


def round_weight(weight: Tensor, scheme: QuantScheme) -> Packed | None:
    """`quantize_weight` and `pack` in one pass, or None where there is another way to go.

    Factors whose errors are equal but for rounding may be chosen otherwise.

    Args:
        weight: [O, I], times the input scale where the input is quantized per channel.
        scheme: gives weight_bits, group_size and symmetric.

    Returns:
        The tensors of the module without bias; None if there are no kernels, or the weight is no
        matrix on a CPU in a dtype that they know, or not finite.
    """
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.dim() != 2:
        return None
    library = _kernels()[1]
    if library is None:
        return None
    if (rounded := _round(library, weight, scheme)) is None:
        return None
    integers, scale, zero_point = rounded
    return Packed(integers, scale, None if scheme.symmetric else zero_point, None)


@functools.cache
def _kernels() -> tuple[str, ctypes.CDLL | None]:
    """The name and the library, or "reference (why)" and None."""
    try:
        library = _load()
        wrong = native.in_clean_thread(lambda: _self_check(library))
        if not wrong:
            name = _VARIANTS[library.qvlm_variant()]
            if library.qvlm_variant() == _PORTABLE:
                logging.getLogger(__name__).warning(
                    "this processor has no AVX2: quantized layers (%s) save memory, but are slower "
                    "than full precision (docs/kernels.md)",
                    name,
                )
            return name, library
        reason = f"the compiled kernel is wrong for {wrong}"
    except native.ERRORS as error:
        reason = str(error)
    logging.getLogger(__name__).warning(
        "quantized layers run in plain PyTorch, correct but %s: %s", _SLOWER, reason
    )
    return f"reference ({reason})", None


def _load() -> ctypes.CDLL:
    library = native.load(native.library, _SOURCES, _FLAGS, native.openmp())
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.qvlm_variant.argtypes, library.qvlm_variant.restype = [], ctypes.c_int
    library.qvlm_linears.argtypes = [ctypes.c_char_p]
    library.qvlm_square.argtypes = [pointer, pointer, size, size]
    library.qvlm_round.argtypes, library.qvlm_round.restype = [ctypes.c_char_p], ctypes.c_int
    library.qvlm_rms_norm.argtypes = [*[pointer] * 3, ctypes.c_float, pointer, *[size] * 3]
    for function in (library.qvlm_linears, library.qvlm_square, library.qvlm_rms_norm):
        function.restype = None
    return library


def _self_check(library: ctypes.CDLL) -> str | None:
    """The first small case that does not come out as the reference has it, or None."""
    compute = functools.partial(_compute, library)
    if wrong := reference.find_wrong_case(compute, _CHECKED):
        return wrong
    if wrong := reference.find_wrong_case(compute, _CHECKED_BFLOAT16, floating=torch.bfloat16):
        return f"{wrong} in bfloat16"
    generator = torch.Generator().manual_seed(0)
    for bits, symmetric in ((2, True), (3, False), (4, False), (8, True)):
        scheme = QuantScheme(
            weight_bits=bits,
            activation_bits=8,
            group_size=32,
            symmetric=symmetric,
            granularity="dynamic_token",
        )
        weight = torch.randn(9, 70, generator=generator, dtype=torch.float32)
        rounded, expected = _round(library, weight, scheme), quantize_weight(weight, scheme)
        tensors = pack(expected.values, bits), expected.scale, expected.zero_point
        if rounded is None or not all(map(torch.equal, rounded, tensors)):
            return f"rounding to {bits} bits"
    for dtype, number in _DTYPES.items():
        x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((30, 34), 34))
        y, squares = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        library.qvlm_square(x.data_ptr(), squares.data_ptr(), x.numel(), number)
        sums = squares.sum(-1)
        pointers = (tensor.data_ptr() for tensor in (x, weight, sums))
        library.qvlm_rms_norm(*pointers, 1e-5, y.data_ptr(), 30, 34, number)
        if not torch.equal(y, reference.rms_norm(x, weight, 1e-5)):
            return f"RMSNorm in {dtype}"
    return None


def _round(
    library: ctypes.CDLL, weight: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Packed integers, scales and zero points of a weight, or None if it is not finite."""
    (rows, k), bits = weight.shape, scheme.weight_bits
    groups, words = scheme.groups(k), -(-k * bits // 32)
    weight, clips = weight.detach().contiguous(), torch.tensor(CLIPS, dtype=torch.float32)
    rounded = (
        torch.empty(rows, words, dtype=torch.int32),
        torch.empty(rows, groups, dtype=torch.bfloat16),
        torch.empty(rows, groups, dtype=torch.uint8),
    )
    pointers = (one.data_ptr() for one in (weight, clips, *rounded))
    sizes = (_DTYPES[weight.dtype], rows, k, groups, scheme.group_length(k), words, bits)
    numbers = (*pointers, *sizes, scheme.symmetric, len(CLIPS))
    finite = library.qvlm_round(_words(len(numbers)).pack(*numbers))
    return rounded if finite else None


def _compute(
    library: ctypes.CDLL, x: Tensor, weights: Sequence[Packed], scheme: CallScheme
) -> list[Tensor]:
    """The output of each module."""
    floating, tokens = scheme.granularity == "none", x.shape[:-1].numel()
    if floating and tokens > _DENSE_TOKENS and library.qvlm_variant() == _PORTABLE:
        values, scale = x.float(), scheme.input_scale
        values = block_hadamard(values, scheme.hadamard) if scheme.hadamard else values
        scaled = values if scale is None else values / scale
        return [_multiply_dense(scaled, packed, scheme).to(x.dtype) for packed in weights]
    values = (x if x.dtype in _DTYPES else x.float()).contiguous()
    outputs = [values.new_empty((*x.shape[:-1], packed.weight.shape[0])) for packed in weights]
    if x.numel() and outputs:
        _fill(library, values, weights, scheme, outputs)
    return outputs if values.dtype == x.dtype else [y.to(x.dtype) for y in outputs]


def _multiply_dense(x: Tensor, packed: Packed, scheme: CallScheme) -> Tensor:
    """float32 [..., N] of inputs whose scale and transform are done, by a dequantized weight."""
    plain = scheme._replace(input_scale=None, hadamard=0)
    with reference.exact_products(x):
        bias = None if packed.bias is None else packed.bias.float()
        return functional.linear(x, reference.dequantize(packed, plain), bias)


def _fill(
    library: ctypes.CDLL,
    x: Tensor,
    weights: Sequence[Packed],
    scheme: CallScheme,
    outputs: Sequence[Tensor],
) -> None:
    """Calls the kernel with a `qvlm::Call` and its layers (cpu_call.h).

    One argument of plain words: ctypes takes a microsecond for each handful of arguments.
    """
    copies: list[Tensor] = []  # alive until the kernels are done

    def pointer(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        if tensor.is_contiguous():
            return tensor.data_ptr()
        copies.append(tensor.contiguous())
        return copies[-1].data_ptr()

    grid, zero_point, k, weight_bits, activation_bits, length, granularity, hadamard = scheme
    positions = 0 if granularity != "token" or grid is None else grid.shape[0]
    groups, row_bytes = -(-k // length), -(-k * weight_bits // 32) * 4
    words = [x.data_ptr(), pointer(grid), pointer(zero_point), _DTYPES[x.dtype], x.numel() // k, k]
    words += [groups, length, row_bytes, weight_bits, activation_bits, _GRANULARITIES[granularity]]
    words += [positions, hadamard, len(weights)]
    for packed, y in zip(weights, outputs, strict=True):
        bias = packed.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
            copies.append(bias)
        words += [pointer(bias), y.data_ptr(), pointer(packed.weight), pointer(packed.weight_scale)]
        words += [pointer(packed.weight_zero_point), y.shape[-1]]
    library.qvlm_linears(_words(len(words)).pack(*words))


@functools.cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"{count}q")
