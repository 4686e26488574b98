"""One linear layer: this package's kernels beside PyTorch's, in turns in one run.

Every contender computes from a bfloat16 input to an output; quantizing the input is part of it.
Each takes its weights in turns from copies that together exceed the processor's caches, as the
layers of a model do. Only ratios of one run mean anything.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvlm_hf.bench.machine import Reading
from qvlm_hf.bench.turns import summarize
from qvlm_hf.format.grids import QParams, quantize_weight
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors

__all__ = ["KernelRow", "measure_kernels"]

_FULL_PRECISION = ("torch bfloat16", "torch float32")  # the faster of them is the baseline
_SCHEMES = {  # with the ranges that recipe="auto" tries first
    "W4A4, dynamic_group": (4, 4, "dynamic_group"),
    "W4A8, dynamic_group": (4, 8, "dynamic_group"),
    "W6A6, dynamic_group": (6, 6, "dynamic_group"),
    "W8A8, dynamic_group": (8, 8, "dynamic_group"),
    "W4A16, none": (4, 16, "none"),
}
_CACHES = 96 * 2**20  # bytes of weights before a contender meets the same copy again
_MOST_COPIES = 64  # of a layer so small that the caches hold it all the same
_INT_MM_TOKENS = 17  # torch._int_mm takes no fewer


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One contender at one number of tokens."""

    way: str  # name of the contender
    tokens: int  # per call
    milliseconds: float  # median of one call
    spread: float  # interquartile range over the median
    speedup: float  # the median of the faster of bfloat16 and float32 over this one
    bandwidth: float  # bytes of weights per second over those that the machine reads


@dataclass(frozen=True)
class _Contender:
    multiply: Callable[[Tensor, Any], Tensor]
    weights: list[Any]  # copies, or modules that hold them
    bytes: int  # of one copy
    fewest_tokens: int = 1


@torch.no_grad()  # as `generate` calls layers
def measure_kernels(
    out_features: int,
    in_features: int,
    tokens: Sequence[int],
    *,
    rounds: int = 9,
    group_size: int = 128,
    cache_bytes: int = _CACHES,
    advance: Callable[[], object] = lambda: None,
) -> list[KernelRow]:
    """Times every contender at every number of tokens.

    Args:
        out_features: of the layer.
        in_features: of the layer, a multiple of `group_size`.
        tokens: numbers of tokens per call.
        rounds: turns per contender.
        group_size: inputs per weight scale of the quantized contenders.
        cache_bytes: of weights that the caches cannot hold.
        advance: called after every number of tokens.
    """
    contenders = _contenders(out_features, in_features, group_size, cache_bytes)
    reading, rows = Reading(), []
    for count in tokens:
        x = torch.randn(count, in_features).bfloat16()
        eligible = {name: one for name, one in contenders.items() if count >= one.fewest_tokens}
        times: dict[str, list[float]] = {name: [] for name in eligible}
        readings: list[float] = []
        calls = 1 if count > 16 else 8
        for turn in range(rounds + 1):
            readings.append(reading.bandwidth())
            for name, one in eligible.items():
                start = time.perf_counter()
                for call in range(turn * calls, (turn + 1) * calls):
                    one.multiply(x, one.weights[call % len(one.weights)])
                if turn:  # the first turn warms up
                    times[name].append((time.perf_counter() - start) / calls)
        baseline = min(_FULL_PRECISION, key=lambda name: median(times[name]))
        for name, one in eligible.items():
            found = summarize(times[name], times[baseline])
            rows.append(
                KernelRow(
                    way=name,
                    tokens=count,
                    milliseconds=found.seconds * 1e3,
                    spread=found.spread,
                    speedup=found.speedup,
                    bandwidth=one.bytes / found.seconds / median(readings),
                )
            )
        advance()
    return rows


def _contenders(
    out_features: int, in_features: int, group_size: int, cache_bytes: int
) -> dict[str, _Contender]:
    weight = torch.randn(out_features, in_features)
    size = weight.numel()

    def contender(
        multiply: Callable[[Tensor, Any], Tensor],
        make: Callable[[], Any],
        size: int,
        fewest: int = 1,
    ) -> _Contender:
        copies = min(_MOST_COPIES, 1 + cache_bytes // size)
        return _Contender(multiply, [make() for _ in range(copies)], size, fewest)

    random_bytes = partial(torch.randint, -127, 128, weight.shape, dtype=torch.int8)
    found = {
        "torch bfloat16": contender(functional.linear, weight.bfloat16, 2 * size),
        "torch float32": contender(_float32, weight.clone, 4 * size),
        "torch int8 (_int_mm), W8A8": contender(_int_mm, random_bytes, size, _INT_MM_TOKENS),
    }
    with suppress(RuntimeError, AttributeError, NotImplementedError):  # not in every build
        multiply, make = _int4pack(weight, group_size)
        multiply(torch.ones(1, in_features, dtype=torch.bfloat16), make())
        found["torch int4 (int4pack), W4A16"] = contender(multiply, make, size // 2)
    for name, (weight_bits, activation_bits, granularity) in _SCHEMES.items():
        scheme = QuantScheme(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            group_size=group_size,
            granularity=granularity,
        )
        module = _module(weight, scheme)
        packed = sum(parameter.nbytes for parameter in module.parameters())
        found[f"qvlm_hf {name}"] = contender(_call, partial(copy.deepcopy, module), packed)
    return found


def _call(x: Tensor, module: nn.Module) -> Tensor:
    return module(x)


def _float32(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x.float(), weight).bfloat16()


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    integers = (values / scale).round().to(torch.int8)
    return (torch._int_mm(integers, weight.T).float() * scale).bfloat16()


def _int4pack(
    weight: Tensor, group_size: int
) -> tuple[Callable[[Tensor, Any], Tensor], Callable[[], Tensor]]:
    """PyTorch's weight-only int4 product, and what packs weights for it."""
    integers = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    scales = torch.ones(weight.shape[1] // group_size, weight.shape[0], 2, dtype=torch.bfloat16)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    pack = partial(torch.ops.aten._convert_weight_to_int4pack_for_cpu, integers, 1)
    return lambda x, packed: multiply(x, packed, group_size, scales), pack


def _module(weight: Tensor, scheme: QuantScheme) -> QVLMLinear:
    out_features, in_features = weight.shape
    statics = None
    if scheme.granularity == "channel":
        levels = 2**scheme.activation_bits
        zero_point = torch.full((in_features,), levels // 2, dtype=torch.int32)
        scale = torch.full((in_features,), 8 / levels)
        statics = QParams(scale, zero_point, scheme.activation_bits)
    tensors = packed_tensors(quantize_weight(weight, scheme), scheme, statics)
    linear = nn.Linear(in_features, out_features, False, device="meta", dtype=torch.bfloat16)
    return QVLMLinear.from_packed(linear, scheme, tensors)
