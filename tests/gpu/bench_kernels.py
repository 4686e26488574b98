"""One linear layer on a GPU, many ways: this package's kernels beside cuBLAS and other packages',
in turns in one run.

    python tests/gpu/bench_kernels.py --out-features 4096 --in-features 4096 --tokens 1 16 64 608
    --minutes 5

Every way goes from a bfloat16 input to a bfloat16 output, quantizing the input included. Weights
are taken in turns from copies that together exceed the L2 cache. A figure is the median over rounds
of one CUDA graph of several calls ("graph"), or of the calls themselves where a way cannot be
captured ("eager"); events of the device take the time. `bandwidth` is bytes of weights per second
over what a copy of a gigabyte moves. Only ratios of one run mean anything. Ways that are not
installed or fail are named with the reason. Weights are random bytes: rounding real ones takes
longer than timing them. --dry goes through all of it on a CPU; its times mean nothing.
"""

import argparse
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.random_models import random_tensors
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import QVLMLinear

BASELINE = "cuBLAS bfloat16"
SCHEMES = (
    ("W4A4", "channel"),
    ("W4A8", "dynamic_token"),
    ("W6A6", "channel"),
    ("W8A8", "dynamic_token"),
    ("W4A16", "none"),
)
RESULTS = Path(__file__).parents[1] / "bench" / "results"
MOST_COPIES = 64
CALLS = 20  # of one graph
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Way:
    """`run(x, copy)` computes the layer; `bytes` of one copy's weights; `least` tokens that it
    takes.
    """

    run: Callable[[Tensor, int], Tensor]
    copies: int
    bytes: int
    least: int = 1


def copies_of(size: float) -> int:
    """Copies that together are four times the L2 cache."""
    if DEVICE == "cpu":
        return 1
    return int(min(MOST_COPIES, 1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // size))


def ours(weight: Tensor, bits: str, granularity: str, group_size: int) -> Way:
    weight_bits, activation_bits = (int(part) for part in bits[1:].split("A"))
    scheme = QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        group_size=group_size,
        granularity=granularity,
    )
    sizes = weight.shape[1], weight.shape[0], scheme

    def make() -> QVLMLinear:
        module = QVLMLinear(*sizes, bias=False, dtype=torch.bfloat16, device="meta")
        for name, tensor in random_tensors(module, torch.device(DEVICE)):
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        return module

    modules = [make()]
    size = sum(parameter.nbytes for parameter in modules[0].parameters())
    modules += [make() for _ in range(copies_of(size) - 1)]
    if DEVICE == "cuda" and not modules[0].kernel.startswith("triton"):
        raise RuntimeError(modules[0].kernel)
    return Way(lambda x, i: modules[i](x), len(modules), size)


def cublas(weight: Tensor, bits: str, granularity: str, group_size: int) -> Way:
    copies = [weight.to(DEVICE).bfloat16() for _ in range(copies_of(weight.numel() * 2))]
    return Way(lambda x, i: functional.linear(x, copies[i]), len(copies), weight.numel() * 2)


def int_mm(weight: Tensor, bits: str, granularity: str, group_size: int) -> Way:
    """torch._int_mm with a dynamic range per token, the quantizer compiled; it takes more than 16
    tokens.
    """
    if DEVICE == "cpu":
        raise RuntimeError("torch.compile takes too long for a dry run")
    copies = [
        torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=DEVICE)
        for _ in range(copies_of(weight.numel()))
    ]

    @torch.compile
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), scale

    def run(x: Tensor, i: int) -> Tensor:
        q, scale = quantize(x)
        return (torch._int_mm(q, copies[i].T) * scale).bfloat16()

    return Way(run, len(copies), weight.numel(), least=17)


def tinygemm(weight: Tensor, bits: str, granularity: str, group_size: int) -> Way:
    count = copies_of(weight.numel() / 2)
    pairs = torch.randint(
        0, 256, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8, device=DEVICE
    )
    packed = [torch.ops.aten._convert_weight_to_int4pack(pairs, 8) for _ in range(count)]
    scales = torch.ones(
        weight.shape[1] // group_size, weight.shape[0], 2, dtype=torch.bfloat16, device=DEVICE
    )
    return Way(
        lambda x, i: torch.ops.aten._weight_int4pack_mm(x, packed[i], group_size, scales),
        count,
        weight.numel() // 2,
    )


