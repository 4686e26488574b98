"""GPU kernels of `qvlm_hf::linear`: what they take, and in which sizes.

Triton is imported when a CUDA tensor comes, not before.

The choice depends on sizes alone, never on values: a call does not wait for the device, so that a
CUDA graph can hold it. Before the kernels compute anything on a device, small cases are compared
with the reference there. Where there is no Triton, the device is old, the check fails or a module
does not fit, the reference computes, and `kernel_name` tells so.

Left out: repacking, and a dequantized copy for floating-point inputs: memory holds the packed bytes
alone.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.format.packing import pack
from qvlm_hf.ops import reference
from qvlm_hf.ops.schema import LIBRARY, Module, check_sizes, well_formed

if TYPE_CHECKING:
    from qvlm_hf.ops.triton_kernels import Layout, Tile

__all__ = [
    "TILES",
    "Device",
    "kernel_name",
    "linear",
    "linears",
    "run",
    "self_check",
    "splits_of",
    "tile_of",
]

_INT32 = 2**30  # a sum over a group, and what is added to it
_OFFSETS = 2**31 - 1  # offsets into a tensor are int32
_OLDEST = (8, 0)  # before it Triton has no integer matrix products
_MOST_SPLITS = 16
_KERNELS = "qvlm_hf.ops.triton_kernels"

# Bytes, words, correction rows, one and many tokens, float inputs.
_CHECKED = (
    (4, 4, "channel", 1),
    (4, 8, "dynamic_token", 1),
    (6, 8, "channel", 40),
    (8, 8, "dynamic_token", 70),
    (4, 16, "none", 20),
)

# Tokens of a tile -> (out_features of a tile, warps, stages), by the oldest compute capability that
# takes them. Chosen by compiling without a device (registers, spills, matrix instructions:
# tests/ops/test_triton_compile.py) and NOT yet by measurement: tests/gpu/tune_tiles.py prints a
# measured table. Only Hopper's warpgroup products leave room for 128 tokens without spills.
_FEW = {16: (64, 4, 4), 32: (64, 4, 4), 64: (128, 8, 3)}
TILES: dict[tuple[int, int], dict[int, tuple[int, int, int]]] = {
    (8, 0): _FEW,
    (9, 0): {**_FEW, 128: (128, 8, 3)},
    (10, 0): _FEW,
}
# Tokens of a tile of floating-point inputs at most: sums and wider weights fill the registers.
_MOST_TOKENS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}


@dataclass(frozen=True)
class Device:
    """What the choice of sizes depends on.

    Attributes:
        capability: compute capability.
        processors: streaming multiprocessors.
    """

    capability: tuple[int, int]
    processors: int


@dataclass(frozen=True)
class _Kernels:
    """The kernels for one device, or why there are none."""

    module: ModuleType | None
    device: Device
    name: str


def kernel_name(
    device: torch.device, weight_bits: int, activation_bits: int, group_length: int
) -> str:
    """What computes a module on this device: "triton sm90" and the like, or "reference" with the reason."""
    return _misfit(weight_bits, activation_bits, group_length) or _kernels(_index(device)).name


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    *sizes: Any,
) -> Tensor:
    """`qvlm_hf::linear` on a CUDA device; arguments and errors as in `ops.schema.linear`."""
    modules: list[Module] = [(weight, weight_scale, weight_zero_point, bias)]
    kernels = _fitting(x, modules, input_scale, input_zero_point, *sizes)
    if (
        kernels is None or kernels.module is None
    ):  # the reference also has the words for what is wrong
        return reference.linear(
            x, weight, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, *sizes
        )
    with torch.cuda.device(x.device):
        return run(
            kernels.module, kernels.device, x, modules, input_scale, input_zero_point, *sizes
        )[0]


def linears(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    weight_zero_point: Sequence[Tensor],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Sequence[Tensor],
    *sizes: Any,
) -> list[Tensor]:
    """`qvlm_hf::linears` on a CUDA device; arguments and errors as in `ops.schema.linears`."""
    modules = reference.per_module(weight, weight_scale, weight_zero_point, bias)
    kernels = _fitting(x, modules, input_scale, input_zero_point, *sizes)
    if kernels is None or kernels.module is None:
        return reference.linears(
            x, weight, weight_scale, weight_zero_point, input_scale, input_zero_point, bias, *sizes
        )
    with torch.cuda.device(x.device):
        return run(
            kernels.module, kernels.device, x, modules, input_scale, input_zero_point, *sizes
        )


def run(
    kernels: ModuleType,
    device: Device,
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
) -> list[Tensor]:
    """The outputs of modules that share an input, by the module `triton_kernels`; the input is quantized once.

    The input's device must be the current one. `device` chooses sizes alone: any device's can be
    tried anywhere.
    """
    values = block_hadamard(x.float(), hadamard) if hadamard else x
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        values = values.float()
    values = values.reshape(-1, in_features).contiguous()
    layout = kernels.Layout.of(in_features, group_length, weight_bits)
    outputs: list[list[Tensor]] = [[] for _ in modules]
    most = max(1, _OFFSETS // (2 * layout.padded) - 128)
    positions = x.shape[-2] if granularity == "token" else 1
    for part in (
        values.split(max(1, most // positions) * positions) if len(values) else ()
    ):  # a part begins at position 0
        tile = tile_of(device, len(part), part.dtype if granularity == "none" else torch.int8)
        rows = -(-len(part) // tile.tokens) * tile.tokens
        arranged = kernels.arrange(
            part, layout, activation_bits, granularity, input_scale, input_zero_point, rows=rows
        )
        for parts, (weight, weight_scale, weight_zero_point, bias) in zip(
            outputs, modules, strict=True
        ):
            splits = splits_of(device, layout, len(part), weight.shape[0], tile)
            tensors = (weight.contiguous(), weight_scale.contiguous(), weight_zero_point, bias)
            parts.append(kernels.multiply(arranged, layout, *tensors, x.dtype, tile, splits))
    shapes = [(*x.shape[:-1], weight.shape[0]) for weight, *_ in modules]
    return [_joined(parts, x).reshape(shape) for parts, shape in zip(outputs, shapes, strict=True)]


def _joined(parts: Sequence[Tensor], x: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts)) if parts else x.new_empty(0)


def _fitting(
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
) -> _Kernels | None:
    """The kernels of x's device if they take such a call."""
    check_sizes(in_features, weight_bits, activation_bits, group_length, granularity, hadamard)
    fits = well_formed(
        x,
        modules,
        input_scale,
        input_zero_point,
        in_features,
        weight_bits,
        group_length,
        granularity,
    )
    fits = fits and all(weight.numel() * 4 < _OFFSETS for weight, *_ in modules)
    return (
        _kernels(_index(x.device))
        if fits and not _misfit(weight_bits, activation_bits, group_length)
        else None
    )


