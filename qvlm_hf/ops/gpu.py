"""GPU kernels of `qvlm_hf::linear`: what they take, and in which sizes.

Triton is imported when a CUDA tensor comes, not before.

The choice depends on sizes alone, never on values: a call does not wait for the device, so that a
CUDA graph can hold it. Before the kernels compute anything on a device, small cases are compared
with the reference there. Where there is no Triton, the device is old, the check fails or a module
does not fit, the reference computes, and `kernel_name` tells so.

Left out: repacking, and a dequantized copy for floating-point inputs. Memory holds the packed bytes
alone.
"""

import functools
import importlib.util
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qvlm_hf.format.hadamard import block_hadamard
from qvlm_hf.ops import reference
from qvlm_hf.ops.call import CallScheme, Loaded, Packed, int32_overflow
from qvlm_hf.ops.launches import Launch, aligned

if TYPE_CHECKING:
    from qvlm_hf.ops.triton_kernels import Layout, Tile

__all__ = ["TILES", "Device", "compute", "load", "misfit", "self_check", "splits_of", "tile_of"]

_OFFSETS = 2**31 - 1  # offsets into a tensor are int32
_OLDEST = (8, 0)  # before it Triton has no integer matrix products
_MOST_SPLITS = 16
_BLOCK = 128  # inputs that a program multiplies at once
_FEWEST = 16  # tokens of the smallest tile
_PLANS = 4096  # kept: a few hundred bytes for each kind of module and number of tokens
_KERNELS = "qvlm_hf.ops.triton_kernels"
# As triton_kernels.py branches on them.
_GRANULARITIES = frozenset(("channel", "token", "dynamic_token", "none", "dynamic_group"))

