"""Attention of one token on a CPU: `attn_implementation="qvlm"` beside Transformers' `sdpa` and `eager`, in turns.

`composed` is what "qvlm" does where the C++ kernel cannot be compiled. A call goes through the
caches of as many layers as fit into half a gigabyte, up to 22: more than the processor's own memory
holds.

taskset -c 2,3 python tests/bench/attention.py --threads 2 --json
tests/bench/results/attention_cpu.json taskset -c 2,3 python tests/bench/attention.py --threads 2
--keys 4096 --rounds 5 --json tests/bench/results/attention_cpu_4096.json
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from qvlm_hf.bench.machine import device_name
from qvlm_hf.hf.runtime.attention import attend
from qvlm_hf.ops.attention import attend_with_pytorch

SIZES = {"LLaVA-1.5-7B": (32, 32, 128), "TinyLlama": (32, 4, 64)}  # heads, key heads, head size
LAYERS, BYTES = 22, 2**29


def by_operators(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float,
    **_: float,
) -> tuple[Tensor, None]:
    return attend_with_pytorch(query, key, value, mask, scaling), None


WAYS = {
    "sdpa": sdpa_attention_forward,
    "eager": eager_attention_forward,
    "composed": by_operators,
    "qvlm": attend,
}


def measure(
    heads: int, key_heads: int, size: int, keys: int, dtype: torch.dtype, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Way -> median of a call in microseconds, its interquartile range over it, times `sdpa`, and the GB/s of keys and values."""
    module = nn.Module().eval()
    module.num_key_value_groups = heads // key_heads
    read = 2 * batch * key_heads * keys * size * dtype.itemsize
    shapes = (batch, heads, 1, size), (batch, key_heads, keys, size), (batch, key_heads, keys, size)
    layers = [
        [torch.randn(shape, dtype=dtype) for shape in shapes]
        for _ in range(max(1, min(LAYERS, BYTES // read)))
    ]
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 2):
        for name, way in WAYS.items():
            start = time.perf_counter()
            for tensors in layers:
                way(module, *tensors, None, scaling=size**-0.5, dropout=0.0)
            if turn > 1:
                times[name].append((time.perf_counter() - start) / len(layers))
    base = median(times["sdpa"])
    found = {}
    for name, values in times.items():
        low, middle, high = quantiles(values, n=4)
        found[name] = {
            "microseconds": middle * 1e6,
            "spread": (high - low) / middle,
            "speedup": base / middle,
            "gigabytes": read / middle / 1e9,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--keys", type=int, default=640)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for shape, sizes in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for batch in options.batches:
                with torch.no_grad():
                    ways = measure(*sizes, options.keys, dtype, batch, options.rounds)
                rows.append(
                    {
                        "shape": shape,
                        "keys": options.keys,
                        "dtype": str(dtype).removeprefix("torch."),
                        "batch": batch,
                        "ways": ways,
                    }
                )
                print(
                    f"{shape:<14}{rows[-1]['dtype']:<10}batch {batch}",
                    {name: round(way["speedup"], 2) for name, way in ways.items()},
                )
    if options.json:
        result = {
            "device": device_name(torch.device("cpu")),
            "threads": options.threads,
            "torch": torch.__version__,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