def tile_of(device: Device, tokens: int, inputs: torch.dtype) -> "Tile":
    """The tile for so many tokens: the smallest that holds them, or the largest.

    Args:
        device: gives the capability.
        tokens: M.
        inputs: dtype of what is multiplied: int8, or a floating-point one.
    """
    from qvlm_hf.ops.triton_kernels import Tile

    known = TILES[max(capability for capability in TILES if capability <= device.capability)]
    size = min((size for size in known if size >= tokens), default=max(known))
    size = min(size, _MOST_TOKENS.get(inputs, size))
    out_features, warps, stages = known[size]
    return Tile(out_features, size, warps, stages)


def splits_of(
    device: Device, layout: "Layout", tokens: int, out_features: int, tile: "Tile"
) -> int:
    """Into how many parts K is split so that every processor has work: up to four programs each, of at least two groups or blocks."""
    programs = -(-out_features // tile.out_features) * -(-tokens // tile.tokens)
    units = layout.groups if layout.groups > 1 else layout.blocks
    wanted = max(
        1,
        min(
            _MOST_SPLITS,
            units // 2,
            4 * device.processors // programs if programs < device.processors else 1,
        ),
    )
    return -(-units // -(-units // wanted))  # no part is empty


@functools.cache
def _misfit(weight_bits: int, activation_bits: int, group_length: int) -> str | None:
    """Why the kernels do not take such a module, or None."""
    if (
        activation_bits <= 8
        and group_length * (2**weight_bits - 1) * (2**activation_bits - 1) >= _INT32
    ):
        return f"reference (a sum over {group_length} inputs can leave int32)"
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _kernels(index: int) -> _Kernels:
    """The kernels for the CUDA device `index`, checked there; warns where there are none.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which nothing can be checked.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "run the model once before a CUDA graph is captured: the first call compiles and "
            "checks the kernels."
        )
    device = Device(
        torch.cuda.get_device_capability(index),
        torch.cuda.get_device_properties(index).multi_processor_count,
    )
    try:
        module = _load(device)
        with torch.cuda.device(index):
            wrong = self_check(module, device, torch.device("cuda", index))
    except Exception as error:  # Triton, its compilers and the driver raise what they like
        wrong = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if wrong is not None:
        logging.getLogger(__name__).warning(
            "quantized modules on cuda:%d run in plain PyTorch, correct but slow: %s", index, wrong
        )
        return _Kernels(None, device, f"reference ({wrong})")
    return _Kernels(module, device, "triton sm{}{}".format(*device.capability))


def _load(device: Device) -> ModuleType:
    """Imports the kernels.

    Raises:
        RuntimeError: they do not run here.
    """
    if torch.version.hip is not None:
        raise RuntimeError("no kernels for ROCm")
    if device.capability < _OLDEST:
        raise RuntimeError("no kernels for compute capability {}.{}".format(*device.capability))
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed")
    return importlib.import_module(_KERNELS)


def self_check(kernels: ModuleType, device: Device, where: torch.device) -> str | None:
    """The first small case that does not come out as the reference has it, or None.

    Args:
        kernels: the module `triton_kernels`.
        device: chooses the sizes.
        where: the device that computes.
    """
    generator = torch.Generator().manual_seed(0)
    for weight_bits, activation_bits, granularity, tokens in _CHECKED:
        integers = torch.randint(
            0, 2**weight_bits, (70, 300), generator=generator, dtype=torch.uint8
        )
        statics = granularity == "channel"
        weight = pack(integers, weight_bits)
        weight_scale = torch.rand(70, 3, generator=generator).add(0.5).bfloat16()
        weight_zero_point = torch.randint(
            0, 2**weight_bits, (70, 3), generator=generator, dtype=torch.uint8
        )
        input_scale = torch.rand(300, generator=generator).add(0.1) if statics else None
        input_zero_point = (
            torch.randint(0, 2**activation_bits, (300,), generator=generator, dtype=torch.int32)
            if statics
            else None
        )
        x = torch.randn(tokens, 300, generator=generator).to(
            torch.float32 if activation_bits <= 8 else torch.bfloat16
        )
        tensors: list[Any] = [
            weight,
            weight_scale,
            weight_zero_point,
            input_scale,
            input_zero_point,
            None,
        ]
        there: list[Any] = [None if tensor is None else tensor.to(where) for tensor in tensors]
        sizes: dict[str, Any] = {
            "in_features": 300,
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "group_length": 128,
        }
        sizes |= {"granularity": granularity, "hadamard": 0}
        (y,) = run(kernels, device, x.to(where), [(*there[:3], None)], *there[3:5], **sizes)
        y = y.float().cpu()
        expected = reference.linear(x.float(), *tensors, **sizes)
        if not torch.allclose(
            y,
            expected,
            rtol=1e-4 if activation_bits <= 8 else 2**-7,
            atol=1e-5 * float(expected.abs().max()),
        ):
            return f"the compiled kernel is wrong for W{weight_bits}A{activation_bits} {granularity}, {tokens} tokens"
    return None


LIBRARY.impl("linear", linear, "CUDA")
LIBRARY.impl("linears", linears, "CUDA")
