"""One decoded token on a CPU, and where its speed comes from: demo-1b in bfloat16 and W4A8.

    bfloat16     Transformers as it is
    kernels      quantized, with an 8-bit head and random weights, without the following
    norms        and norms as one operator each
    all          and a cache that grows in place: a user's model

All take turns. Before each step the cache holds `--positions` tokens and one more per turn.

    cd tests/bench
    python decode_step.py --threads 2 --positions 640 2048 --json results/decode_step_cpu.json
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from results_file import options_of, write
from transformers import DynamicCache

from qvlm_hf import QVLMConfig
from qvlm_hf.bench.generation import cache_argument
from qvlm_hf.bench.random_models import random_model
from qvlm_hf.bench.shapes import shape_config
from qvlm_hf.bench.turns import summarize, take_turns
from qvlm_hf.hf.round_on_load import planned_report
from qvlm_hf.hf.runtime import fusion, growing_cache
from qvlm_hf.hub.saved import empty_model

SHAPE = "demo-1b"


def models() -> dict[str, Any]:
    cpu = torch.device("cpu")
    settings = QVLMConfig(scheme="W4A8", lm_head_bits=8).settings()
    planned = planned_report(empty_model(shape_config(SHAPE)), settings).modules
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
    shape = (1, text.num_key_value_heads, positions, head)
    for layer in range(text.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=torch.bfloat16) for _ in range(2)), layer)
    return cache


@torch.no_grad()
def measure(ways: dict[str, Any], positions: int, rounds: int) -> dict[str, dict[str, float]]:
    """Way -> milliseconds of a step, spread, and times bfloat16."""
    caches = {way: filled(model, positions) for way, model in ways.items()}
    token = torch.tensor([[5]])

    def run(way: str, _turn: int) -> float:
        model = ways[way]
        with prepared(model, way):
            start = time.perf_counter()
            model(input_ids=token, **{cache_argument(model): caches[way]}, use_cache=True)
            return time.perf_counter() - start

    times, found = take_turns(ways, rounds, run, warm_ups=2), {}
    for way in ways:
        timing = summarize(times[way], times["bfloat16"])
        figures = {"spread": timing.spread, "speedup": timing.speedup}
        found[way] = {"milliseconds": 1e3 * timing.seconds, **figures}
    return found


def main() -> None:
    parser = options_of(__doc__, rounds=25)
    parser.add_argument("--positions", type=int, nargs="+", default=[640])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways, rows = models(), []
    for positions in options.positions:
        rows.append({"positions": positions, "ways": measure(ways, positions, options.rounds)})
        for way, row in rows[-1]["ways"].items():
            print(
                f"{positions:>6} {way:<10}{row['milliseconds']:>8.1f} ms, "
                f"spread {row['spread']:.0%}, {row['speedup']:.2f} x"
            )
    write(options.json, rows=rows)


if __name__ == "__main__":
    main()
