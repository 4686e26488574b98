"""One decoded token on a CPU, and what makes it fast: demo-1b in bfloat16, W4A8 with an 8-bit head and random weights, all ways in turns.

    bfloat16     Transformers as it is
    kernels      the quantized model without what follows
    norms        and norms as one operator each
    all          and a cache that grows in place: what a user gets

Before each step the cache holds `--positions` tokens and as many more as there were turns.

python tests/bench/decode_step.py --threads 2 --positions 640 2048 --json
tests/bench/results/decode_step_cpu.json
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from transformers import DynamicCache

from qvlm_hf import QVLMConfig
from qvlm_hf.bench.generation import cache_argument
from qvlm_hf.bench.machine import device_name
from qvlm_hf.bench.random_models import random_model
from qvlm_hf.bench.shapes import shape_config, shape_model
from qvlm_hf.hf.round_on_load import planned_modules
from qvlm_hf.hf.runtime import fusion, growing_cache

SHAPE = "demo-1b"


def models() -> dict[str, Any]:
    cpu = torch.device("cpu")
    settings = QVLMConfig(scheme="W4A8", lm_head_bits=8).settings()
    planned = planned_modules(shape_model(SHAPE), settings)
    quantized = random_model(shape_config(SHAPE), dtype=torch.bfloat16, device=cpu, modules=planned)
    full = random_model(shape_config(SHAPE), dtype=torch.bfloat16, device=cpu)
    return {"bfloat16": full, "kernels": quantized, "norms": quantized, "all": quantized}


@contextmanager
def prepared(model: Any, way: str) -> Iterator[None]:
    """The model as the way says."""
    if way == "kernels":
        fusion.unfuse(model)
    if way in ("kernels", "norms"):
        growing_cache.take_back(model)
    try:
        yield
    finally:
        fusion.fuse(model)


def filled(model: Any, positions: int) -> DynamicCache:
    text = model.config.text_config
    cache, head = DynamicCache(), text.hidden_size // text.num_attention_heads
    for layer in range(text.num_hidden_layers):
        cache.update(
            *(
                torch.randn(1, text.num_key_value_heads, positions, head, dtype=torch.bfloat16)
                for _ in range(2)
            ),
            layer,
        )
    return cache


@torch.no_grad()
def measure(ways: dict[str, Any], positions: int, rounds: int) -> dict[str, dict[str, float]]:
    """Way -> median of a step in milliseconds, its interquartile range over it, and how many times as fast as bfloat16 it is."""
    caches = {way: filled(model, positions) for way, model in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    token = torch.tensor([[5]])
    for turn in range(rounds + 2):
        for way, model in ways.items():
            with prepared(model, way):
                start = time.perf_counter()
                model(input_ids=token, **{cache_argument(model): caches[way]}, use_cache=True)
                if turn > 1:
                    times[way].append(time.perf_counter() - start)
    found = {}
    for way, values in times.items():
        low, middle, high = quantiles(values, n=4)
        found[way] = {
            "milliseconds": 1e3 * middle,
            "spread": (high - low) / middle,
            "speedup": median(times["bfloat16"]) / median(values),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--positions", type=int, nargs="+", default=[640])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways, rows = models(), []
    for positions in options.positions:
        rows.append({"positions": positions, "ways": measure(ways, positions, options.rounds)})
        for way, row in rows[-1]["ways"].items():
            print(
                f"{positions:>6} {way:<10}{row['milliseconds']:>8.1f} ms, spread "
                f"{row['spread']:.0%}, {row['speedup']:.2f} x"
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
