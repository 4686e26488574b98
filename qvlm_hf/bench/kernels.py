"""One linear layer, many ways: this package's kernels beside PyTorch's, in turns in one run.

Every way computes the same thing from a bfloat16 input to an output: quantizing the input is part
of it. Weights are taken in turns from copies that together exceed the processor's caches, as the
layers of a model do. A figure is the median over rounds; the spread is that of the middle half.
Only ratios of one run mean anything: other programs slow all ways down together.

Legend: M tokens, N out_features, K in_features.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn import functional

from qvlm_hf.bench.machine import Reading
from qvlm_hf.format.grids import QParams, quantize_weight
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors

__all__ = ["KernelRow", "measure_kernels"]

BASELINE = "torch bfloat16"
_SCHEMES = (
    ("W4A4", "channel"),
    ("W4A8", "dynamic_token"),
    ("W6A6", "channel"),
    ("W8A8", "dynamic_token"),
    ("W4A16", "none"),
)
_CACHES = (
    96 * 2**20
)  # bytes of weights that one way goes through before it meets the same copy again
_MOST_COPIES = 64  # of a layer so small that the caches hold it all the same
_INT_MM_TOKENS = 17  # torch._int_mm takes no fewer


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One way at one number of tokens.

    Attributes:
        way: its name.
        tokens: M.
        milliseconds: median of one call.
        spread: interquartile range over the median.
        speedup: the baseline's median over this one's.
        bandwidth: bytes of weights read per second over what the machine reads (median of readings
            in the same turns); what limits few tokens of layers beyond the caches.
    """

    way: str
    tokens: int
    milliseconds: float
    spread: float
    speedup: float
    bandwidth: float


@torch.no_grad()  # as `generate` calls layers
def measure_kernels(
    out_features: int,
    in_features: int,
    tokens: Sequence[int],
    *,
    rounds: int = 9,
    group_size: int = 128,
    cache_bytes: int = _CACHES,
    advance: Callable[[], None] = lambda: None,
) -> list[KernelRow]:
    """Times every way at every number of tokens.

    Args:
        out_features: N.
        in_features: K, a multiple of `group_size`.
        tokens: the values of M.
        rounds: turns that every way gets.
        group_size: inputs per weight scale of the quantized ways.
        cache_bytes: how many bytes of weights count as more than the caches hold.
        advance: called after every number of tokens.

    Returns:
        Rows by number of tokens, the baseline first.
    """
    ways = _ways(out_features, in_features, group_size, cache_bytes)
    reading, rows = Reading(), []
    for count in tokens:
        x = torch.randn(count, in_features).bfloat16()
        eligible = {name: way for name, way in ways.items() if count >= way.tokens}
        times: dict[str, list[float]] = {name: [] for name in eligible}
        readings: list[float] = []
        calls = 1 if count > 16 else 8
        for turn in range(rounds + 1):
            readings.append(reading.bandwidth())
            for name, way in eligible.items():
                start = time.perf_counter()
                for call in range(calls):
                    way.run(x, (turn * calls + call) % way.copies)
                if turn:  # the first turn warms up
                    times[name].append((time.perf_counter() - start) / calls)
        base, limit = median(times[BASELINE]), median(readings)
        for name, values in times.items():
            middle, (low, _, high) = median(values), quantiles(values, n=4, method="inclusive")
            rows.append(
                KernelRow(
                    way=name, tokens=count, milliseconds=middle * 1e3, spread=(high - low) / middle, speedup=base / middle,
                    bandwidth=eligible[name].bytes / middle / limit,
                )
            )  # fmt: skip
        advance()
    return rows


@dataclass(frozen=True)
class _Way:
    run: Callable[[Tensor, int], Tensor]
    copies: int
    bytes: int  # of one copy's weights
    tokens: int = 1  # fewest that it takes


@torch.no_grad()
def _ways(
    out_features: int, in_features: int, group_size: int, cache_bytes: int
) -> dict[str, _Way]:
    size = out_features * in_features
    weight = torch.randn(out_features, in_features)

    def copies(tensor_bytes: float) -> int:
        return _copies(tensor_bytes, cache_bytes)

    half = [weight.bfloat16() for _ in range(copies(2 * size))]
    single = [weight.clone() for _ in range(copies(4 * size))]
    bytes_ = [torch.randint(-127, 128, weight.shape, dtype=torch.int8) for _ in range(copies(size))]
    ways = {
        BASELINE: _Way(lambda x, i: functional.linear(x, half[i]), len(half), 2 * size),
        "torch float32": _Way(
            lambda x, i: functional.linear(x.float(), single[i]).bfloat16(), len(single), 4 * size
        ),
        "torch int8 (_int_mm), W8A8": _Way(
            lambda x, i: _int_mm(x, bytes_[i]), len(bytes_), size, _INT_MM_TOKENS
        ),
    }
    if (int4 := _int4pack(weight, group_size, copies(size / 2))) is not None:
        ways["torch int4 (int4pack), W4A16"] = int4
    for bits, granularity in _SCHEMES:
        modules = _modules(weight, bits, granularity, group_size, cache_bytes)
        packed = sum(
            parameter.numel() * parameter.itemsize for parameter in modules[0].parameters()
        )
        ways[f"qvlm_hf {bits}, {granularity}"] = _Way(partial(_call, modules), len(modules), packed)
    return ways


def _copies(tensor_bytes: float, cache_bytes: int) -> int:
    return min(_MOST_COPIES, 1 + int(cache_bytes // tensor_bytes))


def _call(modules: Sequence[QVLMLinear], x: Tensor, copy: int) -> Tensor:
    return modules[copy](x)


def _modules(
    weight: Tensor, bits: str, granularity: str, group_size: int, cache_bytes: int
) -> list[QVLMLinear]:
    weight_bits, activation_bits = (int(part) for part in bits[1:].split("A"))
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        group_size=group_size,
        granularity=granularity,
    )
    statics = None
    if granularity == "channel":
        scale = torch.full((weight.shape[1],), 8 / 2**activation_bits)
        statics = QParams(
            scale,
            torch.full(scale.shape, 2 ** (activation_bits - 1), dtype=torch.int32),
            activation_bits,
        )
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=torch.bfloat16
    )
    tensors = packed_tensors(quantize_weight(weight, scheme), scheme, statics)
    count = _copies(tensors["weight"].numel() * 4, cache_bytes)
    return [
        QVLMLinear.from_packed(
            linear, scheme, {name: tensor.clone() for name, tensor in tensors.items()}
        )
        for _ in range(count)
    ]


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    values = x.float()
    scale = values.abs().amax(-1, keepdim=True) / 127
    return (
        torch._int_mm((values / scale).round().to(torch.int8), weight.T).float() * scale
    ).bfloat16()


def _int4pack(weight: Tensor, group_size: int, copies: int) -> _Way | None:
    """PyTorch's weight-only int4 product; None where this build has none."""
    integers = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    scales = torch.ones(weight.shape[1] // group_size, weight.shape[0], 2, dtype=torch.bfloat16)
    try:
        packed = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1) for _ in range(copies)
        ]
        torch.ops.aten._weight_int4pack_mm_for_cpu(
            torch.ones(1, weight.shape[1], dtype=torch.bfloat16), packed[0], group_size, scales
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    run = lambda x, i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[i], group_size, scales)  # noqa: E731
    return _Way(run, len(packed), weight.numel() // 2)
