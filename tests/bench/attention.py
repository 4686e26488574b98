"""Attention of one token on a CPU: `attn_implementation="qvlm"` beside Transformers' `sdpa` and `eager`, in turns; 640 keys and values.

python tests/bench/attention.py --threads 2 --json tests/bench/results/attention_cpu.json
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from qvlm_hf.bench.machine import device_name
from qvlm_hf.integration.attention import attend

KEYS = 640
SIZES = {"LLaVA-1.5-7B": (32, 32, 128), "TinyLlama": (32, 4, 64)}  # heads, key heads, head size
WAYS = {"sdpa": sdpa_attention_forward, "eager": eager_attention_forward, "qvlm": attend}


def measure(heads: int, key_heads: int, size: int, dtype: torch.dtype, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Way -> median of a call in microseconds, its interquartile range over it, and how many times as fast as `sdpa` it is."""
    module = nn.Module().eval()
    module.num_key_value_groups = heads // key_heads
    copies = [
        [torch.randn(batch, n, t, size, dtype=dtype) for n, t in ((heads, 1), (key_heads, KEYS), (key_heads, KEYS))] for _ in range(22)
    ]
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 2):
        for name, way in WAYS.items():
            start = time.perf_counter()
            for tensors in copies:  # a step goes through the caches of all layers
                way(module, *tensors, None, scaling=size**-0.5, dropout=0.0)
            if turn > 1:
                times[name].append((time.perf_counter() - start) / len(copies))
    base = median(times["sdpa"])
    found = {}
    for name, values in times.items():
        low, middle, high = quantiles(values, n=4)
        found[name] = {"microseconds": middle * 1e6, "spread": (high - low) / middle, "speedup": base / median(values)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for shape, sizes in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for batch in (1, 4):
                ways = measure(*sizes, dtype, batch, options.rounds)
                rows.append({"shape": shape, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "ways": ways})
                print(f"{shape:<14}{rows[-1]['dtype']:<10}batch {batch}", {name: round(way["speedup"], 2) for name, way in ways.items()})
    if options.json:
        result = {"device": device_name(torch.device("cpu")), "threads": options.threads, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