def bitsandbytes_nf4(weight: Tensor, bits: str, granularity: str, group_size: int) -> Way:
    import bitsandbytes as bnb

    def make() -> nn.Module:
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        layer.weight = bnb.nn.Params4bit(weight.bfloat16(), requires_grad=False, quant_type="nf4")
        return layer.to(DEVICE)

    layers = [make() for _ in range(copies_of(weight.numel() / 2))]
    return Way(lambda x, i: layers[i](x), len(layers), weight.numel() // 2)


def humming(weight: Tensor, bits: str, granularity: str, group_size: int) -> Way:
    """humming-kernels 0.1.19, as its README shows it."""
    from humming.layer import HummingLayer

    weight_bits, activation_bits = (int(part) for part in bits[1:].split("A"))
    inputs = {"input_config": {"dtype": f"int{activation_bits}"}} if activation_bits <= 8 else {}

    def make() -> nn.Module:
        layer = HummingLayer(
            shape_n=weight.shape[0], shape_k=weight.shape[1], weight_config={"dtype": f"uint{weight_bits}", "group_size": group_size},
            torch_dtype=torch.bfloat16, **inputs,
        ).to(DEVICE)  # fmt: skip
        layer.load_from_unquantized(weight.to(DEVICE).bfloat16())
        layer.transform()
        return layer

    layers = [make() for _ in range(copies_of(weight.numel() * weight_bits / 8))]
    return Way(lambda x, i: layers[i](x), len(layers), weight.numel() * weight_bits // 8)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "bitsandbytes", "humming-kernels"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def ways_of(
    weight: Tensor, group_size: int, deadline: float
) -> tuple[dict[str, Way], dict[str, str]]:
    """What runs here, and why the rest does not; this package first, because peers may compile for
    minutes.
    """
    peers = {
        BASELINE: (cublas, "", ""),
        **{
            f"qvlm_hf {bits}, {granularity}": (ours, bits, granularity)
            for bits, granularity in SCHEMES
        },
        "torch._int_mm W8A8 (torch)": (int_mm, "", ""),
        "tinygemm W4A16 (torch)": (tinygemm, "", ""),
        "bitsandbytes nf4": (bitsandbytes_nf4, "", ""),
        **{f"humming {bits}": (humming, bits, "") for bits in ("W4A16", "W4A8", "W8A8")},
    }
    ways, missing = {}, {}
    for name, (make, bits, granularity) in peers.items():
        if time.monotonic() > deadline:
            missing[name] = "out of time"
            continue
        try:
            ways[name] = make(weight, bits, granularity, group_size)
            ways[name].run(
                torch.randn(
                    max(1, ways[name].least), weight.shape[1], device=DEVICE, dtype=torch.bfloat16
                ),
                0,
            )
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # a peer that is absent or too old must not end the run
            ways.pop(name, None)
            missing[name] = first_line(error)
    return ways, missing


def captured(way: Way, x: Tensor) -> tuple[Callable[[], None], str]:
    """CALLS calls, on copies in turns: as one graph, or one by one where a way cannot be captured."""

    def calls() -> None:
        for call in range(CALLS):
            way.run(x, call % way.copies)

    calls()
    if DEVICE == "cpu":
        return calls, "eager"
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
    except RuntimeError:
        torch.cuda.synchronize()
        return calls, "eager"
    return graph.replay, "graph"


def launches(run: Callable[[], None]) -> dict[str, int]:
    """How often each kernel is launched by a call; run once more, eagerly."""
    if DEVICE == "cpu":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    names = (e.name for e in profiled.events() if e.device_type == DeviceType.CUDA)
    return dict(Counter(name.split("<")[0].split("(")[0][-48:] for name in names))


def milliseconds(run: Callable[[], None]) -> float:
    """Of one of CALLS calls."""
    if DEVICE == "cpu":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3 / CALLS
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def copy_bandwidth() -> float:
    """Bytes per second that a copy of a gigabyte reads and writes: the best of ten."""
    source = torch.empty(2**30 if DEVICE == "cuda" else 2**24, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return max(
        2 * source.numel() / (milliseconds(lambda: target.copy_(source)) * CALLS / 1e3)
        for _ in range(10)
    )


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """What is known so far: after every number of tokens."""
    weight = torch.randn(arguments.out_features, arguments.in_features)
    deadline = time.monotonic() + 60 * arguments.minutes
    ways, missing = ways_of(weight, arguments.group_size, deadline)
    limit, rows = copy_bandwidth(), []
    result = {
        "device": device_name(torch.device(DEVICE)), "versions": versions(), "copy_bandwidth": limit,
        **{name: value for name, value in vars(arguments).items() if name != "output"}, "rows": rows, "missing": missing,
    }  # fmt: skip
    for tokens in arguments.tokens:
        if time.monotonic() > deadline:
            print(f"{tokens:5d}  not measured: out of time", flush=True)
            continue
        x = torch.randn(tokens, arguments.in_features, device=DEVICE, dtype=torch.bfloat16)
        runs = {}
        for name, way in ways.items():
            if way.least <= tokens:
                try:
                    runs[name] = captured(way, x)
                except (
                    Exception
                ) as error:  # a peer that does not take this number must not end the run
                    missing[f"{name}, {tokens} tokens"] = first_line(error)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(arguments.rounds + 1):
            if time.monotonic() > deadline and turn > 3:
                break
            for name, (run, _) in runs.items():
                taken = milliseconds(run)
                if turn:  # the first turn warms up
                    times[name].append(taken)
        base = median(times[BASELINE])
        for name, taken in times.items():
            middle, (low, _, high) = median(taken), quantiles(taken, n=4)
            rows.append(
                {
                    "way": name, "tokens": tokens, "mode": runs[name][1], "milliseconds": middle, "spread": (high - low) / middle,
                    "speedup": base / middle, "bandwidth": ways[name].bytes / (middle / 1e3) / limit,
                    "launches": launches(lambda way=ways[name], x=x: way.run(x, 0)),
                }
            )  # fmt: skip
            print(
                f"{tokens:5d}  {name:34s} {runs[name][1]}  {middle * 1e3:9.1f} us  "
                f"x{base / middle:5.2f}  {rows[-1]['bandwidth']:5.1%}",
                flush=True,
            )
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 608])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--minutes",
        type=float,
        default=5,
        help="after which nothing further is prepared or measured",
    )
    parser.add_argument(
        "--output", type=Path, help="default: tests/bench/results/kernels_gpu_<out-features>.json"
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, one round")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.dry:
        parser.error("needs a CUDA device: PyTorch finds none")
    if arguments.dry:
        arguments.rounds = 2
    output = arguments.output or RESULTS / f"kernels_gpu_{arguments.out_features}.json"
    if not output.absolute().parent.is_dir():
        parser.error(f"--output {output}: the directory does not exist")
    found = {"missing": {}}
    for found in measure(arguments):
        output.write_text(json.dumps(found, indent=1) + "\n")
    for name, reason in found["missing"].items():
        print(f"       {name:34s} not measured: {reason}")
    print(output)


if __name__ == "__main__":
    main()
