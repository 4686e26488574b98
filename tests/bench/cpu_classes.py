"""Kernels of classes of processors below this one's, and rounding, times PyTorch's float32.

One thread, processor time, minimum of several turns: other programs on the machine change it least.
Every contender computes from a float32 input to an output of a layer of 2048 x 4096. PyTorch shall
not take instructions that the class lacks:

    export ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2
    python tests/bench/cpu_classes.py --classes avx2 --json tests/bench/results/cpu_classes.json
"""

import copy
import os
from time import process_time

import torch
from results_file import options_of, write
from torch.nn import functional

from qvlm_hf.bench import kernels
from qvlm_hf.format.grids import quantize_weight
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.linear import packed_tensors
from qvlm_hf.ops import cpu
from qvlm_hf.ops.call import packed_call

OUT, IN = 2048, 4096
CACHES = 96 * 2**20  # bytes that no cache holds
INPUTS = {4: "channel", 8: "dynamic_token", 16: "none"}


def seconds(compute):
    start = process_time()
    compute()
    return process_time() - start


def library(name):
    os.environ["QVLM_CPU"] = name
    try:
        return cpu._load()
    finally:
        del os.environ["QVLM_CPU"]


def scheme_of(weight_bits, activation_bits):
    return QuantScheme(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        group_size=128,
        granularity=INPUTS[activation_bits],
    )


def products(libraries, widths, tokens, turns):
    """Rows of every class, scheme and number of tokens."""
    weight, rows, memory = torch.randn(OUT, IN), [], torch.ones(CACHES // 2)
    plain = [weight.clone() for _ in range(1 + CACHES // weight.nbytes)]
    modules = {}
    for bits in widths:
        scheme = scheme_of(*bits)
        module = kernels._module(weight, scheme)
        size = sum(one.nbytes for one in module.parameters())
        copies = (copy.deepcopy(module) for _ in range(1 + CACHES // size))
        calls = [packed_call(dict(one.named_parameters()), IN, scheme) for one in copies]
        modules[f"W{bits[0]}A{bits[1]}"] = calls, size
    for count in tokens:
        x, calls = torch.randn(count, IN), 8 if count <= 16 else 1
        bfloat, half = x.bfloat16(), [one.bfloat16() for one in plain]
        ways = {
            ("torch", "float32"): lambda i: functional.linear(x, plain[i % len(plain)]),  # noqa: B023
            ("torch", "bfloat16"): lambda i: functional.linear(bfloat, half[i % len(half)]),  # noqa: B023
        }
        for name, one in libraries.items():
            for scheme, (held, _) in modules.items():

                def compute(i, one=one, held=held, x=x):
                    packed, numbers = held[i % len(held)]
                    cpu._compute(one, x, [packed], numbers)

                ways[name, scheme] = compute
        best, reading = dict.fromkeys(ways, float("inf")), float("inf")
        for turn in range(turns + 1):
            reading = min(reading, seconds(memory.sum))
            for way, compute in ways.items():
                few = 1 if way == ("torch", "bfloat16") else calls  # without units it takes long
                time = seconds(lambda: [compute(turn * calls + i) for i in range(few)])  # noqa: B023
                if turn:  # the first turn warms up
                    best[way] = min(best[way], time / few)
        full = min(time for (name, _), time in best.items() if name == "torch")
        for (name, scheme), time in best.items():
            row = {"class": name, "scheme": scheme, "tokens": count, "milliseconds": time * 1e3}
            row |= {"times_float32": best["torch", "float32"] / time, "times_fastest": full / time}
            if name != "torch":
                row["bandwidth"] = modules[scheme][1] / time / (memory.nbytes / reading)
            rows.append(row)
            print(row, flush=True)
    return rows


def rounding(libraries, turns):
    """W4 in groups of 128: the C++ pass with packing, times plain min-max without packing."""
    weight, scheme = torch.randn(OUT, IN), scheme_of(4, 8)
    ones = torch.ones(OUT, IN // 128)
    ways = {"plain min-max": lambda: quantize_weight(weight, scheme, ones)}
    ways |= {
        name: lambda one=one: cpu._round(one, weight, scheme) for name, one in libraries.items()
    }
    times = {name: min(seconds(way) for _ in range(turns)) for name, way in ways.items()}
    times["PyTorch"] = seconds(
        lambda: packed_tensors(quantize_weight(weight, scheme), scheme, None)
    )
    return {name: time / times["plain min-max"] for name, time in times.items()}


def main():
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--classes", nargs="+", default=["avx2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 64, 608])
    parser.set_defaults(threads=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    libraries = {name: library(name) for name in arguments.classes}
    widths = [(weight, inputs) for inputs in INPUTS for weight in range(2, 9)]
    with torch.no_grad():
        rounded = rounding(libraries, arguments.rounds)
        rows = products(libraries, widths, arguments.tokens, arguments.rounds)
    write(arguments.json, load=os.getloadavg(), rounding=rounded, rows=rows)


if __name__ == "__main__":
    main()