# Bytes, words, correction rows, one and many tokens, float inputs; and, as in real models, no rest
# in any direction and inputs that are split.
_REAL = (1024, 128, (512, 64, 128))
_CHECKED = tuple(
    reference.Case(*case)
    for case in (
        (4, 4, "channel", 1),
        (6, 8, "channel", 40),
        (8, 8, "dynamic_token", 70),
        (4, 16, "none", 20),
        (4, 4, "dynamic_group", 1),
        (4, 8, "dynamic_token", 1, *_REAL),
        (6, 6, "channel", 1, *_REAL),
        (8, 8, "dynamic_token", 1, 1024, 1024, (512,)),
        (4, 16, "none", 1, *_REAL),
    )
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
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
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


def misfit(scheme: CallScheme) -> str | None:
    """Why the kernels do not take such modules, or None."""
    if scheme.granularity not in _GRANULARITIES:
        return f"no GPU kernel knows granularity {scheme.granularity!r}"
    if scheme.granularity == "dynamic_group" and scheme.group_length > _BLOCK:
        return f"no GPU kernel has a range per group of more than {_BLOCK} inputs"
    return int32_overflow(scheme)


def load(device: torch.device) -> Loaded:
    """Compiles and checks the kernels for a CUDA device, once."""
    index = torch.cuda.current_device() if device.index is None else device.index
    name, kernels, known = _kernels(index)
    return name, None if kernels is None else functools.partial(_compute_on, kernels, known)


def _compute_on(
    kernels: ModuleType, known: Device, x: Tensor, weights: Sequence[Packed], scheme: CallScheme
) -> list[Tensor]:
    """On x's device; the reference takes weights that offsets do not reach."""
    if any(packed.weight.numel() * 4 >= _OFFSETS for packed in weights):
        return reference.linears(x, weights, scheme)
    if torch.cuda.current_device() == x.device.index:
        return compute(kernels, known, x, weights, scheme)
    with torch.cuda.device(x.device):
        return compute(kernels, known, x, weights, scheme)


def compute(
    kernels: ModuleType, device: Device, x: Tensor, weights: Sequence[Packed], scheme: CallScheme
) -> list[Tensor]:
    """The outputs of modules that share an input, which is quantized once.

    The input's device must be the current one. `device` chooses sizes alone: any device's can be
    tried anywhere.

    Raises:
        RuntimeError: a CUDA graph is being captured and the kernels are not compiled yet.
    """
    values = block_hadamard(x.float(), scheme.hadamard) if scheme.hadamard else x
    if values.dtype not in _FLOATS:
        values = values.float()
    values = values.reshape(-1, scheme.in_features)
    if not values.is_contiguous():
        values = values.contiguous()
    outputs = [x.new_empty((*x.shape[:-1], packed.weight.shape[0])) for packed in weights]
    tokens, most = len(values), _most_tokens(scheme)
    positions = x.shape[-2] if scheme.granularity == "token" else 1
    # Modules of different biases are compiled apart.
    biases = {packed.bias.dtype for packed in weights if packed.bias is not None}
    together = 1 if len(biases) > 1 else kernels.MOST_MODULES
    for place in range(0, len(weights) if tokens else 0, together):
        some, results = weights[place : place + together], outputs[place : place + together]
        sizes = tuple(packed.weight.shape[0] for packed in some)
        forms = values.dtype, x.dtype, *biases, x.device, scheme.input_scale is not None
        fixed = kernels, device, sizes, forms, some[0].weight_zero_point is None, scheme[2:]
        if tokens <= most:
            _plan(*fixed, tokens, positions)(values, some, scheme, results)
            continue
        size = max(1, most // positions) * positions  # a part begins at position 0
        flat = [y.view(-1, y.shape[-1]).split(size) for y in results]
        for part, *ys in zip(values.split(size), *flat, strict=True):
            _plan(*fixed, len(part), positions)(part, some, scheme, ys)
    return outputs


def _most_tokens(scheme: CallScheme) -> int:
    """As many as offsets into the arranged inputs reach; they are padded to less than twice."""
    padded = -(-scheme.in_features // scheme.group_length) * max(128, 2 * scheme.group_length)
    return max(1, _OFFSETS // (2 * padded) - 128)


class _Plan:
    """How modules of such sizes compute so many tokens: two launches, and what lies between."""

    def __init__(
        self, kernels: ModuleType, device: Device, sizes: tuple[int, ...],
        forms: tuple[Any, ...], numbers: tuple[Any, ...], tokens: int, positions: int,
    ) -> None:  # fmt: skip
        in_features, weight_bits, bits, group_length, granularity, _ = numbers
        layout = kernels.Layout.of(in_features, group_length, weight_bits)
        tile = tile_of(device, tokens, forms[0] if granularity == "none" else torch.int8)
        rows = -(-tokens // tile.tokens) * tile.tokens
        inputs = kernels.Inputs(layout, tokens, rows, bits, granularity, forms[0], forms[-1])
        splits = [splits_of(device, layout, tokens, size, tile) for size in sizes]
        tiles = sum(-(-size // tile.out_features) for size in sizes) * -(-tokens // tile.tokens)
        counters, partial = 0, 0
        if max(splits) > 1:
            counters = tiles
            partial = tokens * sum(map(operator.mul, splits, sizes))
        self.buffers = inputs.buffers(counters, partial)
        self.arrange = kernels.arranging(inputs, positions, counters)
        self.multiply = kernels.multiplying(inputs, sizes, splits, tile)
        self.bytewise = layout.bytewise
        self.nothing = [None] * (5 * (kernels.MOST_MODULES - len(sizes)))

    def __call__(
        self, x: Tensor, weights: Sequence[Packed], scheme: CallScheme, outputs: Sequence[Tensor]
    ) -> None:
        """Fills the outputs."""
        storage = torch.empty(self.buffers.size, dtype=torch.uint8, device=x.device)
        given = [x, *scheme[:2]]
        own: list[Tensor | None] = []
        for packed, y in zip(weights, outputs, strict=True):
            own += *packed, y
        given, own = ([_contiguous(one) for one in tensors] for tensors in (given, own))
        if self.multiply.ready:
            first, second = ([_address(one) for one in tensors] for tensors in (given, own))
            between = self.buffers.addresses(storage.data_ptr())
            if aligned([one for one in (*first, *second) if one is not None]):
                self.arrange.at([*first, *between[:-1]])
                self.multiply.at([*between, *second, *self.nothing])
                return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"run the model once with {len(x)} tokens before a CUDA graph of it is captured: "
                f"the first call compiles kernels."
            )
        if self.bytewise:
            own[::5] = [one.view(torch.uint8) for one in own[::5] if one is not None]
        views = list(self.buffers.tensors(storage).values())
        self.arrange(*given, *views[:-1])
        self.multiply(*views, *own, *self.nothing)


@functools.lru_cache(_PLANS)
def _plan(
    kernels: ModuleType, device: Device, sizes: tuple[int, ...], forms: tuple[Any, ...],
    symmetric: bool, numbers: tuple[Any, ...], tokens: int, positions: int,
) -> _Plan:  # fmt: skip
    """Made once for everything that chooses a variant of the kernels."""
    del symmetric
    return _Plan(kernels, device, sizes, forms, numbers, tokens, positions)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def tile_of(device: Device, tokens: int, inputs: torch.dtype) -> "Tile":
    """The tile for so many tokens: the smallest that holds them, or the largest."""
    from qvlm_hf.ops.triton_kernels import Tile

    known = TILES[max(capability for capability in TILES if capability <= device.capability)]
    size = min((size for size in known if size >= tokens), default=max(known))
    size = min(size, _MOST_TOKENS.get(inputs, size))
    out_features, warps, stages = known[size]
    return Tile(out_features, size, warps, stages)


def splits_of(
    device: Device, layout: "Layout", tokens: int, out_features: int, tile: "Tile"
) -> int:
    """Into how many parts K is split so that every processor has work.

    A processor gets up to four programs, each of at least two groups or blocks; where few tokens
    make it wait for memory, at least three.
    """
    programs = -(-out_features // tile.out_features) * -(-tokens // tile.tokens)
    units = layout.groups if layout.groups > 1 else layout.blocks
    enough = device.processors * (3 if tokens <= _FEWEST else 1)
    parts = 4 * device.processors // programs if programs < enough else 1
    wanted = max(1, min(_MOST_SPLITS, units // 2, parts))
    return -(-units // -(-units // wanted))  # no part is empty


@functools.cache
def _kernels(index: int) -> tuple[str, ModuleType | None, Device]:
    """Name, kernels (or "reference (why)" and None) and what is known of the CUDA device `index`.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which nothing can be checked.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "run the model once before a CUDA graph is captured: the first call compiles and "
            "checks the kernels."
        )
    processors = torch.cuda.get_device_properties(index).multi_processor_count
    device = Device(torch.cuda.get_device_capability(index), processors)
    try:
        kernels = _load(device)
        with torch.cuda.device(index):
            wrong = _checked(kernels, device, torch.device("cuda", index))
    except Exception as error:  # Triton, its compilers and the driver raise what they like
        wrong = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if wrong is None:
        return "triton sm{}{}".format(*device.capability), kernels, device
    logging.getLogger(__name__).warning(
        "quantized modules on cuda:%d run in plain PyTorch, correct but slow: %s", index, wrong
    )
    return f"reference ({wrong})", None, device


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


def _checked(kernels: ModuleType, device: Device, where: torch.device) -> str | None:
    """`self_check`, if need be with every launch by Triton's way."""
    try:
        return self_check(kernels, device, where)
    except TypeError:  # its launcher takes other arguments
        Launch.repeats = False
        _plan.cache_clear()
        return self_check(kernels, device, where)


def self_check(kernels: ModuleType, device: Device, where: torch.device) -> str | None:
    """The first small case that does not come out as the reference has it, or None."""

    def tried(*call: Any) -> list[Tensor]:
        compute(kernels, device, *call)
        return compute(kernels, device, *call)  # a repeated launch

    wrong = reference.find_wrong_case(tried, _CHECKED, device=where, floating=torch.bfloat16)
    return wrong and f"the compiled kernel is wrong for {wrong}"
